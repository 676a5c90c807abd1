// SPDX-License-Identifier: Apache-2.0
// How A^T (A X) is cut into row panels: pure functions of sizes.
#pragma once
#include <algorithm>
#include <cstdint>

#include "structmat/matrix.h"

namespace structmat {

// The CPU: slabs of rows that are summed on their own, and those added in order. Their results,
// whose columns fill vectors of 16 numbers, take no more than a quarter of A's memory.
constexpr std::int64_t gram_slabs_cpu(std::int64_t m, std::int64_t l) {
  const std::int64_t width = std::max<std::int64_t>(l + 15, 16) / 16 * 16;
  return std::clamp<std::int64_t>(m / (4 * width), 1, 32);
}

// Rows of a panel on the GPU, where it stays in level 2. Two reads of A from memory take 2 s / B
// an entry of s bytes, the products 4 l / F: below l = s F / (2 B), that is 36 in float32 and 72 in
// float64 on an H100 (60 TFLOP/s both, 3.35 TB/s), reading is what costs, and panels of 16 MB save
// one of the two. A that fits, or wider X, is one panel.
constexpr std::int64_t kGramPanelBytes = std::int64_t{16} << 20;

constexpr std::int64_t gram_panel_rows_cuda(std::int64_t m, std::int64_t n, std::int64_t l,
                                            DType dtype) {
  const bool wide = dtype == DType::f64;
  const std::int64_t row = std::max<std::int64_t>(n, 1) * (wide ? 8 : 4);
  const bool in_place = wide || dtype == DType::f32;
  if (in_place && (l > (wide ? 72 : 36) || m * row <= 2 * kGramPanelBytes))
    return std::max<std::int64_t>(m, 1);
  return std::clamp<std::int64_t>(kGramPanelBytes / row, 1, std::max<std::int64_t>(m, 1));
}

}  // namespace structmat
