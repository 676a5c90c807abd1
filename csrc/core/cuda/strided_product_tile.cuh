// SPDX-License-Identifier: Apache-2.0
// What the kernels of strided_product.cu share: which tile a block computes, tables of addresses,
// and the sum of parts.
#pragma once
#include <type_traits>

#include "cuda/activate.h"
#include "cuda/strided_product.h"
#include "half.h"
#include "structmat/error.h"

namespace structmat::cuda {

template <class T, class Sum>
__device__ T rounded(Sum value) {
  if constexpr (sizeof(T) == sizeof(Sum))
    return value;
  else
    return from_float<T>(value);
}

// The tile of a block. Columns run fastest, then batches: blocks that run together share rows of A
// and all of B, which stays in the L2 cache.
struct Tile {
  std::int64_t batch, row, col, begin, split;
  int height, width;   // of the part that lies in C
  std::int64_t inner;  // terms of the sum, from `begin` on
};
template <int kRows, int kCols>
__device__ Tile tile_of_block(const StridedProduct& p, std::int64_t group) {
  const auto count = [](std::int64_t n, std::int64_t tile) {  // of fewer than 2^31 tiles in all
    return static_cast<unsigned>(ceil_div(n, tile));
  };
  const unsigned cols = count(p.cols, kCols), batches = count(p.batches, group),
                 rows = count(p.rows, kRows), i = blockIdx.x / cols;
  Tile tile;
  tile.col = std::int64_t{blockIdx.x % cols} * kCols;
  tile.batch = i % batches * group;
  tile.row = std::int64_t{i / batches % rows} * kRows;
  tile.split = i / batches / rows;
  tile.height = p.rows - tile.row < kRows ? static_cast<int>(p.rows - tile.row) : kRows;
  tile.width = p.cols - tile.col < kCols ? static_cast<int>(p.cols - tile.col) : kCols;
  tile.begin = tile.split * p.split_inner;
  const std::int64_t left = p.inner - tile.begin;
  tile.inner = p.splits > 1 && p.split_inner < left ? p.split_inner : left;
  return tile;
}
template <int kRows, int kCols>
dim3 grid_of(const StridedProduct& p, std::int64_t group) {
  const std::int64_t blocks =
      ceil_div(p.cols, kCols) * ceil_div(p.batches, group) * ceil_div(p.rows, kRows) * p.splits;
  STRUCTMAT_CHECK(blocks < std::int64_t{1} << 31,
                  "structmat: a product of more than 2^31 tiles, which no launch takes");
  return dim3(static_cast<unsigned>(blocks));
}

// Addresses of a tile's rows of A, rows of B (columns of the tile) and, for four steps, of its
// columns of both. Dividing here takes no time from the threads that copy.
template <int kRows, int kCols, int kDepth>
struct Addresses {
  std::int64_t a_row[kRows], b_row[kCols], a_inner[4][kDepth], b_inner[4][kDepth];

  __device__ void start(const StridedProduct& p, const Tile& tile, int thread, int threads) {
    for (int i = thread; i < kRows; i += threads) a_row[i] = p.a.row.at(tile.batch, tile.row + i);
    for (int i = thread; i < kCols; i += threads) b_row[i] = p.b.row.at(tile.batch, tile.col + i);
  }
  __device__ void step(const StridedProduct& p, const Tile& tile, std::int64_t number, int thread) {
    const std::int64_t i = tile.begin + number * kDepth + thread % kDepth;
    if (thread < kDepth)
      a_inner[number % 4][thread] = p.a.col.at(tile.batch, i);
    else if (thread < 2 * kDepth)
      b_inner[number % 4][thread - kDepth] = p.b.col.at(tile.batch, i);
  }
  // Those of C take the place of those of A and B.
  __device__ void finish(const StridedProduct& p, const Tile& tile, int thread, int threads) {
    for (int i = thread; i < kRows; i += threads) a_row[i] = p.c.row.at(tile.batch, tile.row + i);
    for (int i = thread; i < kCols; i += threads) b_row[i] = p.c.col.at(tile.batch, tile.col + i);
  }
};

template <class T>
__device__ const T* operand(const Operand& x, std::int64_t batch) {
  // An empty operand may lie nowhere.
  return x.data == nullptr ? nullptr : static_cast<const T*>(x.data) + x.batch.at(0, batch);
}

// ---- From the sums of a tile to C ---------------------------------------------------------------

template <class Sum, int kRows, int kCols>
struct alignas(16) SumTile {
  static constexpr int kWidth = kCols;
  Sum value[kRows][kCols + 8];
};

// f(row, column, sum) of each element of the tile. A thread keeps its column, thread % kWidth.
template <int kThreads, class Sums, class F>
__device__ void for_each_sum(const Tile& tile, Sums& sums, int thread, F f) {
  constexpr int kWidth = Sums::kWidth;
  static_assert(kThreads % kWidth == 0);
  const int c = thread % kWidth;
  if (c >= tile.width) return;
  SM_ROLLED
  for (int r = thread / kWidth; r < tile.height; r += kThreads / kWidth) f(r, c, sums.value[r][c]);
}

// sums <- act(sums + bias), in place; the block meets before and after.
template <class T, int kThreads, class Sums, class At>
__device__ void finish_sums(const StridedProduct& p, const Tile& tile, Sums& sums, const At& at,
                            int thread) {
  if (p.bias == nullptr && p.activation == Activation::none) return;
  const int c = thread % Sums::kWidth;
  accumulator_t<T> bias = 0;
  if (p.bias != nullptr && c < tile.width)
    bias = to_float((static_cast<const T*>(p.bias) + p.c.batch.at(0, tile.batch))[at.b_row[c]]);
  for_each_sum<kThreads>(tile, sums, thread, [&](int, int, accumulator_t<T>& sum) {
    sum = activated(sum + bias, p.activation);
  });
  __syncthreads();
}

template <class T, int kThreads, class Sums, class At>
__device__ void store_sums(const StridedProduct& p, const Tile& tile, const Sums& sums,
                           const At& at, int thread) {
  T* const c = const_cast<T*>(operand<T>(p.c, tile.batch)) + at.b_row[thread % Sums::kWidth];
  for_each_sum<kThreads>(tile, sums, thread, [&](int row, int, accumulator_t<T> sum) {
    c[at.a_row[row]] = rounded<T>(sum);
  });
}

// By 16 bytes: eight numbers of a 16-bit type lie side by side.
template <class T, int kThreads, class Sums, class At>
__device__ void store_packs(const StridedProduct& p, const Tile& tile, const Sums& sums,
                            const At& at, int thread) {
  struct alignas(16) Pack {
    T value[kPack];
  };
  T* const c = const_cast<T*>(operand<T>(p.c, tile.batch));
  constexpr int kPacks = Sums::kWidth / kPack;
  static_assert(kThreads % kPacks == 0 && sizeof(sums.value[0]) % 16 == 0);
  const int n = thread % kPacks * kPack;
  if (n >= tile.width) return;
  T* const column = c + at.b_row[n];
  SM_ROLLED
  for (int r = thread / kPacks; r < tile.height; r += kThreads / kPacks) {
    T* const to = column + at.a_row[r];
    if (n + kPack <= tile.width) {
      // Number by number the threads of a warp would meet in the same banks.
      const float4* const from = reinterpret_cast<const float4*>(&sums.value[r][n]);
      const float4 a = from[0], b = from[1];
      *reinterpret_cast<Pack*>(to) = {{rounded<T>(a.x), rounded<T>(a.y), rounded<T>(a.z),
                                       rounded<T>(a.w), rounded<T>(b.x), rounded<T>(b.y),
                                       rounded<T>(b.z), rounded<T>(b.w)}};
    } else {
      SM_ROLLED
      for (int e = 0; n + e < tile.width; ++e) to[e] = rounded<T>(sums.value[r][n + e]);
    }
  }
}

template <int kThreads, class Sums>
__device__ void store_part(const StridedProduct& p, const Tile& tile, const Sums& sums,
                           int thread) {
  using Sum = std::remove_cvref_t<decltype(sums.value[0][0])>;
  Sum* const part = static_cast<Sum*>(p.partial) +
                    (tile.split * p.batches + tile.batch) * p.rows * p.cols + tile.col;
  for_each_sum<kThreads>(tile, sums, thread, [&](int row, int col, Sum sum) {
    part[(tile.row + row) * p.cols + col] = sum;
  });
}

// C <- the sum of its parts, in order.
template <class T>
__global__ void __launch_bounds__(256) sum_parts_kernel(StridedProduct p) {
  using Sum = accumulator_t<T>;
  const std::int64_t size = p.rows * p.cols, count = p.batches * size;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  const Sum* part = static_cast<const Sum*>(p.partial) + i;
  Sum sum = 0;
  for (std::int64_t s = 0; s < p.splits; ++s) sum += part[s * count];
  const std::int64_t batch = i / size, row = i % size / p.cols, col = i % p.cols;
  T* c = const_cast<T*>(operand<T>(p.c, batch));
  c[p.c.row.at(batch, row) + p.c.col.at(batch, col)] = rounded<T>(sum);
}

}  // namespace structmat::cuda
