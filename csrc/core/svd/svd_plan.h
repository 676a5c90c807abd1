// SPDX-License-Identifier: Apache-2.0
// Which products a decomposition makes: pure functions of sizes.
#pragma once
#include <algorithm>
#include <cstdint>

#include "ceil_div.h"
#include "structmat/svd.h"

namespace structmat {

// B is A where A is tall, else A^T: `tall` x `small`. The basis of its column space has `blocks`
// blocks of `block` columns, the last of `last`. The final 2 `blocks` passes build a block Krylov
// space (Golub-Kahan); those before are steps of subspace iteration, which need no more memory.
struct SvdPlan {
  std::int64_t tall, small;
  bool swapped;  // B = A^T
  std::int64_t rank, block, blocks, sweeps;
  std::int64_t last;    // columns of the last block
  std::int64_t probes;  // columns that measure what the basis leaves out
  bool complete;        // the basis is the whole space: the decomposition is exact
  bool narrow;          // blocks have fewer columns than the rank
  bool center;          // of A less the mean of its rows
  constexpr std::int64_t basis() const { return block * (blocks - 1) + last; }
  constexpr std::int64_t stored() const { return basis() + probes; }
};

// Wide blocks hold the whole rank. Two: with five passes they beat six of subspace iteration on
// every spectrum tried, and a third gains a factor 2 in excess error but makes the small
// decomposition 3.4 times the work.
constexpr std::int64_t kKrylovBlocks = 2;
constexpr std::int64_t kDefaultSweeps = 5;
// Eight: the estimate's standard deviation is 1/4 of what one random direction would have.
constexpr std::int64_t kProbes = 8;

inline std::int64_t default_oversample(std::int64_t rank) {
  return ceil_div(rank + 8, 16) * 16 - rank;
}

// More passes with narrower blocks need fewer products with A for the same error: with singular
// values i^-1/2 and rank 128 of 4096, five blocks of 48 columns are 480 products of a column for an
// excess of 6.1e-3, five passes with 144 are 720 for 4.4e-3, torch's six with 138 are 828 for
// 7.3e-3. Below 32 columns reading A costs more than that saves. A narrow block misses singular
// values repeated more often than it is wide; `hides_copies` sees that in the result.
inline void narrow(SvdPlan& plan) {
  const std::int64_t block = ceil_div(3 * plan.rank, 128) * 16;
  if (block < 32) return;
  // With the least bases, in 1/64 of the rank, that keep the excess at 0.4 to 0.9 of torch's at
  // singular values i^-1/4, i^-1/2 and 1/i, ranks 50 to 128, sizes 384 to 4096. Steps before the
  // blocks let the basis, and with it the small decomposition, be smaller for as many products.
  constexpr struct {
    std::int64_t sweeps, blocks, basis;
  } plans[] = {{8, 3, 118}, {9, 3, 96}, {10, 4, 118}, {10, 5, 118}};
  for (const auto& [sweeps, blocks, least] : plans) {
    const std::int64_t basis = block * blocks;
    if (64 * basis < least * plan.rank || basis >= plan.small) continue;
    plan.block = plan.last = block;
    plan.blocks = blocks;
    plan.sweeps = sweeps;
    plan.narrow = true;
    // Probes and the last block fill the vectors of a block where its columns can be spared.
    if (64 * (basis - plan.probes) >= least * plan.rank) plan.last -= plan.probes;
    return;
  }
}

inline SvdPlan plan_wide(std::int64_t m, std::int64_t n, const SvdOptions& options) {
  SvdPlan plan{};
  plan.tall = std::max(m, n);
  plan.small = std::min(m, n);
  plan.swapped = m < n;
  plan.center = options.center;
  plan.rank = options.rank;
  plan.sweeps = options.sweeps.value_or(kDefaultSweeps);
  plan.blocks = std::min(plan.sweeps / 2, kKrylovBlocks);
  plan.probes = kProbes;
  const std::int64_t oversample = options.oversample.value_or(default_oversample(plan.rank));
  plan.block = plan.rank + std::min(oversample, plan.small - plan.rank);
  plan.last = plan.block;
  if (plan.basis() >= plan.small) {
    plan.block = plan.last = plan.small;
    plan.blocks = 1;
    plan.sweeps = 2;
    plan.probes = 0;
    plan.complete = true;
  }
  return plan;
}

// Narrow blocks where products are what costs, on the CPU, and the caller has not said otherwise.
inline SvdPlan plan_svd(std::int64_t m, std::int64_t n, const SvdOptions& options, Device device) {
  SvdPlan plan = plan_wide(m, n, options);
  if (device == Device::cpu && !plan.complete && !options.sweeps && !options.oversample)
    narrow(plan);
  return plan;
}

// Whether a narrow basis may lack copies of a singular value that it found `block` times: so many
// of the leading ones within 2 %, larger by 5 % than the last one wanted. (The upper edge of a
// random matrix's spectrum is narrower than that relation, so that it does not count.)
template <class T>
bool hides_copies(const SvdPlan& plan, const T* sigma) {
  const T last = sigma[plan.rank - 1];
  for (std::int64_t i = 0; plan.narrow && i + plan.block <= plan.rank; ++i)
    if (sigma[i + plan.block - 1] >= T(0.98) * sigma[i] && last < T(0.95) * sigma[i]) return true;
  return false;
}

}  // namespace structmat
