// SPDX-License-Identifier: Apache-2.0
// Products with the blocks of a block-diagonal matrix: rows of A, read in place, times W of one
// block. Each element is one chain of additions: tiles and threads change no bit. For files under
// structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include <algorithm>
#include <type_traits>

#include "bfloat16_pairs_simd.h"
#include "few_rows_simd.h"
#include "parallel.h"
#include "scratch.h"
#include "structmat/matrix.h"
#include "vec.h"

namespace structmat {
namespace {

#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockVecs = 4;  // 24 sums, 4 vectors of W, 1 of A in 32 registers
#elif defined(__AVX2__)
constexpr int kBlockRows = 6, kBlockVecs = 2;
#else
constexpr int kBlockRows = 4, kBlockVecs = 2;
#endif

// A (rows, depth): number (r, p) at data[r * row_stride + p * step].
template <class S>
struct Rows {
  const S* data;
  std::int64_t row_stride, step;
};

// c (kRows, kVecs vectors) = A W + add, vector v of row p of W at w[p * w_stride + v * lanes];
// add_stride 0 repeats one row (the bias). kPairs: the numbers of A and W are words.
template <class S, bool kPairs, int kRows, int kVecs>
void block_kernel(std::int64_t depth, const Rows<S>& a, const S* w, std::int64_t w_stride,
                  const S* add, std::int64_t add_stride, S* c, std::int64_t c_stride) {
  constexpr int lanes = kLanes<S>;
  const std::int64_t row = a.row_stride, step = a.step;
  const S *a0 = a.data, *a4 = a.data + 4 * row;  // rows are 0, 1, 2, 3 strides from one of them
  Vec<S> sum[kRows][kVecs] = {};
  for (std::int64_t p = 0; p < depth; ++p) {
    Vec<S> weight[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) weight[v] = load(w + v * lanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      // Named: gcc 12 with -fsanitize=undefined reads (r < 4 ? a0 : a4)[0] from elsewhere.
      const S* const base = r < 4 ? a0 : a4;
      const Vec<S> value = broadcast_word<kPairs>(base[(r % 4) * row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = multiply_add<kPairs>(value, weight[v], sum[r][v]);
    }
    a0 += step, a4 += step, w += w_stride;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) {
      const Vec<S> total =
          add != nullptr ? sum[r][v] + load(add + r * add_stride + v * lanes) : sum[r][v];
      store(c + r * c_stride + v * lanes, total);
    }
}

template <class S>
using BlockKernel = void (*)(std::int64_t, const Rows<S>&, const S*, std::int64_t, const S*,
                             std::int64_t, S*, std::int64_t);

template <class S, bool kPairs, int... kIndex>
BlockKernel<S> block_kernel_for(int rows, int vecs, std::integer_sequence<int, kIndex...>) {
  static constexpr BlockKernel<S> table[] = {
      block_kernel<S, kPairs, kIndex / kBlockVecs + 1, kIndex % kBlockVecs + 1>...};
  return table[(rows - 1) * kBlockVecs + vecs - 1];
}
template <class S, bool kPairs = false>
BlockKernel<S> block_kernel_for(int rows, int vecs) {
  return block_kernel_for<S, kPairs>(rows, vecs,
                                     std::make_integer_sequence<int, kBlockRows * kBlockVecs>());
}

// `size` numbers in an array, `inner` of them `inner_stride` apart, such runs `outer_stride` apart.
struct Axis {
  std::int64_t size, inner, outer_stride, inner_stride;

  static Axis of(std::int64_t size, std::int64_t stride) { return {size, size, 0, stride}; }
  static Axis of(const ConstArrayView& w, int outer, int inner) {
    return {w.sizes[outer] * w.sizes[inner], w.sizes[inner], w.strides[outer], w.strides[inner]};
  }
  std::int64_t at(std::int64_t i) const {
    if (i < inner) return i * inner_stride;
    return i / inner * outer_stride + i % inner * inner_stride;
  }
  bool regular() const {  // one stride does
    return size <= inner || inner == 1 || outer_stride == inner * inner_stride;
  }
  std::int64_t stride() const { return inner == 1 && size > 1 ? outer_stride : inner_stride; }
  bool contiguous() const { return regular() && (size <= 1 || stride() == 1); }
};

// The width of a panel of W: all panels of a block are nearly equal.
template <class S>
std::int64_t panel_width(std::int64_t width) {
  const std::int64_t vecs = ceil_div(width, kLanes<S>), panels = ceil_div(vecs, kBlockVecs);
  return ceil_div(vecs, std::max<std::int64_t>(panels, 1)) * kLanes<S>;
}

// W of one block as the kernels read it: number (p, o) at
// data[o / panel * panel_stride + p * row_stride + o % panel].
template <class S>
struct BlockPanels {
  const S* data;
  std::int64_t panel_stride, row_stride;
};

// For as many rows weights that lie along the sums are not packed.
constexpr std::int64_t kFewRows = 6;

// A factor: blocks of `depth` times `width` weights, number (p, o) of block b at
// data[block.at(b) + depth.at(p) + width.at(o)].
template <class S, class T>
struct Factor {
  static constexpr std::int64_t number_bytes = sizeof(S);
  const T* data;
  Axis block, depth, width;
  std::int64_t panel, panels, packed_size;  // of a block, in numbers
  bool in_place;
  const S* packed = nullptr;

  Factor(const void* data, Axis block, Axis depth, Axis width)
      : data(static_cast<const T*>(data)),
        block(block),
        depth(depth),
        width(width),
        panel(panel_width<S>(width.size)),
        panels(panel == 0 ? 0 : ceil_div(width.size, panel)),
        packed_size(panels * panel * depth.size),
        in_place(std::is_same_v<S, T> && width.contiguous() && width.size % kLanes<S> == 0 &&
                 depth.regular()) {}

  // Packs all blocks, for many tokens.
  void pack(const Context& context, Scratch& memory) {
    if (in_place) return;
    S* const to = memory.get<S>(block.size * packed_size);
    packed = to;
    const std::int64_t group =
        std::max<std::int64_t>((64 << 10) / std::max<std::int64_t>(packed_size, 1), 1);
    parallel_for(context, ceil_div(block.size, group), [&](std::int64_t task) {
      for (std::int64_t b = task * group; b < std::min(block.size, (task + 1) * group); ++b)
        pack_block(b, to + b * packed_size);
    });
  }

  // Blocks [b0, b1): in place, packed before, or packed now into `memory`; few rows are multiplied
  // by weights as they lie.
  struct Ready {
    const Factor& f;
    const S* data;
    std::int64_t b0;
    bool dots;
    BlockPanels<S> operator()(std::int64_t b) const {
      if constexpr (std::is_same_v<S, T>)
        if (f.in_place) return {f.data + f.block.at(b), f.panel, f.depth.stride()};
      return {data + (b - b0) * f.packed_size, f.panel * f.depth.size, f.panel};
    }
  };
  Ready ready(std::int64_t b0, std::int64_t b1, std::int64_t rows, Scratch& memory) const {
    if (in_place || packed != nullptr) return {*this, packed, 0, false};
    if (rows <= kFewRows && depth.contiguous() && width.regular()) return {*this, nullptr, 0, true};
    S* const to = memory.get<S>((b1 - b0) * packed_size);
    for (std::int64_t b = b0; b < b1; ++b) pack_block(b, to + (b - b0) * packed_size);
    return {*this, to, b0, false};
  }

  // Whether few rows are multiplied by weights as they lie, or by a widened copy of whole lines.
  bool reads_few(std::int64_t step) const {
    return width.contiguous() || (step == 1 && depth.contiguous() && width.regular());
  }

  // Fetches the weights of block b, where they lie together: short rows are no stream that the
  // machine would follow.
  void fetch(std::int64_t b) const {
    const std::int64_t size = depth.size * width.size;
    if (b >= block.size || block.stride() != size || (!depth.contiguous() && !width.contiguous()))
      return;
    const char* const from = reinterpret_cast<const char*>(data + block.at(b));
    for (std::int64_t at = 0; at < size * static_cast<std::int64_t>(sizeof(T)); at += 64)
      __builtin_prefetch(from + at);
  }

  void pack_block(std::int64_t b, S* to) const {
    constexpr int w = kLanes<S>;
    fetch(b + 1);
    const T* const from = data + block.at(b);
    for (std::int64_t o0 = 0; o0 < width.size; o0 += panel, to += panel * depth.size) {
      const std::int64_t cols = std::min(panel, width.size - o0);
      if (width.contiguous()) {
        for (std::int64_t p = 0; p < depth.size; ++p) {
          convert(from + depth.at(p) + o0, to + p * panel, cols);
          std::fill(to + p * panel + cols, to + (p + 1) * panel, S{0});
        }
        continue;
      }
      for (std::int64_t half = 0; half < panel; half += w) {
        const std::int64_t lanes = std::clamp<std::int64_t>(cols - half, 0, w);
        const T* line[w];
        for (int i = 0; i < w; ++i)
          line[i] = from + width.at(std::min(o0 + half + i, width.size - 1));
        std::int64_t p = 0;
        if (depth.contiguous())
          for (; p + w <= depth.size; p += w) {
            Vec<S> square[w];
            for (int i = 0; i < w; ++i)
              square[i] = i < lanes ? load_wide<S>(line[i] + p) : Vec<S>{};
            transpose<S>(square);
            for (int i = 0; i < w; ++i) store(to + (p + i) * panel + half, square[i]);
          }
        for (; p < depth.size; ++p) {
          const std::int64_t at = depth.at(p);
          for (int i = 0; i < w; ++i) {
            S value{0};
            if (i < lanes) convert(line[i] + at, &value, 1);
            to[p * panel + half + i] = value;
          }
        }
      }
    }
  }
};

// Block b's numbers of a row: number p at base(b) + p * step.
struct Columns {
  std::int64_t inner, outer_step, inner_step, step;
  std::int64_t base(std::int64_t b) const {
    return b / inner * outer_step + b % inner * inner_step;
  }
};

// Rows of a times block b, to `c`, whose rows are ldc apart. `room`: c may be written up to whole
// vectors; `add` (width in whole vectors, or none) is one row.
template <class S, class T>
void multiply_rows(const typename Factor<S, T>::Ready& ready, std::int64_t b, const Rows<S>& a,
                   int rows, const S* add, S* c, std::int64_t ldc, bool room) {
  const Factor<S, T>& f = ready.f;
  if (ready.dots && a.step == 1) {
    f.fetch(b + 1);
    return few_rows_range<S, T, S>(rows, f.depth.size, a.data, a.row_stride, f.data + f.block.at(b),
                                   f.width.stride(), add, c, ldc, 0, f.width.size);
  }
  const BlockPanels<S> w = ready(b);
  constexpr int lanes = kLanes<S>;
  alignas(64) S edge[kBlockRows * kBlockVecs * lanes];
  for (std::int64_t q = 0; q < f.panels; ++q) {
    const std::int64_t o = q * f.panel, live = std::min(f.panel, f.width.size - o);
    const int vecs = static_cast<int>(ceil_div(live, lanes));
    const BlockKernel<S> kernel = block_kernel_for<S>(rows, vecs);
    const S* const panel = w.data + q * w.panel_stride;
    const S* const more = add != nullptr ? add + o : nullptr;
    if (room || live == vecs * lanes) {
      kernel(f.depth.size, a, panel, w.row_stride, more, 0, c + o, ldc);
    } else {
      kernel(f.depth.size, a, panel, w.row_stride, more, 0, edge, vecs * lanes);
      for (int r = 0; r < rows; ++r) std::copy_n(edge + r * vecs * lanes, live, c + r * ldc + o);
    }
  }
}

// Fetches what the next block of rows is multiplied by: 0.9 of the time where a comes from
// memory.
template <class S>
void fetch_ahead(const Rows<S>& a, int rows, std::int64_t depth) {
  if (a.step != 1) return;
  for (int r = 0; r < rows; ++r)
    for (std::int64_t p = 0; p < depth; p += 64 / static_cast<int>(sizeof(S)))
      __builtin_prefetch(a.data + (rows + r) * a.row_stride + p);
}

// Columns of rows that will be read or (kWrite) written next: their lines are fetched into the
// level-2 cache part by part while a product runs. Short runs of many rows are no stream that the
// machine would follow: 0.8 of the time at 64 columns a block.
template <bool kWrite>
struct Ahead {
  const char* data = nullptr;
  std::int64_t stride = 0, rows = 0, lines = 0, row = 0, line = 0;

  template <class T>
  static Ahead of(const T* data, std::int64_t stride, std::int64_t rows, std::int64_t count) {
    constexpr std::int64_t size = sizeof(T);
    return {reinterpret_cast<const char*>(data), stride * size, rows, ceil_div(count * size, 64)};
  }
  // One of `parts` shares.
  void fetch(std::int64_t parts) {
    for (std::int64_t left = ceil_div(rows * lines, parts); left > 0 && row < rows; --left) {
      __builtin_prefetch(data + row * stride + line * 64, kWrite ? 1 : 0, 2);
      if (++line == lines) line = 0, ++row;
    }
  }
};

// body(r0, count) for rows [0, rows) in blocks of nearly equal size, at most kBlockRows
template <class Body>
void for_row_blocks(std::int64_t rows, Body&& body) {
  const std::int64_t blocks = ceil_div(rows, kBlockRows);
  for (std::int64_t i = 0; i < blocks; ++i) {
    const std::int64_t r0 = rows * i / blocks;
    body(r0, static_cast<int>(rows * (i + 1) / blocks - r0));
  }
}

}  // namespace
}  // namespace structmat
