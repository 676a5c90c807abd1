// SPDX-License-Identifier: Apache-2.0
// C = op(A) op(B) + bias for layers: operands of any of the four types, sums in fp32 (fp64),
// results rounded once. Against one-thread OpenBLAS on the tall products of low-rank layers: 1.05
// to 1.3 times as fast, since A is read in place, the tail of a thin B costs half a panel and the
// bias starts the sum. Each element is one chain of additions in the order of k, whatever the
// tiling: threads change no bit. For files under structmat_simd_sources (everything is in an
// anonymous namespace).
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "parallel.h"
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
  bool c_transposed = false;  // element (i, j) of C at c[j * c_stride + i]; takes no bias
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

// Memory of a thread that grows and stays: a call allocates nothing once it has the size.
class Scratch {
 public:
  template <class S>
  S* get(std::int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(S) + 63) / 64 * 64 + 64;
    if (bytes > bytes_) {
      memory_.reset();
      memory_.reset(std::aligned_alloc(64, bytes));
      if (!memory_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return static_cast<S*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t bytes_ = 0;
};

// c (kRows, kVecs vectors) = init + a b, b packed; init_stride 0 repeats one row (the bias), no
// init is zero. a (i, p) is a[i * a_stride + p], or a[p * a_stride + i].
template <class S, int kRows, int kVecs, bool kTransposed>
void micro_kernel(std::int64_t k, const S* a, std::int64_t a_stride, const S* b, const S* init,
                  std::int64_t init_stride, S* c, std::int64_t c_stride) {
  constexpr int w = kLanes<S>;
  Vec<S> sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j)
      sum[i][j] = init != nullptr ? load(init + i * init_stride + j * w) : Vec<S>{};
  // Rows are addressed from every fourth one by 0, 1, 2, 3 strides, which fit the machine's
  // addressing.
  const std::int64_t step = kTransposed ? 1 : a_stride;
  const S *a0 = a, *a4 = a + 4 * step, *a8 = a + 8 * step;
  const std::int64_t advance = kTransposed ? a_stride : 1;
  for (std::int64_t p = 0; p < k; ++p) {
    Vec<S> row[kVecs];
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) row[j] = load(b + j * w);
    b += kPanel<S>;
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const S* base = i < 4 ? a0 : i < 8 ? a4 : a8;
      const Vec<S> value = broadcast(base[(i % 4) * step]);
#pragma GCC unroll 2
      for (int j = 0; j < kVecs; ++j) sum[i][j] = fma(value, row[j], sum[i][j]);
    }
    a0 += advance, a4 += advance, a8 += advance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVecs; ++j) store(c + i * c_stride + j * w, sum[i][j]);
}

template <class S>
using MicroKernel = void (*)(std::int64_t, const S*, std::int64_t, const S*, const S*, std::int64_t,
                             S*, std::int64_t);

template <class S, int kVecs, bool kTransposed, int... kRows>
MicroKernel<S> micro_kernel_for(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr MicroKernel<S> table[] = {micro_kernel<S, kRows + 1, kVecs, kTransposed>...};
  return table[rows - 1];
}
template <class S>
MicroKernel<S> micro_kernel_for(int rows, int vecs, bool transposed) {
  constexpr auto all = std::make_integer_sequence<int, kMicroRows>();
  if (vecs == 1)
    return transposed ? micro_kernel_for<S, 1, true>(rows, all)
                      : micro_kernel_for<S, 1, false>(rows, all);
  return transposed ? micro_kernel_for<S, 2, true>(rows, all)
                    : micro_kernel_for<S, 2, false>(rows, all);
}

// Columns [j0, j0 + cols) and rows [k0, k0 + depth) of B as panels (depth, kPanel), zeros beyond
// `cols`.
template <class S, class T>
void pack(const Operand<T>& b, std::int64_t k0, std::int64_t depth, std::int64_t j0,
          std::int64_t cols, S* to) {
  constexpr int width = kPanel<S>, w = kLanes<S>;
  for (std::int64_t j = 0; j < cols; j += width, to += depth * width) {
    const std::int64_t left = std::min<std::int64_t>(width, cols - j);
    if (!b.transposed) {
      const T* from = b.data + k0 * b.stride + j0 + j;
      if (left == width) {
        for (std::int64_t p = 0; p < depth; ++p)
#pragma GCC unroll 2
          for (int half = 0; half < width; half += w)
            store(to + p * width + half, load_wide<S>(from + p * b.stride + half));
        continue;
      }
      for (std::int64_t p = 0; p < depth; ++p) {
        convert(from + p * b.stride, to + p * width, left);
        std::fill(to + p * width + left, to + (p + 1) * width, S{0});
      }
      continue;
    }
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

// Rows [i0, i0 + rows) of A over [k0, k0 + depth), as the micro-kernel takes them. 16-bit rows are
// widened into `buffer`; a transposed A is gathered there: rows of 2^k bytes would all lie in one
// set of the caches.
template <class S, class T>
Operand<S> strip(const Operand<T>& a, std::int64_t i0, int rows, std::int64_t k0,
                 std::int64_t depth, S* buffer) {
  if (a.transposed) {
    const T* from = a.data + k0 * a.stride + i0;
    const auto gather = [&](auto count) {
      for (std::int64_t p = 0; p < depth; ++p)
        for (int i = 0; i < count; ++i)
          buffer[p * kMicroRows + i] = widened<S>(from[p * a.stride + i]);
    };
    // Blocks of rows have one of these two sizes, nearly always; a known size makes vectors.
    if (rows == kMicroRows)
      gather(std::integral_constant<int, kMicroRows>());
    else if (rows == kMicroRows - 1)
      gather(std::integral_constant<int, kMicroRows - 1>());
    else
      gather(rows);
    return {buffer, kMicroRows, true};
  }
  const T* from = a.data + i0 * a.stride + k0;
  if constexpr (std::is_same_v<S, T>) {
    return {from, a.stride, false};
  } else {
    constexpr std::int64_t stride = kSlab + kLanes<S>;
    for (int i = 0; i < rows; ++i) convert(from + i * a.stride, buffer + i * stride, depth);
    return {buffer, stride, false};
  }
}

// c[j * c_stride + i] = tile[i * kPanel + j] for `cols` columns.
template <class S, class TC>
void store_transposed(const S* tile, int rows, std::int64_t cols, TC* c, std::int64_t c_stride) {
  constexpr int w = kLanes<S>;
  for (std::int64_t j = 0; j < cols; j += w)
    for (int i = 0; i < rows; i += w) {
      Vec<S> square[w];
      for (int s = 0; s < w; ++s)
        square[s] = i + s < rows ? load(tile + (i + s) * kPanel<S> + j) : Vec<S>{};
      transpose<S>(square);
      const int live = std::min(w, rows - i);
      for (std::int64_t q = j; q < std::min(j + w, cols); ++q) {
        S line[w];
        store(line, square[q - j]);
        convert(line, c + q * c_stride + i, live);
      }
    }
}

// Rows [i0, i1) and columns [j0, j1) of C.
template <class TA, class TB, class TC>
void multiply_range(const Product<TA, TB, TC>& g, std::int64_t i0, std::int64_t i1, std::int64_t j0,
                    std::int64_t j1) {
  using S = accumulator_t<TC>;
  constexpr int width = kPanel<S>;
  static thread_local Scratch packed_memory, strip_memory, sum_memory;
  const bool direct = std::is_same_v<S, TC> && !g.c_transposed;
  const std::int64_t tile = std::min(kColumnTile<S>, ceil_div(j1 - j0, width) * width);
  S* const packed = packed_memory.get<S>(std::min(kSlab, g.k) * tile);
  S* const strips = strip_memory.get<S>(kMicroRows * (kSlab + kLanes<S>));
  // Sums between slabs: in C itself, or here.
  S* const sums = direct || g.k <= kSlab ? nullptr : sum_memory.get<S>((i1 - i0) * tile);
  alignas(64) S edge[kMicroRows * width] = {};
  alignas(64) S bias[kColumnTile<S>];

  for (std::int64_t j = j0; j < j1; j += tile) {
    const std::int64_t cols = std::min(tile, j1 - j);
    if (g.bias != nullptr) convert(g.bias + j, bias, cols);
    for (std::int64_t k0 = 0; k0 < g.k || k0 == 0; k0 += kSlab) {
      const std::int64_t depth = std::min(kSlab, g.k - k0);
      const bool first = k0 == 0, last = k0 + kSlab >= g.k;
      pack(g.b, k0, depth, j, cols, packed);
      // Blocks of nearly equal numbers of rows: no thin one at the end.
      const std::int64_t blocks = ceil_div(i1 - i0, kMicroRows);
      for (std::int64_t block = 0; block < blocks; ++block) {
        const std::int64_t i = i0 + (i1 - i0) * block / blocks;
        const int rows = static_cast<int>(i0 + (i1 - i0) * (block + 1) / blocks - i);
        const Operand<S> a = strip<S>(g.a, i, rows, k0, depth, strips);
        for (std::int64_t q = 0; q < cols; q += width) {
          const std::int64_t live = std::min<std::int64_t>(width, cols - q);
          const int vecs = live > kLanes<S> ? 2 : 1;
          const MicroKernel<S> kernel = micro_kernel_for<S>(rows, vecs, a.transposed);
          const S* b = packed + q * depth;
          S* between = direct ? reinterpret_cast<S*>(g.c + i * g.c_stride + j + q)
                              : sums + (i - i0) * tile + q;
          const std::int64_t between_stride = direct ? g.c_stride : tile;
          const S* init = !first ? between : g.bias != nullptr ? bias + q : nullptr;
          const std::int64_t init_stride = first ? 0 : between_stride;
          if (direct ? live == vecs * kLanes<S> : !last) {  // `sums` has room for whole panels
            kernel(depth, a.data, a.stride, b, init, init_stride, between, between_stride);
            continue;
          }
          if (init != nullptr && direct) {
            for (int s = 0; s < rows; ++s) convert(init + s * init_stride, edge + s * width, live);
            kernel(depth, a.data, a.stride, b, edge, width, edge, width);
          } else {
            kernel(depth, a.data, a.stride, b, init, init_stride, edge, width);
          }
          if (direct && !last)
            for (int s = 0; s < rows; ++s)
              convert(edge + s * width, between + s * between_stride, live);
          else if (g.c_transposed)
            store_transposed(edge, rows, live, g.c + (j + q) * g.c_stride + i, g.c_stride);
          else
            for (int s = 0; s < rows; ++s)
              convert(edge + s * width, g.c + (i + s) * g.c_stride + j + q, live);
        }
      }
    }
  }
}

// How a product is cut into tasks. Columns first: every task packs its part of B.
struct Grid {
  std::int64_t row_step, col_step, row_tasks, col_tasks;
};
template <class S>
Grid grid_of(std::int64_t m, std::int64_t n, std::int64_t k, int threads) {
  constexpr std::int64_t width = kPanel<S>;
  const std::int64_t panels = ceil_div(n, width);
  const bool small = m * n * std::max<std::int64_t>(k, 1) < (1 << 18);  // 3 us of one core
  const std::int64_t wanted = small ? 1 : threads;
  const std::int64_t cols = std::clamp<std::int64_t>(panels / 4, 1, wanted);
  const std::int64_t rows = std::max(ceil_div(wanted, cols), ceil_div(m, kRowTile));
  Grid g;
  g.col_step = ceil_div(panels, cols) * width;
  g.row_step = ceil_div(ceil_div(m, rows), kMicroRows) * kMicroRows;
  g.col_tasks = ceil_div(n, g.col_step);
  g.row_tasks = ceil_div(m, g.row_step);
  return g;
}

template <class TA, class TB, class TC>
void multiply(const Context& context, const Product<TA, TB, TC>& g) {
  if (g.m == 0 || g.n == 0) return;
  const Grid grid = grid_of<accumulator_t<TC>>(g.m, g.n, g.k, thread_count(context));
  parallel_for(context, grid.row_tasks * grid.col_tasks, [&](std::int64_t task) {
    const std::int64_t i = task / grid.col_tasks * grid.row_step;
    const std::int64_t j = task % grid.col_tasks * grid.col_step;
    multiply_range(g, i, std::min(g.m, i + grid.row_step), j, std::min(g.n, j + grid.col_step));
  });
}

}  // namespace
}  // namespace structmat
