// SPDX-License-Identifier: Apache-2.0
#include "kronecker_sparse/kronecker_sparse_kernels.h"
#include "kronecker_sparse/kronecker_sparse_simd.h"
#include "simd.h"

namespace structmat {

void kronecker_sparse_linear_cpu(const Context& context, ConstMatrixView x, const ConstArrayView& w,
                                 ConstVectorView bias, Activation activation, MatrixView y) {
  STRUCTMAT_SIMD_CALL(kronecker_sparse_forward, context, x, w, bias, activation, y);
}

void kronecker_sparse_linear_backward_cpu(const Context& context, ConstMatrixView dy,
                                          ConstMatrixView x, const ConstArrayView& w,
                                          const KroneckerSparseGradients& grads) {
  STRUCTMAT_SIMD_CALL(kronecker_sparse_backward, context, dy, x, w, grads);
}

}  // namespace structmat
