// SPDX-License-Identifier: Apache-2.0
// What monarch.cpp calls once shapes, dtypes and workspace are checked.
#pragma once
#include "structmat/monarch.h"

namespace structmat {

void monarch_linear_cpu(const Context& context, ConstMatrixView x, const MonarchWeights& weights,
                        ConstVectorView bias, Activation activation, MatrixView y, void* hidden);
void monarch_linear_backward_cpu(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                 const MonarchWeights& weights, const void* hidden,
                                 const MonarchGradients& grads);

void monarch_linear_cuda(const Context& context, ConstMatrixView x, const MonarchWeights& weights,
                         ConstVectorView bias, Activation activation, MatrixView y, void* hidden);
void monarch_linear_backward_cuda(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                  const MonarchWeights& weights, const void* hidden,
                                  const MonarchGradients& grads);
std::size_t monarch_linear_workspace_cuda(std::int64_t tokens, const MonarchWeights& weights,
                                          bool with_hidden);
std::size_t monarch_linear_backward_workspace_cuda(std::int64_t tokens,
                                                   const MonarchWeights& weights);

}  // namespace structmat
