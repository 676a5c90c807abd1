// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "parallel.h"
#include "random/random_kernels.h"
#include "simd.h"

namespace structmat {

#define STRUCTMAT_DECLARE_ROWS(level)                                                 \
  namespace level {                                                                   \
  void gaussian_rows(float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,  \
                     std::uint64_t, std::uint32_t);                                   \
  void gaussian_rows(double*, std::int64_t, std::int64_t, std::int64_t, std::int64_t, \
                     std::uint64_t, std::uint32_t);                                   \
  }
STRUCTMAT_DECLARE_ROWS(baseline)
STRUCTMAT_DECLARE_ROWS(avx2)
STRUCTMAT_DECLARE_ROWS(avx512)

template <class T>
void fill_gaussian_rows(T* out, std::int64_t row_stride, std::int64_t first, std::int64_t last,
                        std::int64_t cols, std::uint64_t seed, std::uint32_t stream) {
  STRUCTMAT_SIMD_CALL(gaussian_rows, out, row_stride, first, last, cols, seed, stream);
}
template void fill_gaussian_rows(float*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                 std::uint64_t, std::uint32_t);
template void fill_gaussian_rows(double*, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                                 std::uint64_t, std::uint32_t);

void fill_gaussian_cpu(const Context& context, MatrixView out, std::uint64_t seed,
                       std::uint32_t stream) {
  const std::int64_t tile = std::max<std::int64_t>(1, 16384 / out.cols);
  parallel_for(context, ceil_div(out.rows, tile), [&](std::int64_t i) {
    const std::int64_t first = i * tile, last = std::min(out.rows, first + tile);
    if (out.dtype == DType::f32)
      fill_gaussian_rows(static_cast<float*>(out.data), out.row_stride, first, last, out.cols, seed,
                         stream);
    else
      fill_gaussian_rows(static_cast<double*>(out.data), out.row_stride, first, last, out.cols,
                         seed, stream);
  });
}

}  // namespace structmat
