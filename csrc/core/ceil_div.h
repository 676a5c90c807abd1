// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>

namespace structmat {

// How many tiles of `b` cover `a`, which is not below zero. In kernels, too.
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace structmat
