// SPDX-License-Identifier: Apache-2.0
// y = x V^T U^T + bias: a linear layer whose weight is W = U V, and its gradients.
#pragma once
#include <cstddef>
#include <cstdint>

#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"

namespace structmat {

// x (T, n), U (m, r), V (r, n), bias (m,) or none, y (T, m), all of one dtype. `hidden`, if given,
// receives h = x V^T (T, r), which the gradient of U needs. Sums are kept in fp32 (fp64 for f64).
STRUCTMAT_API void low_rank_linear(const Context& context, ConstMatrixView x, ConstMatrixView u,
                                   ConstMatrixView v, ConstVectorView bias, MatrixView y,
                                   MatrixView hidden = {});

// Gradients wanted of low_rank_linear; `data == nullptr` where none is.
struct LowRankGradients {
  MatrixView x;     // (T, n) = dh V, with dh = dy U
  MatrixView u;     // (m, r) = dy^T h
  MatrixView v;     // (r, n) = dh^T x
  VectorView bias;  // (m,)   = column sums of dy
};

// dy (T, m). `x` is read for the gradient of V only, `hidden` (T, r) for that of U only; either may
// be without data otherwise.
STRUCTMAT_API void low_rank_linear_backward(const Context& context, ConstMatrixView dy,
                                            ConstMatrixView x, ConstMatrixView u, ConstMatrixView v,
                                            ConstMatrixView hidden, const LowRankGradients& grads);

// Bytes of Context::workspace either call needs on the device of `context`.
STRUCTMAT_API std::size_t low_rank_linear_workspace(const Context& context, std::int64_t tokens,
                                                    std::int64_t m, std::int64_t n, std::int64_t r,
                                                    DType dtype, bool with_hidden);
STRUCTMAT_API std::size_t low_rank_linear_backward_workspace(const Context& context,
                                                             std::int64_t tokens, std::int64_t m,
                                                             std::int64_t r, DType dtype);

}  // namespace structmat
