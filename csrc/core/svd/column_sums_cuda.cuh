// SPDX-License-Identifier: Apache-2.0
// Sums of columns of a strided matrix, in an order that sizes alone decide.
#pragma once
#include "svd/panel_cuda.cuh"

namespace structmat {
namespace svd_cuda {

// sums[slab, c] <- the sum of column c over a slab of rows or, for a mean, what it differs from its
// first entry by, over all rows' number. A block takes `width` columns, one or 32, whichever lie
// side by side.
template <class S, bool kMean = false>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const S* data, std::int64_t rows, std::int64_t cols, std::int64_t row_stride,
                       std::int64_t col_stride, int width, double* sums) {
  __shared__ double all[kThreads];
  const int lane = static_cast<int>(threadIdx.x) % width;
  const int row = static_cast<int>(threadIdx.x) / width, step = kThreads / width;
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * width + lane;
  const std::int64_t slab = ceil_div(rows, gridDim.y), first = blockIdx.y * slab;
  const std::int64_t last = first + slab < rows ? first + slab : rows;
  double sum = 0;
  if (c < cols) {
    const S* const column = data + c * col_stride;
    const double base = kMean ? static_cast<double>(to_float(column[0])) : 0.0;
    for (std::int64_t r = first + row; r < last; r += step)
      sum += static_cast<double>(to_float(column[r * row_stride])) - base;
  }
  all[threadIdx.x] = sum;
  for (int half = step / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) all[threadIdx.x] += all[threadIdx.x + half * width];
  }
  if (row == 0 && c < cols)
    sums[blockIdx.y * cols + c] = kMean ? all[lane] / static_cast<double>(rows) : all[lane];
}

}  // namespace svd_cuda
}  // namespace structmat
