// SPDX-License-Identifier: Apache-2.0
// Compiled instead of sparse_low_rank_cuda.cu where there is no CUDA compiler.
#include "sparse_low_rank/sparse_low_rank_kernels.h"
#include "structmat/error.h"

namespace structmat {

void sparse_low_rank_linear_cuda(const Context&, ConstMatrixView, const SparseLowRankWeights&,
                                 ConstVectorView, MatrixView, MatrixView) {
  detail::fail("sparse_low_rank_linear: structmat was built without CUDA");
}
void sparse_low_rank_linear_backward_cuda(const Context&, ConstMatrixView, ConstMatrixView,
                                          const SparseLowRankWeights&, const SparseTransposeView&,
                                          ConstMatrixView, const SparseLowRankGradients&) {
  detail::fail("sparse_low_rank_linear_backward: structmat was built without CUDA");
}
void sampled_matmul_cuda(const Context&, ConstMatrixView, ConstMatrixView, const SparsePatternView&,
                         VectorView) {
  detail::fail("sampled_matmul: structmat was built without CUDA");
}
std::size_t sparse_low_rank_linear_workspace_cuda(std::int64_t, const SparseLowRankWeights&) {
  return 0;
}
std::size_t sparse_low_rank_linear_backward_workspace_cuda(std::int64_t,
                                                           const SparseLowRankWeights&,
                                                           const SparseTransposeView&,
                                                           const SparseLowRankGradients&) {
  return 0;
}
std::size_t sampled_matmul_workspace_cuda(std::int64_t, const SparsePatternView&, DType) {
  return 0;
}

}  // namespace structmat
