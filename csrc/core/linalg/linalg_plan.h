// SPDX-License-Identifier: Apache-2.0
// How A^T (A X) is cut into row panels: pure functions of sizes.
#pragma once
#include <algorithm>
#include <cstdint>

#include "structmat/matrix.h"

namespace structmat {

// The CPU. A panel of `rows` rows is multiplied twice while it lies in cache; the rows are summed
// in `slabs` parts, each panel after panel, and those added in order.
struct GramCpuPlan {
  std::int64_t rows, slabs;
};

// 1 MB of float32 a panel, of 64 to 256 rows: fewer make Z's traffic and BLAS slow (0.8 of the rate
// at 32 rows), more leave level 2. One thread, 16384 x 1024, against the whole A as one panel: 0.35
// of the time for 1 column, 0.76 for 8, 0.77 for 16, 0.91 for 64, 0.96 for 144.
constexpr GramCpuPlan plan_gram_cpu(std::int64_t m, std::int64_t n, std::int64_t l) {
  GramCpuPlan plan{};
  plan.rows =
      std::clamp<std::int64_t>((std::int64_t{1} << 18) / std::max<std::int64_t>(n, 1), 64, 256);
  // Partial results take no more than a quarter of A's memory.
  plan.slabs = std::clamp<std::int64_t>(
      std::min(m / (4 * std::max<std::int64_t>(l, 1)), m / plan.rows), 1, 32);
  return plan;
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
