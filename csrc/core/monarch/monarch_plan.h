// SPDX-License-Identifier: Apache-2.0
// How monarch_linear and kronecker_sparse_linear run on a GPU: pure functions of sizes and of facts
// about the device, tested without one.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/column_sums.h"
#include "cuda/strided_product.h"
#include "monarch/monarch_maps_cuda.h"
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

// ---- One launch for both products (monarch_fused_cuda.cuh) -------------------------------------

constexpr int kFusedThreads = 512;
constexpr std::int64_t kDecodeTokens = 32;  // up to here reading the weights is what takes time
// A block's share of the weights, up to which one launch reads them sooner than two that spread
// them over the whole device: about what a multiprocessor gets in the time of a launch.
constexpr std::int64_t kDecodeBytes = 64 << 10;
// Beyond it a tile of tokens waits for weights longer than h takes to and from memory.
constexpr std::int64_t kFusedBytes = 2 << 20;

// What a block takes: `tokens` by `blocks` output blocks, whose hidden units lie in shared memory
// in `units` numbers each, S rounded up to whole packs; a token's lie `pitch` apart.
struct FusedTile {
  int tokens = 0, blocks = 0, units = 0, pitch = 0, shared_bytes = 0;

  // Eight tokens side by side begin in eight different groups of four banks.
  FusedTile(const Sizes& s, std::int64_t R, int token_count, std::int64_t block_count)
      : tokens(token_count), blocks(static_cast<int>(block_count)) {
    units = static_cast<int>(ceil_div(s.S, 8) * 8);
    pitch = (blocks * units + 55) / 64 * 64 + 8;
    shared_bytes = tokens * pitch * 2 + static_cast<int>(blocks * R) * 4;
  }
  FusedTile() = default;
};

// R of the canonical form; 0 where the form is none: the units of an input block then fall to
// output blocks by turns.
inline std::int64_t run_of(const Sizes& s) {
  if (!s.interleaved_hidden) return s.R;
  return s.Q % s.J == 0 ? s.Q / s.J : 0;
}

// Output blocks of a block of the grid that fit the shared memory.
inline std::int64_t fitting_blocks(const Sizes& s, std::int64_t R, int tokens, int shared_bytes) {
  const std::int64_t units = ceil_div(s.S, 8) * 8, each = units * tokens * 2 + R * 4,
                     rest = shared_bytes - std::int64_t{tokens} * 64 * 2;
  return std::clamp<std::int64_t>(each > 0 ? rest / each : s.J, 0, s.J);
}

// Bytes between L2 cache and multiprocessors: x once for each group of output blocks, the weights
// once for each tile of tokens; as many as if every multiprocessor had work to the end. Two
// launches write and read h, and have tiles of 64 tokens or more.
inline double fused_bytes(const Sizes& s, std::int64_t tokens, const FusedTile& tile,
                          const DeviceFacts& device) {
  const std::int64_t groups = ceil_div(s.J, tile.blocks),
                     blocks = groups * ceil_div(tokens, tile.tokens),
                     waves = ceil_div(blocks, device.multiprocessors);
  const std::int64_t share = (s.m() + s.S * s.J * (s.I + s.L) / tile.tokens) / groups + s.n();
  return 2.0 * static_cast<double>(waves * device.multiprocessors) *
         static_cast<double>(tile.tokens) * static_cast<double>(share);
}
inline double two_launch_bytes(const Sizes& s, std::int64_t tokens) {
  const double T = static_cast<double>(tokens), H = static_cast<double>(s.hidden());
  const double widths = static_cast<double>(s.n() + s.m()) + 2 * H;
  return 2 * (T * widths +
              static_cast<double>(ceil_div(tokens, 64)) * H * static_cast<double>(s.I + s.L));
}

struct ForwardPlan {
  bool fused = false;
  FusedTile tile;
  std::size_t hidden_bytes = 0;  // h, where it is neither kept by the caller nor in shared memory
  std::size_t workspace_bytes = 0;
};

// For many tokens one launch reads weights and writes y by 16 bytes. Number by number it would take
// eight times the loads, and an interleaved y, which two launches write in packs of several output
// blocks, sixteen times the writes.
inline ForwardPlan forward_plan(const MonarchWeights& w, std::int64_t tokens, bool with_hidden,
                                const DeviceFacts& device) {
  ForwardPlan plan;
  const Sizes s(w);
  const DType dtype = w.w1.dtype;
  const WeightRows rows_of_weights = Maps(w, tokens, dtype).weight_rows();
  const std::int64_t R = run_of(s);
  const bool empty = R == 0 || s.I == 0 || s.L == 0 || tokens == 0;
  const bool may_fuse =
      size_of(dtype) == 2 && !with_hidden && !empty && rows_of_weights != WeightRows::runs;
  const bool by_packs = rows_of_weights == WeightRows::packs && s.L % cuda::kPack == 0 &&
                        (!s.interleaved_output || s.J == 1);
  if (may_fuse && tokens <= kDecodeTokens) {
    const int rows = tokens <= 16 ? 16 : 32;
    const std::int64_t fitting = fitting_blocks(s, R, rows, device.shared_bytes);
    const std::int64_t blocks =
        std::min(fitting, std::max<std::int64_t>(1, s.J / device.multiprocessors));
    plan.fused = blocks > 0 && 2 * blocks * s.S * (s.I + s.L) <= kDecodeBytes;
    if (plan.fused) plan.tile = FusedTile(s, R, rows, blocks);
  } else if (may_fuse && by_packs && 2 * s.hidden() * (s.I + s.L) <= kFusedBytes) {
    double least = two_launch_bytes(s, tokens);
    for (const int rows : {96, 64, 32}) {
      const std::int64_t fitting = fitting_blocks(s, R, rows, device.shared_bytes);
      for (std::int64_t blocks = s.J; blocks > 0; blocks /= 2) {
        if (blocks > fitting) continue;
        const FusedTile tile(s, R, rows, blocks);
        const double bytes = fused_bytes(s, tokens, tile, device);
        if (bytes >= least) continue;
        least = bytes, plan.fused = true, plan.tile = tile;
      }
    }
  }
  if (!with_hidden && !plan.fused)
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
    plan.partial_bytes = aligned(
        static_cast<std::size_t>(plan.split.count * batches * rows * cols) * sum_size(dtype));
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
  plan.partial_bytes = std::max(
      {plan.w1.partial_bytes, plan.w2.partial_bytes, cuda::column_sum_bytes(tokens, s.m(), dtype)});
  plan.workspace_bytes = plan.hidden_bytes + plan.partial_bytes;
  return plan;
}

}  // namespace structmat::monarch
