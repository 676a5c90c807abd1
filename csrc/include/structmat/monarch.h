// SPDX-License-Identifier: Apache-2.0
// y = act(x W^T + bias) with a Monarch matrix W, the product of two block-diagonal factors with a
// permutation between them, and its gradients.
#pragma once
#include <cstddef>
#include <cstdint>

#include "structmat/activation.h"
#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"

namespace structmat {

// The canonical form, W1 (K, J, R, I) and W2 (J, L, K, R), for n = K I inputs, K J R hidden units
// and m = J L outputs:
//
//   h[t,k,j,r] = sum_i W1[k,j,r,i] x[t, k I + i]
//   z[t,j,l]   = sum_kr W2[j,l,k,r] h[t,k,j,r]
//
// Block (j, k) of W, L x I, has rank R at most. The weights are read through their strides, so that
// other layouts need no copy.
//
// With `interleaved_hidden` the factors are W1 (K, 1, Q, I) and W2 (J, L, 1, S) with K Q = J S:
// unit s of output block j is the hidden unit s J + j, which is unit (s J + j) mod Q of input block
// (s J + j) / Q. Blocks of W then have ranks that differ by one where J does not divide Q.
struct MonarchWeights {
  ConstArrayView w1;
  ConstArrayView w2;
  bool interleaved_hidden = false;
  bool interleaved_output = false;  // output (j, l) is column l J + j of y, else j L + l
};

// x (T, n), bias (m,) or none, in the order of the columns of y, y (T, m): all of one dtype. Sums
// are kept in fp32 (fp64 for f64). `hidden`, if given, is an array (J, T, K R) that receives h, for
// the gradients: h of block j and token t is the vector over (k, r), or over s.
STRUCTMAT_API void monarch_linear(const Context& context, ConstMatrixView x,
                                  const MonarchWeights& weights, ConstVectorView bias,
                                  Activation activation, MatrixView y, void* hidden = nullptr);

// Gradients wanted of monarch_linear without activation; `data == nullptr` where none is.
struct MonarchGradients {
  MatrixView x;        // (T, n), dx[t,k,i] = sum_jr dh[t,k,j,r] W1[k,j,r,i]
  void* w1 = nullptr;  // like W1, contiguous: sum_t dh[t,k,j,r] x[t,k,i]
  void* w2 = nullptr;  // like W2, contiguous: sum_t dy[t,j,l] h[t,k,j,r]
  VectorView bias;     // (m,), column sums of dy
};

// dy (T, m); dh[t,k,j,r] = sum_l dy[t,j,l] W2[j,l,k,r]. `x` is read for the gradients of the
// weights only and may be without data otherwise. Without `hidden` h is computed again where the
// gradient of W2 needs it.
STRUCTMAT_API void monarch_linear_backward(const Context& context, ConstMatrixView dy,
                                           ConstMatrixView x, const MonarchWeights& weights,
                                           const void* hidden, const MonarchGradients& grads);

// Bytes of Context::workspace either call needs on the device of `context`. The weights are those
// of the call: where they lie decides how it runs.
STRUCTMAT_API std::size_t monarch_linear_workspace(const Context& context, std::int64_t tokens,
                                                   const MonarchWeights& weights, bool with_hidden);
STRUCTMAT_API std::size_t monarch_linear_backward_workspace(const Context& context,
                                                            std::int64_t tokens,
                                                            const MonarchWeights& weights,
                                                            bool with_hidden);

}  // namespace structmat
