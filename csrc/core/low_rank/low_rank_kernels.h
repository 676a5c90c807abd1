// SPDX-License-Identifier: Apache-2.0
// What low_rank.cpp calls once shapes, dtypes and workspace are checked.
#pragma once
#include "structmat/low_rank.h"

namespace structmat {

void low_rank_linear_cpu(const Context& context, ConstMatrixView x, ConstMatrixView u,
                         ConstMatrixView v, ConstVectorView bias, MatrixView y, MatrixView hidden);
void low_rank_linear_backward_cpu(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                  ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                                  const LowRankGradients& grads);

void low_rank_linear_cuda(const Context& context, ConstMatrixView x, ConstMatrixView u,
                          ConstMatrixView v, ConstVectorView bias, MatrixView y, MatrixView hidden);
void low_rank_linear_backward_cuda(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                   ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                                   const LowRankGradients& grads);

}  // namespace structmat
