// SPDX-License-Identifier: Apache-2.0
#include "kronecker_sparse/kronecker_sparse_kernels.h"
#include "structmat/error.h"

namespace structmat {

void kronecker_sparse_linear_cuda(const Context&, ConstMatrixView, const ConstArrayView&,
                                  ConstVectorView, Activation, MatrixView) {
  detail::fail("kronecker_sparse_linear: not written");
}
void kronecker_sparse_linear_backward_cuda(const Context&, ConstMatrixView, ConstMatrixView,
                                           const ConstArrayView&, const KroneckerSparseGradients&) {
  detail::fail("kronecker_sparse_linear_backward: not written");
}

}  // namespace structmat
