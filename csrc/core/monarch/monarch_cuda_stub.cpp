// SPDX-License-Identifier: Apache-2.0
// Compiled instead of monarch_cuda.cu where there is no CUDA compiler.
#include "monarch/monarch_kernels.h"
#include "structmat/error.h"

namespace structmat {

void monarch_linear_cuda(const Context&, ConstMatrixView, const MonarchWeights&, ConstVectorView,
                         Activation, MatrixView, void*) {
  detail::fail("monarch_linear: structmat was built without CUDA");
}
void monarch_linear_backward_cuda(const Context&, ConstMatrixView, ConstMatrixView,
                                  const MonarchWeights&, const void*, const MonarchGradients&) {
  detail::fail("monarch_linear_backward: structmat was built without CUDA");
}
std::size_t monarch_linear_workspace_cuda(std::int64_t, const MonarchWeights&, bool) {
  return 0;
}
std::size_t monarch_linear_backward_workspace_cuda(std::int64_t, const MonarchWeights&) {
  return 0;
}

}  // namespace structmat
