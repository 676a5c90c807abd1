// SPDX-License-Identifier: Apache-2.0
#include "low_rank/low_rank_kernels.h"
#include "low_rank/low_rank_simd.h"
#include "simd.h"

namespace structmat {

void low_rank_linear_cpu(const Context& context, ConstMatrixView x, ConstMatrixView u,
                         ConstMatrixView v, ConstVectorView bias, MatrixView y, MatrixView hidden) {
  STRUCTMAT_SIMD_CALL(low_rank_forward, context, x, u, v, bias, y, hidden);
}

void low_rank_linear_backward_cpu(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                  ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                                  const LowRankGradients& grads) {
  STRUCTMAT_SIMD_CALL(low_rank_backward, context, dy, x, u, v, hidden, grads);
}

}  // namespace structmat
