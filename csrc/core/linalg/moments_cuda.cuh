// SPDX-License-Identifier: Apache-2.0
// Sums of columns and the norm of a matrix, a panel of rows after the other. Every sum is taken in
// an order that sizes alone decide.
#pragma once
#include <algorithm>

#include "svd/panel_cuda.cuh"

namespace structmat {
namespace svd_cuda {

// Slabs of rows whose columns are summed on their own: enough blocks to fill the GPU.
inline unsigned moment_slabs(std::int64_t rows, std::int64_t cols) {
  return std::min(slab_count(rows), std::max(1024 / std::max(tiles(cols, 32), 1u), 1u));
}

// sums[slab, c] <- the sum of column c over a slab of rows. A block takes `width` columns, one or
// 32, whichever lie side by side.
template <class S>
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(const S* data, std::int64_t rows, std::int64_t cols, std::int64_t row_stride,
                       std::int64_t col_stride, int width, double* sums) {
  __shared__ double all[kThreads];
  const int lane = static_cast<int>(threadIdx.x) % width;
  const int row = static_cast<int>(threadIdx.x) / width, step = kThreads / width;
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * width + lane;
  const std::int64_t slab = (rows + gridDim.y - 1) / gridDim.y, first = blockIdx.y * slab;
  const std::int64_t last = first + slab < rows ? first + slab : rows;
  double sum = 0;
  if (c < cols)
    for (std::int64_t r = first + row; r < last; r += step)
      sum += static_cast<double>(to_float(data[r * row_stride + c * col_stride]));
  all[threadIdx.x] = sum;
  for (int half = step / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row < half) all[threadIdx.x] += all[threadIdx.x + half * width];
  }
  if (row == 0 && c < cols) sums[blockIdx.y * cols + c] = all[threadIdx.x];
}

// out (cols) <- the sums over slabs, added to those of the panels before
__global__ void __launch_bounds__(kThreads)
    add_sums_kernel(const double* sums, int slabs, std::int64_t cols, bool first, double* out) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= cols) return;
  double sum = first ? 0 : out[c];
  for (int slab = 0; slab < slabs; ++slab) sum += sums[slab * cols + c];
  out[c] = sum;
}

// out <- the norm of this panel and those before, which `total` holds
__global__ void __launch_bounds__(kThreads)
    add_norms_kernel(const ScaledNorm* norms, int count, bool first, ScaledNorm* total,
                     double* out) {
  ScaledNorm mine{0, 0};
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads)
    mine = combine(mine, norms[i]);
  mine = reduce_norm(mine);
  if (threadIdx.x != 0) return;
  if (!first) mine = combine(*total, mine);
  *total = mine;
  *out = mine.scale * sqrt(mine.sum);
}

}  // namespace svd_cuda
}  // namespace structmat
