// SPDX-License-Identifier: Apache-2.0
// Dense products on the GPU: cuBLAS, loaded at first use (cublas_api.h). The tests' emulator has
// its own.
#pragma once
#include <cstddef>
#include <cstdint>

#include "structmat/context.h"
#include "structmat/matrix.h"

namespace structmat::cuda {

// C = alpha op(A) op(B) + beta C + 1 bias^T, row-major; op(A) is m x k, op(B) k x n, C m x n.
// A and B share `dtype`; C and bias have `out`, which is `dtype`, or f32 for 16-bit inputs. Sums
// are kept in fp32 (fp64 for f64); fp32 inputs are multiplied in fp32, not TF32.
struct Gemm {
  bool trans_a = false, trans_b = false;
  std::int64_t m = 0, n = 0, k = 0;
  const void* a = nullptr;
  std::int64_t lda = 0;
  const void* b = nullptr;
  std::int64_t ldb = 0;
  void* c = nullptr;
  std::int64_t ldc = 0;
  DType dtype = DType::f32, out = DType::f32;
  double alpha = 1, beta = 0;
  const void* bias = nullptr;  // (n,), or none
};

// What gemm() takes from the caller's device workspace.
constexpr std::size_t kGemmWorkspace = std::size_t{32} << 20;

// Enqueues on context.stream; `workspace` holds kGemmWorkspace bytes, aligned to 256.
void gemm(const Context& context, const Gemm& product, void* workspace);

}  // namespace structmat::cuda
