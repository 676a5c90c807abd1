// SPDX-License-Identifier: Apache-2.0
// How monarch_linear and kronecker_sparse_linear run on a GPU: pure functions of sizes and of facts
// about the device, tested without one.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/column_sums.h"
#include "cuda/strided_product.h"
#include "monarch/monarch_sizes.h"
#include "structmat/matrix.h"

namespace structmat::monarch {

struct DeviceFacts {
  int multiprocessors = 0;
  int shared_bytes = 0;  // that a block may have
};

constexpr std::size_t aligned(std::size_t bytes) {
  return (bytes + 255) / 256 * 256;
}
constexpr std::size_t sum_size(DType dtype) {
  return dtype == DType::f64 ? 8 : 4;
}

struct ForwardPlan {
  std::size_t hidden_bytes = 0;  // h, where the caller keeps none
  std::size_t workspace_bytes = 0;
};

inline ForwardPlan forward_plan(const Sizes& s, std::int64_t tokens, DType dtype, bool with_hidden,
                                const DeviceFacts&) {
  ForwardPlan plan;
  if (!with_hidden)
    plan.hidden_bytes = aligned(static_cast<std::size_t>(tokens * s.hidden()) * size_of(dtype));
  plan.workspace_bytes = plan.hidden_bytes;
  return plan;
}

// The gradient of a weight of `batches` blocks, rows x cols, is a sum over tokens.
struct SumPlan {
  cuda::Split split;
  std::size_t partial_bytes = 0;
};
inline SumPlan sum_plan(std::int64_t batches, std::int64_t rows, std::int64_t cols,
                        std::int64_t tokens, DType dtype, const DeviceFacts& device) {
  SumPlan plan;
  plan.split = cuda::split_sum(batches, rows, cols, tokens, device.multiprocessors);
  if (plan.split.count > 1)
    plan.partial_bytes = aligned(static_cast<std::size_t>(plan.split.count * batches * rows * cols) *
                                 sum_size(dtype));
  return plan;
}

struct BackwardPlan {
  std::size_t hidden_bytes = 0;  // dh, and after it is done with, h where none was kept
  SumPlan w1, w2;
  std::size_t partial_bytes = 0;  // of the larger sum, or of the bias gradient
  std::size_t workspace_bytes = 0;
};

inline BackwardPlan backward_plan(const Sizes& s, std::int64_t tokens, DType dtype,
                                  const DeviceFacts& device) {
  BackwardPlan plan;
  plan.hidden_bytes = aligned(static_cast<std::size_t>(tokens * s.hidden()) * size_of(dtype));
  plan.w1 = sum_plan(s.K, s.Q, s.I, tokens, dtype, device);
  plan.w2 = sum_plan(s.J, s.L, s.S, tokens, dtype, device);
  plan.partial_bytes = std::max({plan.w1.partial_bytes, plan.w2.partial_bytes,
                                 cuda::column_sum_bytes(tokens, s.m(), dtype)});
  plan.workspace_bytes = plan.hidden_bytes + plan.partial_bytes;
  return plan;
}

}  // namespace structmat::monarch
