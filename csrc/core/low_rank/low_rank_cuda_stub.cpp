// SPDX-License-Identifier: Apache-2.0
// Compiled instead of low_rank_cuda.cu where there is no CUDA compiler.
#include "low_rank/low_rank_kernels.h"
#include "structmat/error.h"

namespace structmat {

void low_rank_linear_cuda(const Context&, ConstMatrixView, ConstMatrixView, ConstMatrixView,
                          ConstVectorView, MatrixView, MatrixView) {
  detail::fail("low_rank_linear: structmat was built without CUDA");
}
void low_rank_linear_backward_cuda(const Context&, ConstMatrixView, ConstMatrixView,
                                   ConstMatrixView, ConstMatrixView, ConstMatrixView,
                                   const LowRankGradients&) {
  detail::fail("low_rank_linear_backward: structmat was built without CUDA");
}

}  // namespace structmat
