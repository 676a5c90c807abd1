// SPDX-License-Identifier: Apache-2.0
// The CPU kernels of low_rank_simd.cpp, once per instruction set.
#pragma once
#include "low_rank/low_rank_kernels.h"

#define STRUCTMAT_DECLARE(level)                                                                   \
  namespace level {                                                                                \
  void low_rank_forward(const Context& context, ConstMatrixView x, ConstMatrixView u,              \
                        ConstMatrixView v, ConstVectorView bias, MatrixView y, MatrixView hidden); \
  void low_rank_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,            \
                         ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,             \
                         const LowRankGradients& grads);                                           \
  }
namespace structmat {
STRUCTMAT_DECLARE(baseline)
STRUCTMAT_DECLARE(avx2)
STRUCTMAT_DECLARE(avx512)
}  // namespace structmat
#undef STRUCTMAT_DECLARE
