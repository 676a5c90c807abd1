// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of kronecker_sparse_simd.cpp, once per instruction set.
#pragma once
#include "kronecker_sparse/kronecker_sparse_kernels.h"

#define STRUCTMAT_DECLARE(level)                                                                  \
  namespace level {                                                                               \
  void kronecker_sparse_forward(const Context& context, ConstMatrixView x,                        \
                                const ConstArrayView& w, ConstVectorView bias,                    \
                                Activation activation, MatrixView y);                             \
  void kronecker_sparse_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,   \
                                 const ConstArrayView& w, const KroneckerSparseGradients& grads); \
  }
namespace structmat {
STRUCTMAT_DECLARE(baseline)
STRUCTMAT_DECLARE(avx2)
STRUCTMAT_DECLARE(avx512)
}  // namespace structmat
#undef STRUCTMAT_DECLARE
