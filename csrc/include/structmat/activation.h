// SPDX-License-Identifier: Apache-2.0
// What may be applied to a result before it is rounded and stored.
#pragma once
#include <cstdint>

namespace structmat {

enum class Activation : std::int32_t {
  none = 0,
  relu = 1,  // max(z, 0), NaN stays
  gelu = 2,  // z Phi(z), Phi the normal distribution's function: the exact form, by erf
  silu = 3,  // z / (1 + exp(-z))
};

}  // namespace structmat
