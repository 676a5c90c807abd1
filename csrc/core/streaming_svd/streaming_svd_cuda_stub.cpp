// SPDX-License-Identifier: Apache-2.0
// Compiled instead of streaming_svd_cuda.cu where there is no CUDA compiler.
#include "streaming_svd/streaming_svd_kernels.h"
#include "structmat/error.h"

namespace structmat {
namespace {

[[noreturn]] void missing() {
  detail::fail("streaming_svd: structmat was built without CUDA");
}

}  // namespace

void streaming_svd_store_cuda(const Context&, const StridedMatrixView&, MatrixView) {
  missing();
}
void streaming_svd_store_cuda(const Context&, const CsrView&, MatrixView) {
  missing();
}
void streaming_svd_fold_cuda(const Context&, const StreamingSvdState&, const StridedMatrixView&) {
  missing();
}
void streaming_svd_merge_cuda(const Context&, const StreamingSvdState&, const StreamingSvdState&) {
  missing();
}
void streaming_svd_result_cuda(const Context&, const StreamingSvdState&, std::uint64_t, VectorView,
                               MatrixView, SvdInfo*) {
  missing();
}
void streaming_svd_check_cuda(const Context&, const StridedMatrixView&, double*) {
  missing();
}
std::size_t streaming_svd_workspace_cuda(const StreamingSvdState&) {
  missing();
}

}  // namespace structmat
