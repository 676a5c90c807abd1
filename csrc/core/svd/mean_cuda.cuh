// SPDX-License-Identifier: Apache-2.0
// The mean of the rows of a strided matrix, on the device; mean_cpu.h says how.
#pragma once
#include "cuda/arena.h"
#include "svd/column_sums_cuda.cuh"
#include "svd/mean.h"

namespace structmat {
namespace svd_cuda {

template <class E, class T>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const E* data, std::int64_t cols, std::int64_t col_stride, const double* sums,
                int slabs, T* high, T* low) {
  const std::int64_t c = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= cols) return;
  double offset = 0;
  for (int slab = 0; slab < slabs; ++slab) offset += sums[slab * cols + c];
  split_mean(static_cast<double>(to_float(data[c * col_stride])), offset, high[c], low[c]);
}

template <class T>
struct Mean {
  T *high, *low;  // (cols)
  double* sums;   // (slabs, cols)

  // Of A (rows, cols), if it is wanted.
  Mean(cuda::Arena& arena, const StridedMatrixView& a, bool wanted) {
    high = arena.take<T>(wanted ? a.cols : 0);
    low = arena.take<T>(wanted ? a.cols : 0);
    sums = arena.take<double>(wanted ? slab_count(a.rows) * a.cols : 0);
  }
  void find(void* stream, const StridedMatrixView& a) const {
    dispatch_dtype(a.dtype, [&](auto element) {
      using E = decltype(element);
      const E* const data = static_cast<const E*>(a.data);
      const int width = a.col_stride == 1 ? 32 : 1;
      const unsigned slabs = slab_count(a.rows);
      SM_LAUNCH((column_sums_kernel<E, true>), dim3(tiles(a.cols, width), slabs), kThreads, 0,
                stream, data, a.rows, a.cols, a.row_stride, a.col_stride, width, sums);
      SM_LAUNCH((mean_kernel<E, T>), tiles(a.cols, kThreads), kThreads, 0, stream, data, a.cols,
                a.col_stride, sums, static_cast<int>(slabs), high, low);
    });
  }
};

}  // namespace svd_cuda
}  // namespace structmat
