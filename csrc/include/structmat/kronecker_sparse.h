// SPDX-License-Identifier: Apache-2.0
// y = act(x W^T + bias) with one Kronecker-sparse factor W, whose support is I_a (x) 1_{b x c} (x)
// I_d, and its gradients. With d = 1 it is block-diagonal, with a = d = 1 dense.
#pragma once
#include <cstddef>
#include <cstdint>

#include "structmat/activation.h"
#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"

namespace structmat {

// z[t,a,b,d] = sum_c W[a,b,c,d] x[t,a,c,d]: W (a, b, c, d) read through its strides, x (T, a c d),
// bias (a b d,) or none, y (T, a b d), all of one dtype. Sums are kept in fp32 (fp64 for f64).
STRUCTMAT_API void kronecker_sparse_linear(const Context& context, ConstMatrixView x,
                                           const ConstArrayView& w, ConstVectorView bias,
                                           Activation activation, MatrixView y);

// Gradients wanted of kronecker_sparse_linear without activation; `data == nullptr` where none is.
struct KroneckerSparseGradients {
  MatrixView x;       // (T, a c d) = sum_b dy[t,a,b,d] W[a,b,c,d]
  void* w = nullptr;  // like W, contiguous: sum_t dy[t,a,b,d] x[t,a,c,d]
  VectorView bias;    // (a b d,), column sums of dy
};

// `x` is read for the gradient of W only and may be without data otherwise.
STRUCTMAT_API void kronecker_sparse_linear_backward(const Context& context, ConstMatrixView dy,
                                                    ConstMatrixView x, const ConstArrayView& w,
                                                    const KroneckerSparseGradients& grads);

// Bytes of Context::workspace either call needs on the device of `context`.
STRUCTMAT_API std::size_t kronecker_sparse_linear_workspace(const Context& context,
                                                            std::int64_t tokens,
                                                            const ConstArrayView& w);
STRUCTMAT_API std::size_t kronecker_sparse_linear_backward_workspace(const Context& context,
                                                                     std::int64_t tokens,
                                                                     const ConstArrayView& w);

}  // namespace structmat
