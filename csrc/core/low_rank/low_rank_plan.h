// SPDX-License-Identifier: Apache-2.0
// How low_rank_linear runs on a GPU: pure functions of sizes, tested without one.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ceil_div.h"
#include "cuda/column_sums.h"
#include "cuda/gemm.h"
#include "structmat/matrix.h"

namespace structmat::low_rank {

constexpr std::int64_t kDecodeTokens = 16;  // up to here the time is that of reading U and V once
constexpr int kWarps = 8;                   // warps of a block of the decode kernel
constexpr std::int64_t kChunk = 1024;       // columns of x staged in shared memory at a time
constexpr std::int64_t kMaxSplits = 4;
// 132 SMs (H100, H200), 16 warps on each: enough 16-byte loads in flight to cover the latency.
constexpr std::int64_t kWantedWarps = 132 * 16;

// A product of `tokens` rows with a weight of `rows` rows and `cols` columns: a warp owns
// `rows_per_warp` rows for a group of `token_group` tokens; columns are cut into `splits`, whose
// partial sums the next kernel adds in order.
struct DecodePhase {
  int token_group = 1;
  int rows_per_warp = 1;
  std::int64_t row_blocks = 1;
  std::int64_t splits = 1;
  std::int64_t split_cols = kChunk;  // a multiple of kChunk
};

constexpr std::size_t aligned(std::size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

// More tokens need more rows per warp: each staged value of x is then used that often.
inline DecodePhase decode_phase(std::int64_t tokens, std::int64_t rows, std::int64_t cols,
                                bool may_split) {
  DecodePhase phase;
  phase.token_group = tokens == 1 ? 1 : tokens <= 4 ? 4 : 8;
  phase.rows_per_warp = phase.token_group == 8 ? 4 : phase.token_group == 4 ? 2 : 1;
  phase.row_blocks = ceil_div(rows, kWarps * phase.rows_per_warp);
  const std::int64_t warps = ceil_div(rows, phase.rows_per_warp);
  const std::int64_t chunks = std::max<std::int64_t>(1, ceil_div(cols, kChunk));
  if (may_split && warps > 0)
    phase.splits = std::clamp<std::int64_t>(kWantedWarps / warps, 1, std::min(kMaxSplits, chunks));
  phase.split_cols = ceil_div(chunks, phase.splits) * kChunk;
  phase.splits = ceil_div(chunks * kChunk, phase.split_cols);  // none is empty
  return phase;
}

struct ForwardPlan {
  bool decode = false;
  DecodePhase first, second;     // h = x V^T, y = h U^T
  std::size_t hidden_bytes = 0;  // decode: partial sums of h; else h, where the caller keeps none
  std::size_t workspace_bytes = 0;
};

inline ForwardPlan forward_plan(std::int64_t tokens, std::int64_t m, std::int64_t n, std::int64_t r,
                                DType dtype, bool with_hidden) {
  ForwardPlan plan;
  plan.decode = tokens <= kDecodeTokens && !with_hidden;
  if (plan.decode) {
    plan.first = decode_phase(tokens, r, n, true);
    plan.second = decode_phase(tokens, m, r, false);
    const std::size_t sum = dtype == DType::f64 ? 8 : 4;
    plan.hidden_bytes = aligned(static_cast<std::size_t>(plan.first.splits * tokens * r) * sum);
    plan.workspace_bytes = plan.hidden_bytes;
    return plan;
  }
  if (!with_hidden)
    plan.hidden_bytes = aligned(static_cast<std::size_t>(tokens * r) * size_of(dtype));
  plan.workspace_bytes = plan.hidden_bytes + cuda::kGemmWorkspace;
  return plan;
}

struct BackwardPlan {
  std::size_t hidden_bytes = 0;   // dh = dy U (T, r)
  std::size_t partial_bytes = 0;  // partial sums of the bias gradient
  std::size_t workspace_bytes = 0;
};

inline BackwardPlan backward_plan(std::int64_t tokens, std::int64_t m, std::int64_t r,
                                  DType dtype) {
  BackwardPlan plan;
  plan.hidden_bytes = aligned(static_cast<std::size_t>(tokens * r) * size_of(dtype));
  plan.partial_bytes = cuda::column_sum_bytes(tokens, m, dtype);
  plan.workspace_bytes = plan.hidden_bytes + plan.partial_bytes + cuda::kGemmWorkspace;
  return plan;
}

}  // namespace structmat::low_rank
