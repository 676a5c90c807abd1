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
  std::int64_t neighbours = 1;  // blocks side by side that are computed together

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

  // Blocks that are computed together: those whose columns alternate, or some that are side by
  // side.
  std::int64_t group() const {
    return inner > 1 ? std::min<std::int64_t>(inner, kLanes<S>) : neighbours;
  }
  std::int64_t run(std::int64_t blocks) const { return inner > 1 ? inner : blocks; }
  std::int64_t groups(std::int64_t blocks) const {
    return blocks / run(blocks) * ceil_div(run(blocks), group());
  }
  struct Range {
    std::int64_t b0, b1;
  };
  Range range(std::int64_t index, std::int64_t blocks) const {
    const std::int64_t per = ceil_div(run(blocks), group()), first = index / per * run(blocks),
                       b0 = first + index % per * group();
    return {b0, std::min(b0 + group(), first + run(blocks))};
  }

  // Columns of blocks [b0, b1) of rows [t0, t1), from the rows at `a`.
  template <class F>
  void compute(const F& f, const S* a, std::int64_t lda, const Columns& from, std::int64_t t0,
               std::int64_t t1, Range blocks) const {
    static thread_local Scratch weights_memory, z_memory;
    const auto [b0, b1] = blocks;
    const auto weights = f.ready(b0, b1, weights_memory);
    const std::int64_t step = bias_step(), ldz = (b1 - b0) * step;
    const bool direct = std::is_same_v<S, T> && inner == 1;
    S* const z = direct ? nullptr : z_memory.get<S>(kBlockRows * ldz);
    for_row_blocks(t1 - t0, [&](std::int64_t r0, int rows) {
      const std::int64_t t = t0 + r0;
      for (std::int64_t b = b0; b < b1; ++b) {
        S* const to = direct ? reinterpret_cast<S*>(row_of<T>(y, t)) + b * width : z + (b - b0) * step;
        multiply_rows(f, weights(b), Rows<S>{a + from.base(b) + r0 * lda, lda, from.step}, rows,
                      bias != nullptr ? bias + b * step : nullptr, to, direct ? y.row_stride : ldz,
                      !direct);
      }
      for (int r = 0; r < rows; ++r) {
        if (direct) {
          activate(activation, reinterpret_cast<S*>(row_of<T>(y, t + r)) + b0 * width,
                   (b1 - b0) * width);
          continue;
        }
        S* const line = z + r * ldz;
        activate(activation, line, ldz);
        T* const to = row_of<T>(y, t + r);
        if (inner == 1)
          for (std::int64_t b = b0; b < b1; ++b)
            convert(line + (b - b0) * step, to + b * width, width);
        else
          interleave(line, step, b1 - b0, to + b0 / inner * width * inner + b0 % inner);
      }
    });
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

// The gradient of one block's weights (rows, width): sums over tokens of a[t * lda + row] times
// x[t * ldx + o], added to `total` (rows, ld), or begun there. x and total have whole vectors.
template <class S>
void weight_gradient(std::int64_t tokens, std::int64_t rows, std::int64_t width, const S* a,
                     std::int64_t lda, const S* x, std::int64_t ldx, S* total, bool begin) {
  const std::int64_t panel = panel_width<S>(width), ld = round_up(width, kLanes<S>);
  for (std::int64_t o = 0; o < width; o += panel) {
    const int vecs = static_cast<int>(ceil_div(std::min(panel, width - o), kLanes<S>));
    for_row_blocks(rows, [&](std::int64_t r0, int count) {
      S* const to = total + r0 * ld + o;
      block_kernel_for<S>(count, vecs)(tokens, Rows<S>{a + r0, 1, lda}, x + o, ldx,
                                       begin ? nullptr : to, ld, to, ld);
    });
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
