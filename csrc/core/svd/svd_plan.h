// SPDX-License-Identifier: Apache-2.0
// Which products a decomposition makes: pure functions of sizes.
#pragma once
#include <algorithm>
#include <cstdint>

#include "structmat/svd.h"

namespace structmat {

// B is A where A is tall, else A^T: `tall` x `small`. The basis of its column space has `blocks`
// blocks of `block` columns. The last 2 `blocks` passes build a block Krylov space (Golub-Kahan);
// those before are steps of subspace iteration, which need no more memory.
struct SvdPlan {
  std::int64_t tall, small;
  bool swapped;  // B = A^T
  std::int64_t rank, block, blocks, sweeps;
  bool complete;  // the basis is the whole space: the decomposition is exact
  constexpr std::int64_t basis() const { return block * blocks; }
};

// Two blocks: with five passes they beat six of subspace iteration on every spectrum tried, and a
// third gains a factor 2 in excess error but makes the small decomposition 3.4 times the work. A
// block holds the whole rank, because a narrower one misses singular values repeated more often
// than it is wide.
constexpr std::int64_t kKrylovBlocks = 2;
constexpr std::int64_t kDefaultSweeps = 5;

inline std::int64_t default_oversample(std::int64_t rank) {
  return (rank + 8 + 15) / 16 * 16 - rank;
}

inline SvdPlan plan_svd(std::int64_t m, std::int64_t n, const SvdOptions& options) {
  SvdPlan plan{};
  plan.tall = std::max(m, n);
  plan.small = std::min(m, n);
  plan.swapped = m < n;
  plan.rank = options.rank;
  plan.sweeps = options.sweeps.value_or(kDefaultSweeps);
  plan.blocks = std::min(plan.sweeps / 2, kKrylovBlocks);
  const std::int64_t oversample = options.oversample.value_or(default_oversample(plan.rank));
  plan.block = plan.rank + std::min(oversample, plan.small - plan.rank);
  if (plan.basis() >= plan.small) {
    plan.block = plan.small;
    plan.blocks = 1;
    plan.sweeps = 2;
    plan.complete = true;
  }
  return plan;
}

}  // namespace structmat
