// SPDX-License-Identifier: Apache-2.0
// What kronecker_sparse.cpp calls once shapes, dtypes and workspace are checked.
#pragma once
#include "structmat/kronecker_sparse.h"

namespace structmat {

void kronecker_sparse_linear_cpu(const Context& context, ConstMatrixView x, const ConstArrayView& w,
                                 ConstVectorView bias, Activation activation, MatrixView y);
void kronecker_sparse_linear_backward_cpu(const Context& context, ConstMatrixView dy,
                                          ConstMatrixView x, const ConstArrayView& w,
                                          const KroneckerSparseGradients& grads);

void kronecker_sparse_linear_cuda(const Context& context, ConstMatrixView x,
                                  const ConstArrayView& w, ConstVectorView bias,
                                  Activation activation, MatrixView y);
void kronecker_sparse_linear_backward_cuda(const Context& context, ConstMatrixView dy,
                                           ConstMatrixView x, const ConstArrayView& w,
                                           const KroneckerSparseGradients& grads);
std::size_t kronecker_sparse_linear_backward_workspace_cuda(std::int64_t tokens,
                                                            const ConstArrayView& w);

}  // namespace structmat
