// SPDX-License-Identifier: Apache-2.0
// Compiled instead of linalg_cuda.cu where there is no CUDA compiler.
#include "linalg/linalg_kernels.h"
#include "structmat/error.h"

namespace structmat {

void orthonormalize_cuda(const Context&, const StridedMatrixView&, std::uint64_t, MatrixView,
                         VectorView) {
  detail::fail("orthonormalize: structmat was built without CUDA");
}
std::size_t orthonormalize_workspace_cuda(const StridedMatrixView&) {
  detail::fail("orthonormalize: structmat was built without CUDA");
}
void gram_matmul_cuda(const Context&, const StridedMatrixView&, const StridedMatrixView&,
                      MatrixView, GramMoments) {
  detail::fail("gram_matmul: structmat was built without CUDA");
}
std::size_t gram_matmul_workspace_cuda(const StridedMatrixView&, const StridedMatrixView&) {
  detail::fail("gram_matmul: structmat was built without CUDA");
}
void range_step_cuda(const Context&, const RangeStep&, std::uint64_t) {
  detail::fail("range_step: structmat was built without CUDA");
}
std::size_t range_step_workspace_cuda(const RangeStep&) {
  detail::fail("range_step: structmat was built without CUDA");
}

}  // namespace structmat
