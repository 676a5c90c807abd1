// SPDX-License-Identifier: Apache-2.0
// y = x W^T + bias with W = base + U V + S, S sparse, and its gradients. W is never formed.
#pragma once
#include <cstddef>
#include <cstdint>

#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"
#include "structmat/sparse_pattern.h"

namespace structmat {

// W (m, n) by its parts, all of one dtype; but `base` may be of a 16-bit type beside f32, whose
// numbers are then widened exactly, a part of it at a time. U (m, r) and V (r, n) may be without
// data (r = 0: no low rank part), `base` (m, n) likewise.
struct SparseLowRankWeights {
  ConstMatrixView u;
  ConstMatrixView v;
  SparsePatternView pattern;
  ConstVectorView values;  // (nnz,), in the order of the pattern
  ConstMatrixView base;
};

// x (T, n), bias (m,) or none, y (T, m), of the dtype of the weights. Sums are kept in fp32 (fp64
// for f64) and rounded once. On a GPU 16-bit types round h = x V^T as well before U takes it, as in
// low_rank_linear, but for up to 32 tokens without `hidden`; from 1024 tokens on W itself may be
// formed and rounded instead. `hidden`, if given, receives h (T, r). A token with a number that is
// not finite gives NaN in every output, as the zeros of a dense W would.
STRUCTMAT_API void sparse_low_rank_linear(const Context& context, ConstMatrixView x,
                                          const SparseLowRankWeights& weights, ConstVectorView bias,
                                          MatrixView y, MatrixView hidden = {});

// Gradients wanted of sparse_low_rank_linear; `data == nullptr` where none is. `base` is frozen.
struct SparseLowRankGradients {
  MatrixView x;       // (T, n) = dy W
  MatrixView u;       // (m, r) = dy^T h
  MatrixView v;       // (r, n) = (dy U)^T x
  VectorView values;  // (nnz,) = (dy^T x) on the support
  VectorView bias;    // (m,)   = column sums of dy
};

// dy (T, m). `x` is read for the gradients of V and the values only, `hidden` for that of U only,
// `transpose` for that of x only; each may be without data otherwise.
STRUCTMAT_API void sparse_low_rank_linear_backward(const Context& context, ConstMatrixView dy,
                                                   ConstMatrixView x,
                                                   const SparseLowRankWeights& weights,
                                                   const SparseTransposeView& transpose,
                                                   ConstMatrixView hidden,
                                                   const SparseLowRankGradients& grads);

// values[e] = sum_t dy[t, i] x[t, j] for entry e = (i, j) of the support: dy (T, m), x (T, n).
STRUCTMAT_API void sampled_matmul(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                  const SparsePatternView& pattern, VectorView values);

// Bytes of Context::workspace each call needs on the device of `context`.
STRUCTMAT_API std::size_t sparse_low_rank_linear_workspace(const Context& context,
                                                           std::int64_t tokens,
                                                           const SparseLowRankWeights& weights);
STRUCTMAT_API std::size_t sparse_low_rank_linear_backward_workspace(
    const Context& context, std::int64_t tokens, const SparseLowRankWeights& weights,
    const SparseTransposeView& transpose, const SparseLowRankGradients& grads);
STRUCTMAT_API std::size_t sampled_matmul_workspace(const Context& context, std::int64_t tokens,
                                                   const SparsePatternView& pattern, DType dtype);

}  // namespace structmat
