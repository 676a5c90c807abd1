// SPDX-License-Identifier: Apache-2.0
#include "monarch/monarch_kernels.h"
#include "structmat/error.h"

namespace structmat {

void monarch_linear_cuda(const Context&, ConstMatrixView, const MonarchWeights&, ConstVectorView,
                         Activation, MatrixView, void*) {
  detail::fail("monarch_linear: not written");
}
void monarch_linear_backward_cuda(const Context&, ConstMatrixView, ConstMatrixView,
                                  const MonarchWeights&, const void*, const MonarchGradients&) {
  detail::fail("monarch_linear_backward: not written");
}

}  // namespace structmat
