// SPDX-License-Identifier: Apache-2.0
#include "simd.h"
#include "sparse_low_rank/sparse_low_rank_kernels.h"
#include "sparse_low_rank/sparse_low_rank_simd.h"

namespace structmat {

void sparse_low_rank_linear_cpu(const Context& context, ConstMatrixView x,
                                const SparseLowRankWeights& weights, ConstVectorView bias,
                                MatrixView y, MatrixView hidden) {
  STRUCTMAT_SIMD_CALL(sparse_low_rank_forward, context, x, weights, bias, y, hidden);
}

void sparse_low_rank_linear_backward_cpu(const Context& context, ConstMatrixView dy,
                                         ConstMatrixView x, const SparseLowRankWeights& weights,
                                         const SparseTransposeView& transpose,
                                         ConstMatrixView hidden,
                                         const SparseLowRankGradients& grads) {
  STRUCTMAT_SIMD_CALL(sparse_low_rank_backward, context, dy, x, weights, transpose, hidden, grads);
}

void sampled_matmul_cpu(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                        const SparsePatternView& pattern, VectorView values) {
  STRUCTMAT_SIMD_CALL(sampled_product, context, dy, x, pattern, values);
}

}  // namespace structmat
