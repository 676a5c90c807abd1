// SPDX-License-Identifier: Apache-2.0
// Sums of columns and the norm of a matrix, a panel of rows after the other. Every sum is taken in
// an order that sizes alone decide.
#pragma once
#include <algorithm>

#include "svd/column_sums_cuda.cuh"

namespace structmat {
namespace svd_cuda {

// Slabs of rows whose columns are summed on their own: enough blocks to fill the GPU.
inline unsigned moment_slabs(std::int64_t rows, std::int64_t cols) {
  return std::min(slab_count(rows), std::max(1024 / std::max(tiles(cols, 32), 1u), 1u));
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
