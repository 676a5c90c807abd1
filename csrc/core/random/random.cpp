// SPDX-License-Identifier: Apache-2.0
#include "structmat/random.h"

#include <string>

#include "random/random_kernels.h"
#include "structmat/error.h"

namespace structmat {

void fill_gaussian(const Context& context, MatrixView out, std::uint64_t seed,
                   std::uint32_t stream) {
  STRUCTMAT_CHECK(
      out.dtype == DType::f32 || out.dtype == DType::f64,
      std::string("gaussian: out must be float32 or float64, got ") + name_of(out.dtype));
  STRUCTMAT_CHECK(out.rows >= 0 && out.cols >= 0,
                  "gaussian: the shape is " + std::to_string(out.rows) + " x " +
                      std::to_string(out.cols) + ", wanted no negative size");
  STRUCTMAT_CHECK(out.cols < std::int64_t{1} << 34,
                  "gaussian: " + std::to_string(out.cols) + " columns, wanted fewer than 2^34");
  if (out.rows == 0 || out.cols == 0) return;
  if (context.device == Device::cuda)
    fill_gaussian_cuda(context, out, seed, stream);
  else
    fill_gaussian_cpu(context, out, seed, stream);
}

}  // namespace structmat
