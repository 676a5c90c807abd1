// SPDX-License-Identifier: Apache-2.0
// The elementwise and reducing kernels of streaming_svd_cuda.cu.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/device.h"
#include "half.h"
#include "streaming_svd/streaming_svd_info.h"
#include "svd/panel_cuda.cuh"

namespace structmat {
namespace streaming_svd_cuda {

using svd_cuda::blocks_for;
using svd_cuda::is_finite;
using svd_cuda::kThreads;
using svd_cuda::tiles;

__device__ inline std::int64_t first_index() {
  return static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
}
__device__ inline std::int64_t index_step() {
  return static_cast<std::int64_t>(gridDim.x) * kThreads;
}

__device__ inline double unit_of(const double* facts) {
  return streaming_svd_unit(facts[1]);
}

// The largest of a block's values, for its first thread.
__device__ inline double block_max(double mine) {
  __shared__ double largest[kThreads];
  largest[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half && largest[threadIdx.x + half] > largest[threadIdx.x])
      largest[threadIdx.x] = largest[threadIdx.x + half];
  }
  return largest[threadIdx.x];
}

// found[i] <- the largest magnitude in row i, weighted by decay^(count - 1 - i). One block a row.
__global__ void __launch_bounds__(kThreads)
    largest_kernel(const double* rows, std::int64_t row_stride, std::int64_t n, double decay,
                   double* found) {
  const double* row = rows + static_cast<std::int64_t>(blockIdx.x) * row_stride;
  double mine = 0;
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads)
    mine = fabs(row[j]) > mine ? fabs(row[j]) : mine;
  mine = block_max(mine);
  const double weight =
      decay == 1 ? 1.0 : pow(decay, static_cast<double>(gridDim.x - 1 - blockIdx.x));
  if (threadIdx.x == 0) found[blockIdx.x] = mine * streaming_svd_faded(weight);
}

// The largest magnitude of all rows so far, from those of new ones and the weight of earlier ones;
// ratio <- the earlier unit over the new one. One block.
__global__ void __launch_bounds__(kThreads)
    unit_kernel(const double* found, std::int64_t count, double weight, double* facts,
                double* ratio) {
  double mine = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads)
    mine = found[i] > mine ? found[i] : mine;
  mine = block_max(mine);
  if (threadIdx.x != 0) return;
  const double earlier = facts[1], faded = earlier * streaming_svd_faded(weight);
  facts[1] = mine > faded ? mine : faded;
  *ratio = streaming_svd_ratio(earlier, facts[1]);
}

// out (count, n) <- the rows in units of the state's, weighted by decay^(count - 1 - i) and, with
// `center`, about their mean, then the row of the join; mean <- that of all. A block has 32
// columns.
template <class T>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const T* rows, std::int64_t row_stride, std::int64_t count, std::int64_t n,
                   double decay, double inverse_count, double share, double between, bool center,
                   const double* facts, double* mean, double* out) {
  constexpr int kRows = kThreads / 32;
  __shared__ double sums[kRows][32];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * 32 + lane;
  const double unit = unit_of(facts), inverse = 1 / unit;
  double sum = 0;
  if (j < n)
    for (std::int64_t i = row; i < count; i += kRows) {
      const double root = decay == 1 ? 1.0 : pow(decay, static_cast<double>(count - 1 - i));
      sum += root * root * (inverse * static_cast<double>(to_float(rows[i * row_stride + j])));
    }
  sums[row][lane] = sum;
  __syncthreads();
  if (j >= n) return;
  double own = 0;
  for (int k = 0; k < kRows; ++k) own += sums[k][lane];
  own *= inverse_count;
  if (row == 0) {
    const double earlier = mean[j] * inverse, distance = own - earlier;
    mean[j] = (earlier + share * distance) * unit;
    if (center) out[count * n + j] = between * distance;
  }
  const double about = center ? own : 0.0;
  for (std::int64_t i = row; i < count; i += kRows) {
    const double root = decay == 1 ? 1.0 : pow(decay, static_cast<double>(count - 1 - i));
    out[i * n + j] =
        root * (inverse * static_cast<double>(to_float(rows[i * row_stride + j])) - about);
  }
}

// to = from times by * ratio, or its square
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const double* from, double* to, std::int64_t count, double by, const double* ratio,
                 bool square) {
  double factor = ratio == nullptr ? by : by * *ratio;
  if (square) factor *= factor;
  for (std::int64_t i = first_index(); i < count; i += index_step()) to[i] = factor * from[i];
}

// to += ratio^2 from
__global__ void __launch_bounds__(kThreads)
    add_kernel(const double* from, double* to, std::int64_t count, const double* ratio) {
  for (std::int64_t i = first_index(); i < count; i += index_step())
    to[i] += *ratio * *ratio * from[i];
}

// Energy of all eigenvalues but the first `kept`, without rounding, of which there is some in every
// fold; NaN where the iteration did not end.
__global__ void lost_kernel(const double* energies, std::int64_t kept, std::int64_t size, double by,
                            const double* ratio, const int* rotated, double* facts) {
  const double factor = ratio == nullptr ? by : by * *ratio;
  const double noise = streaming_svd_noise(size, energies[0]);
  double lost = factor * factor * facts[0];
  for (std::int64_t i = kept; i < size; ++i) lost += energies[i] > noise ? energies[i] : 0.0;
  facts[0] = *rotated != 0 ? std::numeric_limits<double>::quiet_NaN() : lost;
}

__global__ void merge_units_kernel(double* facts, const double* other, double weight,
                                   double* ratios) {
  const double earlier = facts[1], faded = earlier * streaming_svd_faded(weight);
  facts[1] = other[1] > faded ? other[1] : faded;
  ratios[0] = streaming_svd_ratio(earlier, facts[1]);
  ratios[1] = streaming_svd_ratio(other[1], facts[1]);
}
__global__ void merge_lost_kernel(double* facts, const double* other, const double* ratio) {
  facts[0] += *ratio * *ratio * other[0];
}
__global__ void __launch_bounds__(kThreads)
    merge_means_kernel(double* mean, const double* later, const double* facts, std::int64_t n,
                       double share, double between, double* row) {
  const double unit = unit_of(facts);
  for (std::int64_t j = first_index(); j < n; j += index_step()) {
    const double distance = later[j] / unit - mean[j] / unit;
    row[j] = between * distance;
    mean[j] = (mean[j] / unit + share * distance) * unit;
  }
}

// to (n, n) <- the symmetric matrix whose lower triangle `from` holds
__global__ void __launch_bounds__(kThreads)
    mirror_kernel(const double* from, double* to, std::int64_t n) {
  for (std::int64_t i = first_index(); i < n * n; i += index_step()) {
    const std::int64_t r = i / n, c = i % n;
    to[i] = r >= c ? from[i] : from[c * n + r];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    store_kernel(const T* from, std::int64_t row_stride, std::int64_t col_stride, T* to,
                 std::int64_t rows, std::int64_t cols) {
  for (std::int64_t i = first_index(); i < rows * cols; i += index_step())
    to[i] = from[i / cols * row_stride + i % cols * col_stride];
}

// One block a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const std::int64_t* starts, const std::int64_t* columns, const T* values, T* to,
                   std::int64_t cols) {
  T* row = to + static_cast<std::int64_t>(blockIdx.x) * cols;
  for (std::int64_t j = threadIdx.x; j < cols; j += kThreads) row[j] = T{};
  __syncthreads();
  for (std::int64_t k = starts[blockIdx.x] + threadIdx.x; k < starts[blockIdx.x + 1]; k += kThreads)
    row[columns[k]] = values[k];
}

__global__ void assume_kernel(double* finite) {
  *finite = 1;
}
template <class T>
__global__ void __launch_bounds__(kThreads)
    check_kernel(const T* values, std::int64_t rows, std::int64_t cols, std::int64_t row_stride,
                 std::int64_t col_stride, double* finite) {
  for (std::int64_t i = first_index(); i < rows * cols; i += index_step())
    if (!is_finite(
            static_cast<double>(to_float(values[i / cols * row_stride + i % cols * col_stride]))))
      *finite = 0;
}

// What was found: value i is values[i], an energy or its root; vector i has entry j at
// vectors[i * row_stride + j * col_stride].
struct Vectors {
  const double *values, *vectors;
  std::int64_t row_stride, col_stride;
  bool energies;

  __device__ double sigma(std::int64_t i) const { return energies ? sqrt(values[i]) : values[i]; }
};

// One thread: the sums are short, and their order is fixed.
template <class T>
__global__ void info_kernel(Vectors found, std::int64_t n, std::int64_t k, const double* facts,
                            const int* rotated, const SvdInfo* inner, SvdInfo* info) {
  const double unit = unit_of(facts);
  double kept = 0, lost = facts[0], rank = 0;
  const double floor = found.sigma(0) * streaming_svd_resolution(n, found.energies,
                                                                 std::numeric_limits<T>::epsilon());
  for (std::int64_t i = 0; i < k; ++i) {
    const double sigma = found.sigma(i);
    kept += sigma * sigma;
    rank += sigma > floor && static_cast<T>(sigma * unit) > 0 ? 1 : 0;
  }
  if (found.energies) {
    for (std::int64_t i = k; i < n; ++i) lost += found.values[i];
  } else {
    const double tail = inner->error * inner->norm;
    lost += tail * tail;
  }
  *info = streaming_svd_info(kept, lost, rank, k == n, unit);
  const bool in_range =
      found.sigma(0) * unit <= static_cast<double>(std::numeric_limits<T>::max()) &&
      is_finite(kept + lost) && (rotated == nullptr || *rotated == 0);
  if (!in_range) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    *info = {nan, nan, nan, nan, 0};
  }
}

// S and Vh, the entry of largest magnitude of each row made positive; NaN where there is no finite
// answer. One block a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Vectors found, std::int64_t n, const double* facts, const SvdInfo* info, T* s,
                  T* vh, std::int64_t stride) {
  __shared__ double best[kThreads];
  __shared__ std::int64_t where[kThreads];
  const std::int64_t i = blockIdx.x;
  const double* from = found.vectors + i * found.row_stride;
  double value = 0;
  std::int64_t at = n;
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads)
    if (fabs(from[j * found.col_stride]) > fabs(value)) {
      value = from[j * found.col_stride];
      at = j;
    }
  best[threadIdx.x] = value;
  where[threadIdx.x] = at;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    const int other = threadIdx.x + half;
    if (static_cast<int>(threadIdx.x) >= half) continue;
    const double mine = fabs(best[threadIdx.x]), theirs = fabs(best[other]);
    if (theirs > mine || (theirs == mine && where[other] < where[threadIdx.x])) {
      best[threadIdx.x] = best[other];
      where[threadIdx.x] = where[other];
    }
  }
  __syncthreads();
  const double sign = best[0] < 0 ? -1.0 : 1.0;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const bool finite = info->finite != 0;
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads)
    vh[i * stride + j] = finite ? static_cast<T>(sign * from[j * found.col_stride]) : nan;
  if (threadIdx.x == 0) s[i] = finite ? static_cast<T>(found.sigma(i) * unit_of(facts)) : nan;
}

}  // namespace streaming_svd_cuda
}  // namespace structmat
