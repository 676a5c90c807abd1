// SPDX-License-Identifier: Apache-2.0
// The randomized SVD of B (tall x small), once for all back ends:
//   X_1 random, after sweeps - 2 blocks steps of subspace iteration by B and B^T;
//   Q_j = orth(B X_j),  T_j = B^T Q_j,  X_{j+1} = T_j less its part in X_j;
//   the last B X_j comes with B G for random G, which tells ||(I - Q Q^T) B||;
//   T = [T_1 ..] = X R with X = orth(T),  R = P S W^T,  B ~ (Q W) S (X P)^T;
//   or, where S falls little, T^T T = W S^2 W^T,  B ~ (Q W) S (T W / S)^T.
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
    const bool begun = start(q.columns(0, b), x.columns(0, b));
    for (std::int64_t j = 0; j < plan.blocks; ++j) {
      const bool last = j + 1 == plan.blocks;
      const std::int64_t own = last ? plan.last : b, width = own + (last ? plan.probes : 0);
      const Panel<T> qj = q.columns(j * b, own), xj = x.columns(j * b, own);
      if (j > 0) {
        e.copy(t.columns((j - 1) * b, own), xj);
        // Its part in earlier blocks is rounding, and Q has what B makes of it (Simon and Zha, SIAM
        // J. Sci. Comput. 21 (2000)). A random X_1 is no basis to project on, nor in its panel.
        orthonormalize(xj, j > 1 || begun ? x.columns((j - 1) * b, b) : Panel<T>{}, 1);
      }
      // The last product takes along random columns that have no part in the basis.
      if (width > own) e.sketch(x.columns(j * b + own, plan.probes), kProbeStream);
      if (plan.complete)
        e.load(qj);
      else if (j == 0 && !begun && !last)
        e.multiply_random(xj, qj);
      else
        e.multiply(x.columns(j * b, width), q.columns(j * b, width));
      orthonormalize(qj, q.columns(0, j * b), kOrthPasses);
      e.multiply_transposed(qj, t.columns(j * b, own));
    }
    const bool by_gram = e.svd_by_gram(t);
    if (!by_gram) {
      e.copy(t, x);
      orthonormalize(x, {}, kOrthPasses);
      e.small_svd(x, t, plan.rank);  // R = X^T T = P S W^T
      // Jacobi's iteration divides by singular values, which leaves out the vectors of zeros.
      for (const Panel<T>& y : e.rough_vectors()) orthonormalize(y, {}, kOrthPasses);
    }
    if (plan.probes > 0 && e.asks_outside())
      e.measure_outside(q.columns(plan.basis(), plan.probes), q);
    e.factors(q, by_gram ? t : x);  // U, S, Vh and info
  }

 private:
  // X_1, with every pass over B but the last 2 blocks; whether there were any.
  bool start(Panel<T> q, Panel<T> x) {
    if (plan.complete) return false;
    std::int64_t steps = plan.sweeps - 2 * plan.blocks;
    if (steps == 0) {
      if (plan.blocks == 1) e.sketch(x, 0);  // its only product is that with the probes
      return false;
    }
    bool left = steps % 2 != 0;
    if (left)
      e.multiply_random_transposed(q, x);
    else
      e.multiply_random(x, q);
    orthonormalize(left ? x : q, {}, 1);
    while (--steps > 0) {
      left = !left;
      if (left)
        e.multiply_transposed(q, x);
      else
        e.multiply(x, q);
      orthonormalize(left ? x : q, {}, 1);
    }
    return true;
  }

  // y <- a basis of span(y), orthogonal to the orthonormal `before`. Columns that bring nothing new
  // are replaced by random ones. One pass makes a basis that is merely well conditioned.
  void orthonormalize(Panel<T> y, Panel<T> before, int passes) {
    e.orthonormalize(y, before, passes, random_streams);
  }

  static constexpr std::uint32_t kProbeStream = 1u << 31;
  Engine& e;
  const SvdPlan plan;
  std::uint32_t random_streams = 0;  // 0 is the sketch
};

}  // namespace structmat
