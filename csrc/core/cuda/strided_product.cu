// SPDX-License-Identifier: Apache-2.0
#include "cuda/strided_product.h"
#include "cuda/strided_product_mma.cuh"
#include "cuda/strided_product_simt.cuh"

namespace structmat::cuda {

void multiply(const Context& context, const StridedProduct& p) {
  if (p.batches == 0 || p.rows == 0 || p.cols == 0) return;
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2)
      multiply_mma<T>(context, p);
    else
      multiply_simt<T>(context, p);
    if (p.splits == 1) return;
    const std::int64_t blocks = ceil_div(p.batches * p.rows * p.cols, 256);
    STRUCTMAT_CHECK(blocks < std::int64_t{1} << 31,
                    "structmat: a gradient of more than 2^39 numbers");
    SM_LAUNCH(sum_parts_kernel<T>, dim3(static_cast<unsigned>(blocks)), 256, 0, context.stream, p);
  });
}

}  // namespace structmat::cuda
