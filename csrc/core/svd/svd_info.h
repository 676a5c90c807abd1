// SPDX-License-Identifier: Apache-2.0
// The facts reported with a decomposition. For host and device code.
#pragma once
#include <cmath>
#include <limits>

#include "half.h"
#include "structmat/svd.h"
#include "svd/svd_plan.h"

namespace structmat {

// ||(I - Q Q^T) A||^2 / ||A||^2 = 1 - share^2, share = ||Q^T A|| / ||A||; -1 where that is not far
// above its rounding, up to 8 eps.
template <class T>
STRUCTMAT_HOST_DEVICE inline double missed(std::int64_t tall, double share) {
  const double left = (1 - share) * (1 + share);
  // In double the sums of T and Q round with their length.
  const double chain = sizeof(T) == 8 ? sqrt(static_cast<double>(tall)) : 1.0;
  return left < 64 * std::numeric_limits<T>::epsilon() * chain ? -1.0 : left;
}

// ||A - U S Vh||^2 = ||(I - Q Q^T) A||^2 + the squares of the singular values left out. Where
// `missed` does not tell the first, it is the mean square of (I - Q Q^T) A on random directions,
// `outside`, in which nothing cancels. A complete basis leaves nothing.
template <class T>
STRUCTMAT_HOST_DEVICE inline SvdInfo svd_info(const SvdPlan& plan, const T* sigma, double norm,
                                              double captured, double outside) {
  const double eps = std::numeric_limits<T>::epsilon();
  const double inverse = norm > std::numeric_limits<double>::min() ? 1 / norm : 0.0;
  double left = missed<T>(plan.tall, inverse > 0 ? captured * inverse : 1.0);
  if (left < 0) left = outside * inverse * (outside * inverse);
  double tail = 0, rank = 0;
  for (std::int64_t i = 0; i < plan.basis(); ++i) {
    const double value = static_cast<double>(sigma[i]) * inverse;
    if (i >= plan.rank)
      tail += value * value;
    else if (sigma[i] > static_cast<T>(plan.tall) * static_cast<T>(eps) * sigma[0])
      rank += 1;
  }
  const double error = sqrt(tail + (plan.complete ? 0.0 : left));
  const double floor = norm > 0 ? 16 * eps : 0.0;  // rounding in U S Vh
  return {error < floor ? floor : error, norm, rank, static_cast<double>(plan.sweeps), 1.0};
}

}  // namespace structmat
