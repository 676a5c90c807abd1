// SPDX-License-Identifier: Apache-2.0
// How far Q Q^T A is from A, from the products that found Q, and the least rank that meets a
// tolerance. Host code. In units of ||A||_F.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "svd/svd_plan.h"

namespace structmat {

// ||(I - Q Q^T) A||_F^2: an estimate and a bound that one case in a thousand exceeds.
struct SvdTail {
  double estimate = 0, bound = 0;
};

// `share` is ||Q^T A||. Where 1 - share^2 would be rounding the tail comes from Gaussian columns G
// that had no part in Q: the mean of ||(I - Q Q^T) A g||^2 does not cancel. `gram` (kProbes,
// kProbes) is that of (I - Q Q^T) A G. `rounding` is that of a sum of squares, some eps.
inline SvdTail tail_of(double share, const double* gram, double eps, double rounding) {
  const double floor = (8 * eps) * (8 * eps), missed = (1 - share) * (1 + share);
  if (missed >= 64 * rounding) return {missed, missed + 16 * rounding};
  constexpr std::int64_t s = kProbes;
  double left = 0, squares = 0;
  for (std::int64_t i = 0; i < s; ++i) {
    left += gram[i * s + i] / s;
    for (std::int64_t j = 0; j < s; ++j)
      if (i != j) squares += gram[i * s + j] * gram[i * s + j];
  }
  if (left == 0) return {0, floor};
  // A sum of chi-squares: s times as many degrees of freedom as the rest has singular values that
  // count, (sum sigma^2)^2 / sum sigma^4, whose denominator the products of two probes estimate.
  const double fourth = squares / (s * (s - 1)), square = left * left;
  const double spread = std::max(1.0, square / std::max(fourth, 1e-12 * square) / 2);
  const double slack = 2 / (9 * s * spread);  // Wilson and Hilferty's quantile of chi-square
  const double low = 1 - slack - 3.09 * std::sqrt(slack);  // deviations: one in a thousand
  return {left, left / (low * low * low) + floor};
}

// A bound of the error of the first k triplets, whose singular values err by some eps of the first.
inline double error_bound(const std::vector<double>& sigma, std::size_t k, const SvdTail& tail,
                          double eps) {
  double left = 0;
  for (std::size_t i = sigma.size(); i-- > k;) left += sigma[i] * sigma[i];
  return std::sqrt(left + tail.bound) + 8 * eps;
}

// The least rank for which that is at most `rtol`; 0: there is none.
inline std::int64_t least_rank(const std::vector<double>& sigma, const SvdTail& tail, double eps,
                               double rtol) {
  if (!(error_bound(sigma, sigma.size(), tail, eps) <= rtol)) return 0;
  std::size_t k = sigma.size();
  double left = 0;
  while (k > 1) {
    left += sigma[k - 1] * sigma[k - 1];
    if (!(std::sqrt(left + tail.bound) + 8 * eps <= rtol)) break;
    --k;
  }
  return static_cast<std::int64_t>(k);
}

}  // namespace structmat
