// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of monarch_simd.cpp, once per instruction set.
#pragma once
#include "monarch/monarch_kernels.h"

#define STRUCTMAT_DECLARE(level)                                                                 \
  namespace level {                                                                              \
  void monarch_forward(const Context& context, ConstMatrixView x, const MonarchWeights& weights, \
                       ConstVectorView bias, Activation activation, MatrixView y, void* hidden); \
  void monarch_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,           \
                        const MonarchWeights& weights, const void* hidden,                       \
                        const MonarchGradients& grads);                                          \
  }
namespace structmat {
STRUCTMAT_DECLARE(baseline)
STRUCTMAT_DECLARE(avx2)
STRUCTMAT_DECLARE(avx512)
}  // namespace structmat
#undef STRUCTMAT_DECLARE
