// SPDX-License-Identifier: Apache-2.0
// What sparse_low_rank.cpp calls once shapes, dtypes and workspace are checked.
#pragma once
#include "structmat/sparse_low_rank.h"

namespace structmat {

void sparse_low_rank_linear_cpu(const Context& context, ConstMatrixView x,
                                const SparseLowRankWeights& weights, ConstVectorView bias,
                                MatrixView y, MatrixView hidden);
void sparse_low_rank_linear_backward_cpu(const Context& context, ConstMatrixView dy,
                                         ConstMatrixView x, const SparseLowRankWeights& weights,
                                         const SparseTransposeView& transpose,
                                         ConstMatrixView hidden,
                                         const SparseLowRankGradients& grads);
void sampled_matmul_cpu(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                        const SparsePatternView& pattern, VectorView values);

void sparse_low_rank_linear_cuda(const Context& context, ConstMatrixView x,
                                 const SparseLowRankWeights& weights, ConstVectorView bias,
                                 MatrixView y, MatrixView hidden);
void sparse_low_rank_linear_backward_cuda(const Context& context, ConstMatrixView dy,
                                          ConstMatrixView x, const SparseLowRankWeights& weights,
                                          const SparseTransposeView& transpose,
                                          ConstMatrixView hidden,
                                          const SparseLowRankGradients& grads);
void sampled_matmul_cuda(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                         const SparsePatternView& pattern, VectorView values);

std::size_t sparse_low_rank_linear_workspace_cuda(std::int64_t tokens,
                                                  const SparseLowRankWeights& weights);
std::size_t sparse_low_rank_linear_backward_workspace_cuda(std::int64_t tokens,
                                                           const SparseLowRankWeights& weights,
                                                           const SparseTransposeView& transpose,
                                                           const SparseLowRankGradients& grads);
std::size_t sampled_matmul_workspace_cuda(std::int64_t tokens, const SparsePatternView& pattern,
                                          DType dtype);

}  // namespace structmat
