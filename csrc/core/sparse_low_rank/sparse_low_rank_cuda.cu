// SPDX-License-Identifier: Apache-2.0
#include "sparse_low_rank/sparse_low_rank_kernels.h"
#include "structmat/error.h"

namespace structmat {

void sparse_low_rank_linear_cuda(const Context&, ConstMatrixView, const SparseLowRankWeights&,
                                 ConstVectorView, MatrixView, MatrixView) {
  detail::fail("sparse_low_rank_linear: not written for CUDA yet");
}
void sparse_low_rank_linear_backward_cuda(const Context&, ConstMatrixView, ConstMatrixView,
                                          const SparseLowRankWeights&, const SparseTransposeView&,
                                          ConstMatrixView, const SparseLowRankGradients&) {
  detail::fail("sparse_low_rank_linear_backward: not written for CUDA yet");
}
void sampled_matmul_cuda(const Context&, ConstMatrixView, ConstMatrixView, const SparsePatternView&,
                         VectorView) {
  detail::fail("sampled_matmul: not written for CUDA yet");
}

}  // namespace structmat
