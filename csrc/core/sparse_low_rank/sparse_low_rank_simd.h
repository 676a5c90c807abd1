// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of sparse_low_rank_simd.cpp, once per instruction set.
#pragma once
#include "sparse_low_rank/sparse_low_rank_kernels.h"

#define STRUCTMAT_DECLARE(level)                                                               \
  namespace level {                                                                            \
  void sparse_low_rank_forward(const Context& context, ConstMatrixView x,                      \
                               const SparseLowRankWeights& weights, ConstVectorView bias,      \
                               MatrixView y, MatrixView hidden);                               \
  void sparse_low_rank_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x, \
                                const SparseLowRankWeights& weights,                           \
                                const SparseTransposeView& transpose, ConstMatrixView hidden,  \
                                const SparseLowRankGradients& grads);                          \
  void sampled_product(const Context& context, ConstMatrixView dy, ConstMatrixView x,          \
                       const SparsePatternView& pattern, VectorView values);                   \
  }
namespace structmat {
STRUCTMAT_DECLARE(baseline)
STRUCTMAT_DECLARE(avx2)
STRUCTMAT_DECLARE(avx512)
}  // namespace structmat
#undef STRUCTMAT_DECLARE
