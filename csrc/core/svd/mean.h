// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "half.h"

namespace structmat {

// first + offset as high + low, both of type T: x - high - low errs by the rounding of the result
// alone, however much larger the mean is.
template <class T>
STRUCTMAT_HOST_DEVICE inline void split_mean(double first, double offset, T& high, T& low) {
  const double sum = first + offset, part = sum - first;
  const double error = (first - (sum - part)) + (offset - part);  // of the addition
  high = static_cast<T>(sum);
  low = static_cast<T>((sum - static_cast<double>(high)) + error);
}

}  // namespace structmat
