// SPDX-License-Identifier: Apache-2.0
// Compiled instead of kronecker_sparse_cuda.cu where there is no CUDA compiler.
#include "kronecker_sparse/kronecker_sparse_kernels.h"
#include "structmat/error.h"

namespace structmat {

void kronecker_sparse_linear_cuda(const Context&, ConstMatrixView, const ConstArrayView&,
                                  ConstVectorView, Activation, MatrixView) {
  detail::fail("kronecker_sparse_linear: structmat was built without CUDA");
}
void kronecker_sparse_linear_backward_cuda(const Context&, ConstMatrixView, ConstMatrixView,
                                           const ConstArrayView&, const KroneckerSparseGradients&) {
  detail::fail("kronecker_sparse_linear_backward: structmat was built without CUDA");
}
std::size_t kronecker_sparse_linear_backward_workspace_cuda(std::int64_t, const ConstArrayView&) {
  return 0;
}

}  // namespace structmat
