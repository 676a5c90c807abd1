// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cmath>

#include "cuda/device.h"
#include "structmat/activation.h"

namespace structmat::cuda {

template <class Sum>
__device__ Sum activated(Sum z, Activation activation) {
  switch (activation) {
    case Activation::relu:
      return z < 0 ? Sum{0} : z;
    case Activation::gelu:
      return z * (Sum{0.5} * erfc(z * Sum{-0.70710678118654752}));
    case Activation::silu:
      return z / (Sum{1} + exp(-z));
    default:
      return z;
  }
}

}  // namespace structmat::cuda
