// SPDX-License-Identifier: Apache-2.0
// Sums over tokens on the GPU: the gradients of biases.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ceil_div.h"
#include "structmat/context.h"
#include "structmat/matrix.h"

namespace structmat::cuda {

constexpr std::int64_t kColumnSumTokens = 512;  // tokens a block adds up

constexpr std::int64_t column_sum_blocks(std::int64_t tokens) {
  return std::clamp<std::int64_t>(ceil_div(tokens, kColumnSumTokens), 1, 64);
}
// Bytes of `partial`, a multiple of 256.
constexpr std::size_t column_sum_bytes(std::int64_t tokens, std::int64_t cols, DType dtype) {
  const std::size_t sum = dtype == DType::f64 ? 8 : 4;
  return (static_cast<std::size_t>(column_sum_blocks(tokens) * cols) * sum + 255) / 256 * 256;
}

// out[j] = sum_t a[t, j], in an order that sizes alone decide; sums in fp32 (fp64 for f64).
void column_sums(const Context& context, const ConstMatrixView& a, void* partial,
                 const VectorView& out);

}  // namespace structmat::cuda
