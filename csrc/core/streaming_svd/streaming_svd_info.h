// SPDX-License-Identifier: Apache-2.0
// The facts reported with a result. For host and device code.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "half.h"
#include "structmat/svd.h"

namespace structmat {

// Singular values of n columns below this share of the first are rounding. Those of second moments
// are roots of eigenvalues, hence known to the root of float64's precision.
STRUCTMAT_HOST_DEVICE inline double streaming_svd_resolution(std::int64_t n, bool exact,
                                                             double eps) {
  const double of_rows = static_cast<double>(n) * eps;
  const double of_moments =
      exact ? sqrt(static_cast<double>(n) * std::numeric_limits<double>::epsilon()) : 0.0;
  return of_rows > of_moments ? of_rows : of_moments;
}

// From the squares of the singular values kept and those of all others, in units of `unit`.
STRUCTMAT_HOST_DEVICE inline SvdInfo streaming_svd_info(double kept, double lost, double rank,
                                                        bool whole, double unit) {
  const double total = kept + lost, norm = sqrt(total) * unit;
  const double floor = 2 * sqrt(std::numeric_limits<double>::epsilon());
  double error = total > 0 ? sqrt(lost / total) : 0.0;
  if (total > 0 && !whole && error < floor) error = floor;
  return {error, norm, rank, 1.0, 1.0};
}

}  // namespace structmat
