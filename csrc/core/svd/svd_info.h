// SPDX-License-Identifier: Apache-2.0
// The facts reported with a decomposition. For host and device code.
#pragma once
#include <cmath>
#include <limits>

#include "half.h"
#include "structmat/svd.h"
#include "svd/svd_plan.h"

namespace structmat {

// ||A - U S Vh||^2 = ||A||^2 - ||T||^2 + the squares of the singular values left out. The
// difference carries the rounding of T, relative to ||A||^2 up to 8 eps: an error below the root of
// that cannot be told from it. A complete basis leaves nothing, so there no difference is taken.
template <class T>
STRUCTMAT_HOST_DEVICE inline SvdInfo svd_info(const SvdPlan& plan, const T* sigma, double norm,
                                              double captured) {
  const double eps = std::numeric_limits<T>::epsilon();
  const double inverse = norm > std::numeric_limits<double>::min() ? 1 / norm : 0.0;
  double tail = 0, rank = 0;
  for (std::int64_t i = 0; i < plan.basis(); ++i) {
    const double value = static_cast<double>(sigma[i]) * inverse;
    if (i >= plan.rank)
      tail += value * value;
    else if (sigma[i] > static_cast<T>(plan.tall) * static_cast<T>(eps) * sigma[0])
      rank += 1;
  }
  const double share = inverse > 0 ? captured * inverse : 1.0;
  const double outside = plan.complete ? 0.0 : (1 - share) * (1 + share);
  const double square = (outside > 0 ? outside : 0.0) + tail;
  const double floor = norm > 0 ? (plan.complete ? 32 * eps : sqrt(8 * eps)) : 0.0;
  const double error = sqrt(square);
  return {error < floor ? floor : error, norm, rank, static_cast<double>(plan.sweeps), 1.0};
}

}  // namespace structmat
