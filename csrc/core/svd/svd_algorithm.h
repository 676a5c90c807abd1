// SPDX-License-Identifier: Apache-2.0
// The randomized SVD of B (tall x small), once for all back ends:
//   X_1 = sketch, after sweeps - 2 blocks steps of subspace iteration by B and B^T;
//   Q_j = orth(B X_j),  T_j = B^T Q_j,  X_{j+1} = T_j less its part in X_1 .. X_j;
//   the last B X_j comes with B G for random G, which tells ||(I - Q Q^T) B||;
//   T = [T_1 ..] = X R with X = orth(T),  R = P S W^T,  B ~ (Q W) S (X P)^T.
// Halko, Martinsson, Tropp, SIAM Review 53 (2011), 4.5; Musco and Musco, NIPS 2015 (block Krylov).
//
// An Engine holds the buffers and enqueues the operations. No step depends on a result the host
// would have to wait for: orthonormalisation repeats passes that do nothing once the basis is good.
#pragma once
#include <cstdint>

#include "svd/orth.h"
#include "svd/svd_plan.h"

namespace structmat {

template <class Engine>
class SvdAlgorithm {
 public:
  using T = typename Engine::Scalar;

  SvdAlgorithm(Engine& engine, const SvdPlan& plan) : e(engine), plan(plan) {}

  void run() {
    const Panel<T> q = e.q(), x = e.x(), t = e.t();
    const std::int64_t b = plan.block;
    start(q.columns(0, b), x.columns(0, b));
    for (std::int64_t j = 0; j < plan.blocks; ++j) {
      const Panel<T> qj = q.columns(j * b, b), xj = x.columns(j * b, b);
      if (j > 0) {
        e.copy(t.columns((j - 1) * b, b), xj);
        orthonormalize(xj, x.columns(0, j * b), 1);
      }
      // The last product takes along random columns that have no part in the basis.
      const std::int64_t width = b + (j + 1 == plan.blocks ? plan.probes : 0);
      if (width > b) e.sketch(x.columns((j + 1) * b, plan.probes), kProbeStream);
      if (plan.complete)
        e.load(qj);
      else
        e.multiply(x.columns(j * b, width), q.columns(j * b, width));
      orthonormalize(qj, q.columns(0, j * b), kOrthPasses);
      e.multiply_transposed(qj, t.columns(j * b, b));
    }
    if (plan.probes > 0) e.measure_outside(q.columns(plan.basis(), plan.probes), q);
    e.copy(t, x);
    orthonormalize(x, {}, kOrthPasses);
    e.small_svd(x, t, plan.rank);  // R = X^T T = P S W^T
    // Jacobi's iteration divides by singular values, which leaves out the vectors of zeros.
    for (const Panel<T>& y : e.rough_vectors()) orthonormalize(y, {}, kOrthPasses);
    e.factors(q, x);  // U, S, Vh and info
  }

 private:
  // X_1, with every pass over B but the last 2 blocks.
  void start(Panel<T> q, Panel<T> x) {
    if (plan.complete) return;
    std::int64_t steps = plan.sweeps - 2 * plan.blocks;
    const bool from_left = steps % 2 != 0;
    e.sketch(from_left ? q : x, 0);
    for (bool left = from_left; steps > 0; --steps, left = !left) {
      if (left)
        e.multiply_transposed(q, x);
      else
        e.multiply(x, q);
      orthonormalize(left ? x : q, {}, 1);
    }
  }

  void orthonormalize(Panel<T> y, Panel<T> before, int passes) {
    structmat::orthonormalize(e, y, before, passes, random_streams);
  }

  static constexpr std::uint32_t kProbeStream = 1u << 31;
  Engine& e;
  const SvdPlan plan;
  std::uint32_t random_streams = 0;  // 0 is the sketch
};

}  // namespace structmat
