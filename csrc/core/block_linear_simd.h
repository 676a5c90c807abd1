// SPDX-License-Identifier: Apache-2.0
// What linear layers of block-diagonal factors share: their inputs in the type of the sums, their
// results with bias, activation and layout, and the gradients of their weights. For files under
// structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include "activation_simd.h"
#include "block_product_simd.h"

namespace structmat {
namespace {

// Tokens a tile: their hidden units stay in the level-2 cache, and the weights are read once for
// all of them.
constexpr std::int64_t kTokenTile = 48;

inline std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return ceil_div(a, b) * b;
}

// Tokens [t0, t1) of tile `tile`: `tokens` are cut into nearly equal tiles.
struct TokenTiles {
  std::int64_t tokens, count;
  TokenTiles(std::int64_t tokens, std::int64_t threads)
      : tokens(tokens),
        count(std::max(ceil_div(tokens, kTokenTile),
                       std::min(threads, ceil_div(tokens, kBlockRows)))) {}
  std::int64_t first(std::int64_t tile) const { return tokens * tile / count; }
};

template <class T>
const T* row_of(const ConstMatrixView& x, std::int64_t t) {
  return static_cast<const T*>(x.data) + t * x.row_stride;
}
template <class T>
T* row_of(const MatrixView& x, std::int64_t t) {
  return static_cast<T*>(x.data) + t * x.row_stride;
}

// Rows [t0, t1) of x in the type of the sums: in place, or a widened copy.
template <class S, class T>
struct WideRows {
  const S* data;
  std::int64_t stride;
  WideRows(const ConstMatrixView& x, std::int64_t t0, std::int64_t t1, Scratch& memory) {
    if constexpr (std::is_same_v<S, T>) {
      data = row_of<T>(x, t0);
      stride = x.row_stride;
    } else {
      stride = round_up(x.cols, kLanes<S>) + kLanes<S>;
      S* const to = memory.get<S>((t1 - t0) * stride);
      for (std::int64_t t = t0; t < t1; ++t)
        convert(row_of<T>(x, t), to + (t - t0) * stride, x.cols);
      data = to;
    }
  }
};

// A result of whole factors: block b's output o is column b * width + o, or, with `inner` > 1,
// (b / inner * width + o) * inner + b % inner.
template <class S, class T>
struct Output {
  MatrixView y;
  std::int64_t width, inner;
  const S* bias = nullptr;  // (blocks, width rounded up to whole vectors)
  Activation activation = Activation::none;

  std::int64_t bias_step() const { return round_up(width, kLanes<S>); }

  // The bias in the order of the blocks.
  void set_bias(const T* from, std::int64_t blocks, Scratch& memory) {
    if (from == nullptr) return;
    S* const to = memory.get<S>(blocks * bias_step());
    for (std::int64_t b = 0; b < blocks; ++b) {
      S* const line = to + b * bias_step();
      for (std::int64_t o = 0; o < width; ++o)
        convert(from + (b / inner * width + o) * inner + b % inner, line + o, 1);
      std::fill(line + width, line + bias_step(), S{0});
    }
    bias = to;
  }

  // Blocks that are computed together: their columns alternate.
  std::int64_t group() const { return std::min<std::int64_t>(inner, kLanes<S>); }
  std::int64_t groups(std::int64_t blocks) const {
    return blocks / inner * ceil_div(inner, group());
  }

  // Group `index` of rows [t0, t1), from the rows at a.
  template <class F>
  void compute(const F& f, const Gather& from, const S* a, std::int64_t lda, std::int64_t t0,
               std::int64_t t1, std::int64_t index) const {
    static thread_local Scratch weights_memory, z_memory;
    const std::int64_t per = ceil_div(inner, group()), first = index / per * inner,
                       b0 = first + index % per * group(),
                       b1 = std::min(b0 + group(), first + inner), rows = t1 - t0;
    if (std::is_same_v<S, T> && inner == 1) {
      S* const to = reinterpret_cast<S*>(row_of<T>(y, t0)) + b0 * width;
      multiply_block(f, f.get(b0, weights_memory), a + from.base(b0), lda, from.table(b0), rows,
                     bias != nullptr ? bias + b0 * bias_step() : nullptr, to, y.row_stride, false);
      if (activation != Activation::none)
        for (std::int64_t t = 0; t < rows; ++t) activate(activation, to + t * y.row_stride, width);
      return;
    }
    const std::int64_t step = bias_step(), ldz = (b1 - b0) * step;
    S* const z = z_memory.get<S>(rows * ldz);
    for (std::int64_t b = b0; b < b1; ++b)
      multiply_block(f, f.get(b, weights_memory), a + from.base(b), lda, from.table(b), rows,
                     bias != nullptr ? bias + b * step : nullptr, z + (b - b0) * step, ldz, true);
    for (std::int64_t t = 0; t < rows; ++t) {
      S* const line = z + t * ldz;
      activate(activation, line, ldz);
      T* const to = row_of<T>(y, t0 + t) + first * width + (b0 - first);
      if (inner == 1)
        convert(line, to, width);
      else
        interleave(line, step, b1 - b0, to);
    }
  }

  // to[o * inner + b] = line[b * step + o] for `count` blocks.
  void interleave(const S* line, std::int64_t step, std::int64_t count, T* to) const {
    constexpr int w = kLanes<S>;
    for (std::int64_t o = 0; o < width; o += w) {
      Vec<S> square[w];
      for (int b = 0; b < w; ++b) square[b] = b < count ? load(line + b * step + o) : Vec<S>{};
      transpose<S>(square);
      const int height = static_cast<int>(std::min<std::int64_t>(w, width - o));
      for (int i = 0; i < height; ++i) {
        alignas(64) S out[w];
        store(out, square[i]);
        convert(out, to + (o + i) * inner, count == w ? w : count);
      }
    }
  }
};

// The gradient of one block's weights, sums (rows, width) over `tokens` tokens: of row r of the
// block, a[row_at(r) + t * lda], times x[t * ldx + o]. `total` (rows, width rounded up) is added
// to, or begun.
template <class S, class RowAt>
void weight_gradient(std::int64_t tokens, std::int64_t rows, std::int64_t width, const S* a,
                     RowAt&& row_at, const std::int64_t* token_offset, const S* x, std::int64_t ldx,
                     S* total, bool begin) {
  const std::int64_t panel = panel_width<S>(width), ld = round_up(width, kLanes<S>);
  for (std::int64_t o = 0; o < width; o += panel) {
    const int vecs = static_cast<int>(ceil_div(std::min(panel, width - o), kLanes<S>));
    Chain<S> g{tokens, {}, token_offset, x + o, ldx};
    const std::int64_t blocks = ceil_div(rows, kBlockRows);
    for (std::int64_t i = 0; i < blocks; ++i) {
      const std::int64_t r0 = rows * i / blocks;
      const int count = static_cast<int>(rows * (i + 1) / blocks - r0);
      for (int r = 0; r < count; ++r) g.row[r] = a + row_at(r0 + r);
      S* const to = total + r0 * ld + o;
      block_kernel_for<S>(count, vecs)(g, begin ? nullptr : to, ld, to, ld);
    }
  }
}

// Columns first + o * step, o < width, of rows [t0, t1) of x: (tokens, width rounded up), zeros
// beyond `width`.
template <class S, class T>
void copy_columns(const ConstMatrixView& x, std::int64_t t0, std::int64_t t1, std::int64_t first,
                  std::int64_t step, std::int64_t width, S* to) {
  const std::int64_t ld = round_up(width, kLanes<S>);
  for (std::int64_t t = t0; t < t1; ++t, to += ld) {
    const T* const from = row_of<T>(x, t) + first;
    if (step == 1)
      convert(from, to, width);
    else
      for (std::int64_t o = 0; o < width; ++o) convert(from + o * step, to + o, 1);
    std::fill(to + width, to + ld, S{0});
  }
}

// sums[o] += of the rows of x (rows, ld), in the order of the rows.
template <class S>
void add_columns(const S* x, std::int64_t rows, std::int64_t ld, S* sums, bool begin) {
  for (std::int64_t o = 0; o < ld; o += kLanes<S>) {
    Vec<S> sum{};
    for (std::int64_t t = 0; t < rows; ++t) sum = sum + load(x + t * ld + o);
    store(sums + o, begin ? sum : load(sums + o) + sum);
  }
}

}  // namespace
}  // namespace structmat
