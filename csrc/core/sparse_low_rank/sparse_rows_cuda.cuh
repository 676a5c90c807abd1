// SPDX-License-Identifier: Apache-2.0
// Small passes around the products: gathered columns, permuted values, sums rounded once, and the
// NaN of tokens that are not finite.
#pragma once
#include "sparse_low_rank/sparse_product_cuda.cuh"

namespace structmat::sparse_low_rank {

constexpr int kRowThreads = 256;

// to[t] = [from[t, columns] | rest[t]], the first part filled up to k numbers with zeros; rest is
// left out where it has no data. Without a pattern the columns are the first `count`. A block per
// row.
struct Joined {
  ConstMatrixView from, rest;
  const std::int64_t* starts = nullptr;  // of the one group
  const std::uint16_t* columns = nullptr;
  std::int64_t count = 0, k = 0, slabs = 0;
  MatrixView to;
};

// The column that entry e of a pattern of one group has.
__device__ inline std::int64_t column_of(const std::int64_t* starts, const std::uint16_t* columns,
                                         std::int64_t slabs, std::int64_t e) {
  std::int64_t slab = 0;
  while (slab + 1 < slabs && e >= starts[slab + 1]) ++slab;
  return slab * sparse_slab_columns + columns[e];
}

template <class T>
__global__ void __launch_bounds__(kRowThreads) join_kernel(Joined p) {
  const std::int64_t t = blockIdx.x;
  T* const to = static_cast<T*>(p.to.data) + t * p.to.row_stride;
  const T* const from = static_cast<const T*>(p.from.data) + t * p.from.row_stride;
  for (std::int64_t e = threadIdx.x; e < p.k; e += kRowThreads)
    to[e] = e >= p.count           ? T{}
            : p.columns == nullptr ? from[e]
                                   : from[column_of(p.starts, p.columns, p.slabs, e)];
  if (p.rest.data == nullptr) return;
  const T* const rest = static_cast<const T*>(p.rest.data) + t * p.rest.row_stride;
  for (std::int64_t e = threadIdx.x; e < p.rest.cols; e += kRowThreads) to[p.k + e] = rest[e];
}

// to[e] = from[permutation[e]]
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    permute_kernel(const T* from, const std::int32_t* permutation, std::int64_t count, T* to) {
  const std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (e < count) to[e] = from[permutation[e]];
}

// y[t] = round(sums[t] + bias), after sums[t, columns] += added[t] for the columns of a pattern of
// one group. sums and added are of the type of sums; sums may be y. A block per token.
struct Rounded {
  void* sums = nullptr;
  std::int64_t sums_stride = 0;
  const void* added = nullptr;  // (T, count)
  std::int64_t count = 0;
  const std::int64_t* starts = nullptr;
  const std::uint16_t* columns = nullptr;
  std::int64_t slabs = 0;
  const void* bias = nullptr;
  MatrixView y;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) round_kernel(Rounded p) {
  using Sum = accumulator_t<T>;
  const std::int64_t t = blockIdx.x;
  Sum* const sums = static_cast<Sum*>(p.sums) + t * p.sums_stride;
  if (p.added != nullptr) {
    const Sum* const added = static_cast<const Sum*>(p.added) + t * p.count;
    for (std::int64_t e = threadIdx.x; e < p.count; e += kRowThreads)
      sums[column_of(p.starts, p.columns, p.slabs, e)] += added[e];
    __syncthreads();
  }
  T* const y = static_cast<T*>(p.y.data) + t * p.y.row_stride;
  if (static_cast<const void*>(y) == static_cast<const void*>(sums) && p.bias == nullptr) return;
  for (std::int64_t j = threadIdx.x; j < p.y.cols; j += kRowThreads) {
    Sum sum = sums[j];
    if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[j]);
    y[j] = cuda::rounded<T>(sum);
  }
}

// y[t] = NaN where x[t] is not finite. With `dense` y[t, 0] is a sum over all of x[t], and so
// finite only where x[t] is: then x is not read. A warp per token.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    spread_kernel(ConstMatrixView x, MatrixView y, bool dense) {
  const std::int64_t t =
      static_cast<std::int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (t >= x.rows) return;
  const int lane = threadIdx.x % 32;
  const T* const from = static_cast<const T*>(x.data) + t * x.row_stride;
  T* const to = static_cast<T*>(y.data) + t * y.row_stride;
  if (dense && finite(to_float(to[0]))) return;
  bool bad = false;
  for (std::int64_t j = lane; j < x.cols; j += 32) bad |= !finite(to_float(from[j]));
  if (__any_sync(~0u, static_cast<int>(bad)) == 0) return;
  const T nan = cuda::rounded<T>(not_a_number<accumulator_t<T>>());
  for (std::int64_t j = lane; j < y.cols; j += 32) to[j] = nan;
}

inline unsigned blocks_of(std::int64_t count) {
  STRUCTMAT_CHECK(count < std::int64_t{1} << 31,
                  "sparse_low_rank_linear: more than 2^31 tokens, which no launch takes");
  return static_cast<unsigned>(count);
}

template <class T>
void join(const Context& context, const Joined& p) {
  if (p.to.rows > 0)
    SM_LAUNCH(join_kernel<T>, blocks_of(p.to.rows), kRowThreads, 0, context.stream, p);
}
template <class T>
void permute(const Context& context, const void* from, const std::int32_t* permutation,
             std::int64_t count, void* to) {
  if (count > 0)
    SM_LAUNCH(permute_kernel<T>, blocks_of(ceil_div(count, kRowThreads)), kRowThreads, 0,
              context.stream, static_cast<const T*>(from), permutation, count, static_cast<T*>(to));
}
template <class T>
void round_sums(const Context& context, const Rounded& p) {
  if (p.y.rows > 0)
    SM_LAUNCH(round_kernel<T>, blocks_of(p.y.rows), kRowThreads, 0, context.stream, p);
}
template <class T>
void spread_nan(const Context& context, const ConstMatrixView& x, const MatrixView& y, bool dense) {
  constexpr std::int64_t tokens = kRowThreads / 32;
  if (y.rows > 0 && y.cols > 0)
    SM_LAUNCH(spread_kernel<T>, blocks_of(ceil_div(x.rows, tokens)), kRowThreads, 0, context.stream,
              x, y, dense);
}

}  // namespace structmat::sparse_low_rank
