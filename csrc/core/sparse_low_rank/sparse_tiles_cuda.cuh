// SPDX-License-Identifier: Apache-2.0
// Dense products whose tiles meet a support: values = (dy^T x) on it, which reads the tile's
// entries only, and W = U V + S + base, which adds them before the one rounding.
#pragma once
#include "cuda/strided_product_mma.cuh"
#include "cuda/strided_product_simt.cuh"
#include "sparse_low_rank/sparse_product_cuda.cuh"
#include "structmat/sparse_low_rank.h"

namespace structmat::sparse_low_rank {

using cuda::StridedProduct;

// Sums of a tile of C = A B^T in shared memory, by tensor cores or by plain arithmetic.
template <class T, class S, cuda::Way kWayA, cuda::Way kWayB, bool kTall>
struct MmaEngine {
  using Shared = cuda::MmaTile<T, S, kWayA, kWayB, kTall>;
  static constexpr int kThreads = S::kThreads, kRows = S::kRows, kCols = S::kCols;
  static constexpr int kBlocks = 512 / kThreads;
  __device__ static void multiply(const StridedProduct& p, const cuda::Tile& tile, Shared& shared,
                                  int thread) {
    cuda::WarpSums<S> sum = {};
    cuda::add_product<T, S, kWayA, kWayB, kTall>(p, tile, shared, sum, thread);
    shared.at.finish(p, tile, thread, kThreads);
    cuda::share_sums<S>(sum, shared.sums, thread);
    __syncthreads();
  }
};
template <class T>
struct SimtEngine {
  static constexpr int kTall = cuda::kSimtTall<T>;
  using Shared = cuda::SimtTile<T, kTall>;
  static constexpr int kThreads = Shared::kThreads, kRows = Shared::kRows, kCols = Shared::kCols;
  static constexpr int kBlocks = 4;
  __device__ static void multiply(const StridedProduct& p, const cuda::Tile& tile, Shared& shared,
                                  int thread) {
    T sum[kTall][4] = {};
    cuda::add_product(p, tile, shared, sum, thread);
    shared.at.finish(p, tile, thread, kThreads);
    cuda::share_sums(sum, shared.sums, thread);
    __syncthreads();
  }
};

// The entries of a tile, row by row. A tile lies in one slab.
template <int kRows, int kCols>
struct Entries {
  static_assert(sparse_slab_columns % kCols == 0);
  int from[kRows], to[kRows], shift[kRows];

  __device__ void find(const SparsePatternView& pattern, const cuda::Tile& tile, int thread,
                       int threads) {
    for (int r = thread; r < tile.height; r += threads) {
      const RowOfPattern row(pattern, tile.row + r);
      const std::int64_t* const slab = pattern.starts + row.starts + tile.col / sparse_slab_columns;
      const int begin = static_cast<int>(tile.col % sparse_slab_columns);
      const int last = static_cast<int>(slab[1]);
      from[r] = first_entry_from(pattern.columns, static_cast<int>(slab[0]), last, begin);
      to[r] = first_entry_from(pattern.columns, from[r], last, begin + kCols);
      shift[r] = row.shift;
    }
  }
  // f(row, column, index of the value), eight threads to a row.
  template <class F>
  __device__ void each(const SparsePatternView& pattern, const cuda::Tile& tile, int thread,
                       int threads, F f) const {
    const int begin = static_cast<int>(tile.col % sparse_slab_columns);
    SM_ROLLED
    for (int r = thread / 8; r < tile.height; r += threads / 8) {
      SM_ROLLED
      for (int entry = from[r] + thread % 8; entry < to[r]; entry += 8)
        f(r, static_cast<int>(pattern.columns[entry]) - begin, entry + shift[r]);
    }
  }
};

template <class Engine>
struct EntryTile {
  typename Engine::Shared product;
  Entries<Engine::kRows, Engine::kCols> entries;
};

// p: A = dy^T, B = x^T, a sum over tokens; `out` is of T, or of the type of sums where p.splits
// > 1.
template <class T, class Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    sampled_kernel(StridedProduct p, SparsePatternView pattern, void* out) {
  using Sum = accumulator_t<T>;
  constexpr int kThreads = Engine::kThreads;
  SM_DYNAMIC_SHARED(EntryTile<Engine>, shared);
  const int thread = threadIdx.x;
  const cuda::Tile tile = cuda::tile_of_block<Engine::kRows, Engine::kCols>(p, 1);
  shared->entries.find(pattern, tile, thread, kThreads);
  Engine::multiply(p, tile, shared->product, thread);
  const auto& sums = shared->product.sums;
  if (p.splits > 1) {
    Sum* const part = static_cast<Sum*>(out) + tile.split * pattern.nnz;
    shared->entries.each(pattern, tile, thread, kThreads,
                         [&](int r, int c, int value) { part[value] = sums.value[r][c]; });
  } else {
    T* const values = static_cast<T*>(out);
    shared->entries.each(pattern, tile, thread, kThreads, [&](int r, int c, int value) {
      values[value] = cuda::rounded<T>(sums.value[r][c]);
    });
  }
}

// values[e] = sum of its parts, in order
template <class T>
__global__ void __launch_bounds__(256)
    add_parts_kernel(const accumulator_t<T>* parts, std::int64_t splits, std::int64_t nnz,
                     T* values) {
  const std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (e >= nnz) return;
  accumulator_t<T> sum = 0;
  for (std::int64_t s = 0; s < splits; ++s) sum += parts[s * nnz + e];
  values[e] = cuda::rounded<T>(sum);
}

template <class T>
void add_parts(const Context& context, const SampledSpace& space, std::int64_t nnz, void* values) {
  SM_LAUNCH(add_parts_kernel<T>, static_cast<unsigned>(ceil_div(nnz, 256)), 256, 0, context.stream,
            static_cast<const accumulator_t<T>*>(space.partial), space.splits, nnz,
            static_cast<T*>(values));
}

// p: A = U, B = V^T, C = W.
template <class T, class Engine>
__global__ void __launch_bounds__(Engine::kThreads, Engine::kBlocks)
    dense_weight_kernel(StridedProduct p, SparsePatternView pattern, const void* values,
                        ConstMatrixView base) {
  using Sum = accumulator_t<T>;
  constexpr int kThreads = Engine::kThreads;
  SM_DYNAMIC_SHARED(EntryTile<Engine>, shared);
  const int thread = threadIdx.x;
  const cuda::Tile tile = cuda::tile_of_block<Engine::kRows, Engine::kCols>(p, 1);
  shared->entries.find(pattern, tile, thread, kThreads);
  Engine::multiply(p, tile, shared->product, thread);
  auto& sums = shared->product.sums;
  const T* const from = static_cast<const T*>(values);
  shared->entries.each(pattern, tile, thread, kThreads,
                       [&](int r, int c, int value) { sums.value[r][c] += to_float(from[value]); });
  __syncthreads();
  if (base.data != nullptr) {
    const T* const corner =
        static_cast<const T*>(base.data) + tile.row * base.row_stride + tile.col;
    cuda::for_each_sum<kThreads>(tile, sums, thread, [&](int r, int c, Sum& sum) {
      sum += to_float(corner[r * base.row_stride + c]);
    });
    __syncthreads();
  }
  if constexpr (sizeof(T) == 2)
    cuda::store_packs<T, kThreads>(p, tile, sums, shared->product.at, thread);
  else
    cuda::store_sums<T, kThreads>(p, tile, sums, shared->product.at, thread);
}

template <class T, class Engine>
void launch_sampled(const Context& context, const StridedProduct& p,
                    const SparsePatternView& pattern, void* out) {
  SM_ALLOW_SHARED((sampled_kernel<T, Engine>));
  SM_LAUNCH((sampled_kernel<T, Engine>), (cuda::grid_of<Engine::kRows, Engine::kCols>(p, 1)),
            Engine::kThreads, sizeof(EntryTile<Engine>), context.stream, p, pattern, out);
}

// values = (dy^T x) on the support, or its parts
template <class T>
void sample_tiles(const Context& context, const ConstMatrixView& dy, const ConstMatrixView& x,
                  const SparsePatternView& pattern, const SampledSpace& space, void* values) {
  using cuda::Axis;
  StridedProduct p;
  p.dtype = dy.dtype, p.batches = 1, p.rows = pattern.rows, p.cols = pattern.cols;
  p.inner = dy.rows, p.tall = true;
  p.splits = space.splits, p.split_inner = space.split_inner;
  p.a = {dy.data, {}, Axis::linear(1), Axis::linear(dy.row_stride)};
  p.b = {x.data, {}, Axis::linear(1), Axis::linear(x.row_stride)};
  void* const out = p.splits > 1 ? space.partial : values;
  if constexpr (sizeof(T) == 2) {
    using Large = cuda::Shape<128, 128, 2, 4>;
    constexpr cuda::Way rows = cuda::Way::rows, numbers = cuda::Way::numbers;
    if (cuda::packs(p.a.data, p.a.row, p.a.col, p.a.batch) &&
        cuda::packs(p.b.data, p.b.row, p.b.col, p.b.batch))
      launch_sampled<T, MmaEngine<T, Large, rows, rows, true>>(context, p, pattern, out);
    else
      launch_sampled<T, MmaEngine<T, Large, numbers, numbers, true>>(context, p, pattern, out);
  } else {
    launch_sampled<T, SimtEngine<T>>(context, p, pattern, out);
  }
}

template <class T, class Engine>
void launch_weight(const Context& context, const StridedProduct& p,
                   const SparseLowRankWeights& weights) {
  SM_ALLOW_SHARED((dense_weight_kernel<T, Engine>));
  SM_LAUNCH((dense_weight_kernel<T, Engine>), (cuda::grid_of<Engine::kRows, Engine::kCols>(p, 1)),
            Engine::kThreads, sizeof(EntryTile<Engine>), context.stream, p, weights.pattern,
            weights.values.data, weights.base);
}

// W (m, n), whose rows begin at multiples of 8
template <class T>
void write_weight(const Context& context, const SparseLowRankWeights& weights, MatrixView w) {
  if (w.rows == 0 || w.cols == 0) return;
  using cuda::Axis;
  StridedProduct p;
  p.dtype = w.dtype, p.batches = 1, p.rows = w.rows, p.cols = w.cols, p.inner = weights.u.cols;
  p.a = {weights.u.data, {}, Axis::linear(weights.u.row_stride), Axis::linear(1)};
  p.b = {weights.v.data, {}, Axis::linear(1), Axis::linear(weights.v.row_stride)};
  p.c = {w.data, {}, Axis::linear(w.row_stride), Axis::linear(1)};
  if constexpr (sizeof(T) == 2) {
    using Large = cuda::Shape<128, 128, 2, 4>;
    constexpr cuda::Way rows = cuda::Way::rows, columns = cuda::Way::columns,
                        numbers = cuda::Way::numbers;
    if (cuda::packs(p.a.data, p.a.col, p.a.row, p.a.batch) &&
        cuda::packs(p.b.data, p.b.row, p.b.col, p.b.batch))
      launch_weight<T, MmaEngine<T, Large, columns, rows, false>>(context, p, weights);
    else
      launch_weight<T, MmaEngine<T, Large, numbers, numbers, false>>(context, p, weights);
  } else {
    launch_weight<T, SimtEngine<T>>(context, p, weights);
  }
}

}  // namespace structmat::sparse_low_rank
