// SPDX-License-Identifier: Apache-2.0
// The units of a state's rows and the facts reported with a result. For host and device code.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "half.h"
#include "structmat/svd.h"

namespace structmat {

// float64 rows are kept in units of the power of two below facts[1], their largest magnitude, which
// fades as they do: squares neither overflow nor vanish.
STRUCTMAT_HOST_DEVICE inline double streaming_svd_unit(double largest) {
  if (!(largest > 0)) return 1.0;
  const double least = std::numeric_limits<double>::min();  // its inverse is finite
  return largest < least ? least : ldexp(1.0, ilogb(largest));
}
// From the unit of rows up to `from` to that of rows up to `to`.
STRUCTMAT_HOST_DEVICE inline double streaming_svd_ratio(double from, double to) {
  return from > 0 ? streaming_svd_unit(from) / streaming_svd_unit(to) : 1.0;
}
// The weight of old rows in facts[1]: bounded, so that they stay finite in units of it.
STRUCTMAT_HOST_DEVICE inline double streaming_svd_faded(double weight) {
  return weight < 0x1p-1000 ? 0x1p-1000 : weight;
}

// Eigenvalues below this are rounding, given the largest of a matrix of `size` rows.
STRUCTMAT_HOST_DEVICE inline double streaming_svd_noise(std::int64_t size, double largest) {
  return static_cast<double>(size) * std::numeric_limits<double>::epsilon() * largest;
}

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
