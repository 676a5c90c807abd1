// SPDX-License-Identifier: Apache-2.0
// The randomized SVD of B (tall x small) to a tolerance, once for all back ends: the block Krylov
// recurrence of svd_algorithm.h without an end,
//   Q_j = orth(B X_j),  T_j = B^T Q_j,  X_{j+1} = [T_j, random columns] less its part in X_1 ..
//   X_j,
// until the certificate says that Q holds enough, and more than the wanted rank by a factor that
// makes this rank nearly the least. Half the products of blocks that four passes refine each: at
// singular values i^-1/2, 1/i and exp(-i/100) of 1500 and errors 0.6, 0.03 and 0.03 this takes 384,
// 1440 and 1008 products of a column, and those 512, 2048 and 2048.
//
// The host looks at a few numbers after each block, and on a GPU waits for them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "ceil_div.h"
#include "svd/certificate.h"
#include "svd/orth.h"
#include "svd/svd_kernels.h"

namespace structmat {

template <class Engine>
class SvdToToleranceOf final : public SvdSearch {
 public:
  using T = typename Engine::Scalar;

  // `start` makes the engine for a plan.
  template <class Start>
  SvdToToleranceOf(const SvdPlan& plan, double rtol, const SvdOptions& options, const Start& start)
      : plan_(first_plan(plan)),
        rtol_(rtol),
        oversample_(options.oversample.value_or(0)),
        max_sweeps_(options.sweeps.value_or(std::numeric_limits<std::int64_t>::max())),
        e(start(plan_)) {
    if constexpr (requires { e.keep_digits(); }) e.keep_digits();
    do {
      if (have_ + width() >= plan_.small)
        fill();
      else
        append();
      sweeps_ += 2;
    } while (!found());
  }

  std::int64_t rank() const override { return rank_; }

  void factors(MatrixView u, VectorView s, MatrixView vh, SvdInfo* info) override {
    SvdPlan plan = plan_;
    plan.rank = rank_;
    plan.block = plan.last = have_;
    plan.blocks = 1;
    plan.sweeps = sweeps_;
    const Panel<T> q = e.q().columns(0, have_);
    e.finish(plan, u, s, vh, info);
    e.factors(q, v_.panel);
    e.report(converged_);
    e.finish(plan_, {}, {}, {}, nullptr);
  }

 private:
  // 48 columns fill the vectors of every instruction set. Those that join each later block find the
  // copies of a singular value repeated more often than a block is wide.
  static constexpr std::int64_t kFirstWidth = 48, kFreshWidth = 8;
  static constexpr double kEps = std::numeric_limits<T>::epsilon();
  static constexpr std::uint32_t kFreshStream = 1u << 30, kProbeStream = 1u << 31;

  static SvdPlan first_plan(SvdPlan plan) {
    plan.probes = kProbes;
    plan.complete = plan.narrow = false;
    return room(plan, kFirstWidth, kFirstWidth);
  }
  // The plan of an engine with buffers for `columns`, or somewhat more, added `block` at a time.
  static SvdPlan room(SvdPlan plan, std::int64_t columns, std::int64_t block) {
    plan.block = plan.last = block;
    plan.blocks = ceil_div(columns, block);
    plan.rank = plan.basis();
    return plan;
  }
  std::int64_t width() const { return blocks_ == 0 ? kFirstWidth : last_ + kFreshWidth; }

  void append() {
    const std::int64_t b = width();
    if (have_ + b > plan_.basis() || b > plan_.block) {
      plan_ = room(plan_, 2 * (have_ + b), b + 8 * kFreshWidth);
      e.resize(plan_, have_);
    }
    const Panel<T> q = e.q(), x = e.x(), t = e.t();
    const Panel<T> qj = q.columns(have_, b), xj = x.columns(have_, b);
    if (blocks_ == 0) {
      e.sketch(xj, 0);
      e.sketch(x.columns(b, kProbes), kProbeStream);
      e.multiply(x.columns(0, b + kProbes), q.columns(0, b + kProbes));
      probes_ = e.allocate(plan_.tall, kProbes);
      e.copy(q.columns(b, kProbes), probes_.panel);
    } else {
      e.copy(t.columns(have_ - last_, last_), xj.columns(0, last_));
      e.sketch(xj.columns(last_, kFreshWidth), kFreshStream + static_cast<std::uint32_t>(blocks_));
      // As in svd_algorithm.h: the first block is Gaussian, and one block back is enough.
      orthonormalize(xj, blocks_ > 1 ? x.columns(have_ - last_, last_) : Panel<T>{}, 1);
      e.multiply(xj, qj);
    }
    orthonormalize(qj, q.columns(0, have_), kOrthPasses);
    e.multiply_transposed(qj, t.columns(have_, b));
    have_ += b;
    last_ = b;
    ++blocks_;
  }

  // The whole space of the small side: the decomposition is exact.
  void fill() {
    plan_.complete = true;
    plan_.probes = 0;
    plan_ = room(plan_, plan_.small, plan_.small);
    e.resize(plan_, 0);
    have_ = plan_.small;
    e.load(e.q());
    orthonormalize(e.q(), {}, kOrthPasses);
    e.multiply_transposed(e.q(), e.t());
  }

  // Whether to stop here; then the rank is known.
  bool found() {
    const Panel<T> q = e.q().columns(0, have_), t = e.t().columns(0, have_);
    const double norm = e.norm();  // throws where it is not finite
    SvdTail tail;
    if (!plan_.complete) {
      double gram[kProbes * kProbes] = {};
      const Panel<T> y = outside_panel(q);
      e.copy(probes_.panel, y);
      e.measure_outside(y, q);
      if (norm > 0) {
        e.gram_of(y, norm, gram);
        // In double the sums of T and Q round with their length.
        const double chain = sizeof(T) == 8 ? std::sqrt(static_cast<double>(plan_.tall)) : 1.0;
        tail = tail_of(e.norm_of(t) / norm, gram, kEps, kEps * chain);
      }
    } else if (norm > 0) {
      tail.bound = (8 * kEps) * (8 * kEps);
    }
    const bool exact = norm == 0 || plan_.complete;
    // What is left is rounding: no basis gets below it.
    const bool last =
        exact || max_sweeps_ - sweeps_ < 2 || tail.bound <= 4 * (8 * kEps) * (8 * kEps);
    const bool met = norm == 0 || std::sqrt(tail.bound) + 8 * kEps <= rtol_;
    if (!last && (!met || have_ < 0.9 * margin() * static_cast<double>(rank_))) return false;

    v_ = e.allocate(plan_.small, have_);
    e.copy(t, v_.panel);
    orthonormalize(v_.panel, {}, kOrthPasses);
    e.small_svd(v_.panel, t, have_);
    for (const Panel<T>& y : e.rough_vectors()) orthonormalize(y, {}, kOrthPasses);
    std::vector<double> sigma = e.singular_values(have_);
    for (double& value : sigma) value = norm > 0 ? value / norm : 0.0;
    rank_ = norm > 0 ? least_rank(sigma, tail, kEps, rtol_) : 1;
    converged_ = rank_ > 0;
    if (!converged_) rank_ = have_;
    return last || (converged_ && have_ >= margin() * static_cast<double>(rank_) &&
                    have_ >= rank_ + oversample_);
  }

  // How many times the rank a basis must have for that rank to be within a tenth of the least:
  // measured at singular values i^-1/2 to i^-2 and exp(-i/20) to exp(-i/100), of 1500 and 2500.
  double margin() const {
    constexpr double of_blocks[] = {3, 2.25, 1.75, 1.5, 1.3};
    return of_blocks[std::min<std::int64_t>(blocks_, 5) - 1];
  }

  // kProbes columns behind those that the basis has used.
  Panel<T> outside_panel(Panel<T> q) const {
    return {q.data + plan_.basis(), q.rows, kProbes, q.stride};
  }

  void orthonormalize(Panel<T> y, Panel<T> before, int passes) {
    e.orthonormalize(y, before, passes, random_streams_);
  }

  SvdPlan plan_;  // of the engine's buffers
  const double rtol_;
  const std::int64_t oversample_, max_sweeps_;
  Engine e;
  typename Engine::Owned probes_, v_;  // B G; the basis of T's columns
  std::int64_t have_ = 0, last_ = 0, blocks_ = 0, sweeps_ = 0, rank_ = 0;
  bool converged_ = false;
  std::uint32_t random_streams_ = 0;  // 0 is the sketch
};

}  // namespace structmat
