// SPDX-License-Identifier: Apache-2.0
// C = op(A) op(B) + bias for layers: operands of any of the four types, sums in fp32 (fp64),
// results rounded once. Against one-thread OpenBLAS on the tall products of low-rank layers: 1.05
// to 1.3 times as fast, since A is read in place, the tail of a thin B costs half a panel and the
// bias starts the sum. Each element is one chain of additions in the order of k, whatever the
// tiling: threads change no bit. For files under structmat_simd_sources (everything is in an
// anonymous namespace).
#pragma once
#include <algorithm>
#include <utility>

#include "parallel.h"
#include "scratch.h"
#include "vec.h"

namespace structmat {
namespace {

// A (m, k): element (i, p) at data[i * stride + p], or data[p * stride + i] if transposed; B (k, n)
// likewise.
template <class T>
struct Operand {
  const T* data;
  std::int64_t stride;
  bool transposed;
};

template <class TA, class TB, class TC>
struct Product {
  std::int64_t m, n, k;
  Operand<TA> a;
  Operand<TB> b;
  TC* c;
  std::int64_t c_stride;
  const TC* bias = nullptr;
  bool c_transposed = false;  // element (i, j) of C at c[j * c_stride + i]; multiply: no bias then
};

#if defined(__AVX512F__)
constexpr int kMicroRows = 12;  // 24 sums, 2 vectors of B, 1 of A in 32 registers
#elif defined(__AVX2__)
constexpr int kMicroRows = 6;
#else
constexpr int kMicroRows = 4;
#endif
constexpr int kMicroVecs = 2;
template <class S>
constexpr int kPanel = kMicroVecs * kLanes<S>;  // columns of a packed panel of B
// A slab of k times a tile of columns of B, packed, is 1 MB: half of the level-2 cache.
constexpr std::int64_t kSlab = 1024;
template <class S>
constexpr std::int64_t kColumnTile =
    (std::int64_t{1} << 20) / (kSlab * static_cast<std::int64_t>(sizeof(S)));
constexpr std::int64_t kRowTile = 1024;
constexpr std::int64_t kRowsAhead = 32;  // of B are prefetched: 100 ns

// What a micro-kernel multiplies. a (i, p) is a[i * a_stride + p], or a[p * a_stride + i]; b is a
// packed panel. A kernel that packs reads the rows of B at `from` instead and copies them to b, so
// that B is fetched while sums are added: 0.9 of the time of a copy before for the gradients of 256
// tokens, 0.96 for 4096.
template <class S>
struct Panels {
  std::int64_t k;
  const S* a;
  std::int64_t a_stride;
  S* b;
  const S* from;
  std::int64_t from_stride;
};

// c (kRows, kVecs vectors) = init + a b; init_stride 0 repeats one row (the bias), no init is zero.
template <class S, int kRows, int kVecs, bool kTransposed, bool kPack>
void micro_kernel(const Panels<S>& g, const S* init, std::int64_t init_stride, S* c,
                  std::int64_t c_stride) {
  constexpr int w = kLanes<S>;
  const std::int64_t k = g.k, a_stride = g.a_stride, from_stride = g.from_stride;
  const S *a = g.a, *from = g.from;
  S* b = g.b;
  Vec<S> sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j)
      sum[i][j] = init != nullptr ? load(init + i * init_stride + j * w) : Vec<S>{};
  // Rows are addressed from every fourth one by 0, 1, 2, 3 strides, which fit the machine's
  // addressing.
  const std::int64_t step_a = kTransposed ? 1 : a_stride;
  const S *a0 = a, *a4 = a + 4 * step_a, *a8 = a + 8 * step_a;
  const std::int64_t advance = kTransposed ? a_stride : 1;
  const auto step = [&] {
    Vec<S> row[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) {
      if constexpr (kPack) {
        row[j] = load(from + j * w);
        store(b + j * w, row[j]);
        __builtin_prefetch(from + kRowsAhead * from_stride + j * w);
      } else {
        row[j] = load(b + j * w);
      }
    }
    b += kPanel<S>;
    if constexpr (kPack) from += from_stride;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const S* base = i < 4 ? a0 : i < 8 ? a4 : a8;
      const Vec<S> value = broadcast(base[(i % 4) * step_a]);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sum[i][j] = fma(value, row[j], sum[i][j]);
    }
    a0 += advance, a4 += advance, a8 += advance;
  };
  for (std::int64_t p = 0; p < k; ++p) step();
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) store(c + i * c_stride + j * w, sum[i][j]);
}

template <class S>
using MicroKernel = void (*)(const Panels<S>&, const S*, std::int64_t, S*, std::int64_t);

template <class S, int kVecs, bool kTransposed, bool kPack, int... kRows>
MicroKernel<S> micro_kernel_for(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr MicroKernel<S> table[] = {
      micro_kernel<S, kRows + 1, kVecs, kTransposed, kPack>...};
  return table[rows - 1];
}
template <class S, int kVecs>
MicroKernel<S> micro_kernel_for(int rows, bool transposed, bool pack) {
  constexpr auto all = std::make_integer_sequence<int, kMicroRows>();
  if (pack)
    return transposed ? micro_kernel_for<S, kVecs, true, true>(rows, all)
                      : micro_kernel_for<S, kVecs, false, true>(rows, all);
  return transposed ? micro_kernel_for<S, kVecs, true, false>(rows, all)
                    : micro_kernel_for<S, kVecs, false, false>(rows, all);
}
template <class S>
MicroKernel<S> micro_kernel_for(int rows, int vecs, bool transposed, bool pack) {
  return vecs == 1 ? micro_kernel_for<S, 1>(rows, transposed, pack)
                   : micro_kernel_for<S, 2>(rows, transposed, pack);
}

// Columns [j0, j0 + cols) and rows [k0, k0 + depth) of B as panels (depth, kPanel), zeros beyond
// `cols`.
template <class S, class T>
void pack(const Operand<T>& b, std::int64_t k0, std::int64_t depth, std::int64_t j0,
          std::int64_t cols, S* to) {
  constexpr int width = kPanel<S>, w = kLanes<S>;
  if (!b.transposed) {  // row by row, as memory is read fastest
    for (std::int64_t p = 0; p < depth; ++p) {
      const T* from = b.data + (k0 + p) * b.stride + j0;
      S* line = to + p * width;
      std::int64_t j = 0;
      for (; j + width <= cols; j += width, line += depth * width)
#pragma GCC unroll 2
        for (int half = 0; half < width; half += w)
          store(line + half, load_wide<S>(from + j + half));
      if (j < cols) {
        convert(from + j, line, cols - j);
        std::fill(line + (cols - j), line + width, S{0});
      }
    }
    return;
  }
  for (std::int64_t j = 0; j < cols; j += width, to += depth * width) {
    const std::int64_t left = std::min<std::int64_t>(width, cols - j);
    for (int half = 0; half < width; half += w) {  // squares of w rows of k-contiguous numbers
      const std::int64_t rows = std::clamp<std::int64_t>(left - half, 0, w);
      const T* from = b.data + (j0 + j + half) * b.stride + k0;
      std::int64_t p = 0;
      for (; p + w <= depth; p += w) {
        Vec<S> square[w];
        for (int i = 0; i < w; ++i)
          square[i] = i < rows ? load_wide<S>(from + i * b.stride + p) : Vec<S>{};
        transpose<S>(square);
        for (int i = 0; i < w; ++i) store(to + (p + i) * width + half, square[i]);
      }
      for (; p < depth; ++p)
        for (int i = 0; i < w; ++i) {
          S value{0};
          if (i < rows) convert(from + i * b.stride + p, &value, 1);
          to[p * width + half + i] = value;
        }
    }
  }
}

// Rows [i0, i1) of C are computed in blocks of nearly equal size, so that none is thin.
struct RowBlocks {
  std::int64_t i0, rows, count;
  RowBlocks(std::int64_t i0, std::int64_t i1)
      : i0(i0), rows(i1 - i0), count(ceil_div(i1 - i0, kMicroRows)) {}
  std::int64_t first(std::int64_t block) const { return rows * block / count; }  // from i0
};

// The rows of A over [k0, k0 + depth), as the micro-kernel takes them. fp32 and fp64 rows are read
// in place; 16-bit ones are widened; a transposed A is gathered block by block: read in place, rows
// 2^k bytes apart would share one set of the caches.
template <class S, class T>
class RowsOfA {
 public:
  RowsOfA(const Operand<T>& a, const RowBlocks& blocks, std::int64_t k0, std::int64_t depth,
          Scratch& memory)
      : transposed_(a.transposed) {
    if (a.transposed) {
      constexpr int w = kLanes<S>, vecs = ceil_div(kMicroRows, w);
      constexpr std::int64_t pad =
          16;  // vectors end beyond the block; the next ones overwrite that
      block_step_ = depth * kMicroRows + pad;
      stride_ = kMicroRows;
      S* const to = memory.get<S>(blocks.count * block_step_ + blocks.rows + pad);
      S* const row = to + blocks.count * block_step_;
      for (std::int64_t p = 0; p < depth; ++p) {
        convert(a.data + (k0 + p) * a.stride + blocks.i0, row, blocks.rows);
        for (std::int64_t block = 0; block < blocks.count; ++block)
          for (int v = 0; v < vecs; ++v)
            store(to + block * block_step_ + p * kMicroRows + v * w,
                  load(row + blocks.first(block) + v * w));
      }
      data_ = to;
    } else if constexpr (std::is_same_v<S, T>) {
      data_ = a.data + blocks.i0 * a.stride + k0;
      stride_ = a.stride;
    } else {
      stride_ = depth + kLanes<S>;
      S* const to = memory.get<S>(blocks.rows * stride_);
      for (std::int64_t i = 0; i < blocks.rows; ++i)
        convert(a.data + (blocks.i0 + i) * a.stride + k0, to + i * stride_, depth);
      data_ = to;
    }
  }
  const S* block(const RowBlocks& blocks, std::int64_t index) const {
    return data_ + (transposed_ ? index * block_step_ : blocks.first(index) * stride_);
  }
  std::int64_t stride() const { return stride_; }

 private:
  bool transposed_;
  std::int64_t stride_ = 0, block_step_ = 0;
  const S* data_ = nullptr;
};

// c[j * c_stride + i] = sums[i * stride + j]; `sums` has room for whole squares of vectors.
template <class S, class TC>
void store_transposed(const S* sums, std::int64_t stride, std::int64_t rows, std::int64_t cols,
                      TC* c, std::int64_t c_stride) {
  constexpr int w = kLanes<S>;
  for (std::int64_t j = 0; j < cols; j += w)
    for (std::int64_t i = 0; i < rows; i += w) {
      Vec<S> square[w];
      for (int s = 0; s < w; ++s) square[s] = load(sums + (i + s) * stride + j);
      transpose<S>(square);
      const int height = static_cast<int>(std::min<std::int64_t>(w, rows - i));
      const int width = static_cast<int>(std::min<std::int64_t>(w, cols - j));
      for (int q = 0; q < width; ++q) {
        TC* const to = c + (j + q) * c_stride + i;
        S line[w];
        store(line, square[q]);
        if (height == w)
          convert(line, to, w);
        else
          convert(line, to, height);
      }
    }
}

// Rows [i0, i1) and columns [j0, j1) of C.
template <class TA, class TB, class TC>
void multiply_range(const Product<TA, TB, TC>& g, std::int64_t i0, std::int64_t i1, std::int64_t j0,
                    std::int64_t j1) {
  using S = accumulator_t<TC>;
  constexpr int width = kPanel<S>, w = kLanes<S>;
  static thread_local Scratch packed_memory, rows_memory, sum_memory;
  const bool direct = std::is_same_v<S, TC> && !g.c_transposed;
  const bool in_place = std::is_same_v<S, TB> && !g.b.transposed;
  const RowBlocks blocks(i0, i1);
  const std::int64_t tile = std::min(kColumnTile<S>, ceil_div(j1 - j0, width) * width);
  S* const packed = packed_memory.get<S>(std::min(kSlab, g.k) * tile);
  // Sums between slabs, or to be transposed: in C itself, or here.
  const bool one_slab = g.k <= kSlab;
  const std::int64_t sum_stride = one_slab ? tile : ceil_div(j1 - j0, width) * width;
  const std::int64_t numbers = (i1 - i0 + w) * sum_stride;
  Scratch large;  // goes when the call ends
  S* const sums = direct || (one_slab && !g.c_transposed)
                      ? nullptr
                      : (numbers > (std::int64_t{4} << 20) ? large : sum_memory).get<S>(numbers);
  alignas(64) S edge[kMicroRows * width] = {};
  alignas(64) S bias[kColumnTile<S>];

  for (std::int64_t k0 = 0; k0 < g.k || k0 == 0; k0 += kSlab) {
    const std::int64_t depth = std::min(kSlab, g.k - k0);
    const bool first = k0 == 0, last = k0 + kSlab >= g.k;
    const RowsOfA<S, TA> a(g.a, blocks, k0, depth, rows_memory);
    for (std::int64_t j = j0; j < j1; j += tile) {
      const std::int64_t cols = std::min(tile, j1 - j);
      if (first && g.bias != nullptr) convert(g.bias + j, bias, cols);
      // Whole vectors of B's rows are packed by the kernels of the first block, the rest here.
      const std::int64_t by_kernels = in_place ? cols / w * w : 0,
                         left = by_kernels / width * width;
      if (by_kernels < cols) pack(g.b, k0, depth, j + left, cols - left, packed + left * depth);
      S* const tile_sums = sums == nullptr || one_slab ? sums : sums + (j - j0);
      for (std::int64_t block = 0; block < blocks.count; ++block) {
        const std::int64_t i = blocks.first(block);
        const int rows = static_cast<int>(blocks.first(block + 1) - i);
        const S* const a_rows = a.block(blocks, block);
        TC* const c = g.c + (i0 + i) * g.c_stride + j;  // unless transposed
        for (std::int64_t q = 0; q < cols; q += width) {
          const std::int64_t live = std::min<std::int64_t>(width, cols - q);
          const int vecs = live > kLanes<S> ? 2 : 1;
          Panels<S> panels{depth, a_rows, a.stride(), packed + q * depth, nullptr, 0};
          const bool packs = in_place && block == 0 && live == vecs * w;
          if constexpr (std::is_same_v<S, TB>) {
            panels.from = g.b.data + k0 * g.b.stride + j + q;
            panels.from_stride = g.b.stride;
          }
          const MicroKernel<S> kernel = micro_kernel_for<S>(rows, vecs, g.a.transposed, packs);
          S* between = direct ? reinterpret_cast<S*>(c + q) : tile_sums + i * sum_stride + q;
          const std::int64_t between_stride = direct ? g.c_stride : sum_stride;
          const S* init = !first ? between : g.bias != nullptr ? bias + q : nullptr;
          const std::int64_t init_stride = first ? 0 : between_stride;
          // `sums` has room for whole panels.
          if (direct ? live == vecs * kLanes<S> : !last || g.c_transposed) {
            kernel(panels, init, init_stride, between, between_stride);
            continue;
          }
          if (init != nullptr && direct) {
            for (int s = 0; s < rows; ++s) convert(init + s * init_stride, edge + s * width, live);
            kernel(panels, edge, width, edge, width);
          } else {
            kernel(panels, init, init_stride, edge, width);
          }
          if (direct && !last)
            for (int s = 0; s < rows; ++s)
              convert(edge + s * width, between + s * between_stride, live);
          else
            for (int s = 0; s < rows; ++s) convert(edge + s * width, c + s * g.c_stride + q, live);
        }
      }
      if (last && g.c_transposed)
        store_transposed(tile_sums, sum_stride, i1 - i0, cols, g.c + j * g.c_stride + i0,
                         g.c_stride);
    }
  }
}

// body(i0, i1, j0, j1) for each task of a product. Columns first: every task packs its part of B;
// but rows where more numbers of a transposed A are gathered than of B packed.
template <class TA, class TB, class TC, class Body>
void for_blocks(const Context& context, const Product<TA, TB, TC>& g, std::int64_t row_unit,
                std::int64_t col_unit, Body&& body) {
  if (g.m == 0 || g.n == 0) return;
  const bool small = g.m * g.n * std::max<std::int64_t>(g.k, 1) < (1 << 18);  // 3 us of one core
  const std::int64_t wanted = small ? 1 : thread_count(context);
  const bool by_rows = g.a.transposed && g.m >= std::max(g.n, wanted * 64);
  const std::int64_t cols =
      by_rows ? 1 : std::clamp<std::int64_t>(ceil_div(g.n, col_unit) / 4, 1, wanted);
  const std::int64_t rows = std::max(ceil_div(wanted, cols), ceil_div(g.m, kRowTile));
  const std::int64_t col_step = ceil_div(ceil_div(g.n, col_unit), cols) * col_unit;
  const std::int64_t row_step = ceil_div(ceil_div(g.m, rows), row_unit) * row_unit;
  const std::int64_t col_tasks = ceil_div(g.n, col_step), row_tasks = ceil_div(g.m, row_step);
  parallel_for(context, row_tasks * col_tasks, [&](std::int64_t task) {
    const std::int64_t i = task / col_tasks * row_step, j = task % col_tasks * col_step;
    body(i, std::min(g.m, i + row_step), j, std::min(g.n, j + col_step));
  });
}

template <class TA, class TB, class TC>
void multiply(const Context& context, const Product<TA, TB, TC>& g) {
  for_blocks(context, g, kMicroRows, kPanel<accumulator_t<TC>>,
             [&](auto... range) { multiply_range(g, range...); });
}

}  // namespace
}  // namespace structmat
