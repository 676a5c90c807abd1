// SPDX-License-Identifier: Apache-2.0
#include "monarch/monarch_kernels.h"
#include "monarch/monarch_simd.h"
#include "simd.h"

namespace structmat {

void monarch_linear_cpu(const Context& context, ConstMatrixView x, const MonarchWeights& weights,
                        ConstVectorView bias, Activation activation, MatrixView y, void* hidden) {
  STRUCTMAT_SIMD_CALL(monarch_forward, context, x, weights, bias, activation, y, hidden);
}

void monarch_linear_backward_cpu(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                 const MonarchWeights& weights, const void* hidden,
                                 const MonarchGradients& grads) {
  STRUCTMAT_SIMD_CALL(monarch_backward, context, dy, x, weights, hidden, grads);
}

}  // namespace structmat
