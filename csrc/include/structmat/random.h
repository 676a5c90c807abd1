// SPDX-License-Identifier: Apache-2.0
// Random matrices from a counter: entry (i, j) is a function of (seed, stream, i, j) alone.
#pragma once
#include <cstdint>

#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"

namespace structmat {

// out[i, j] ~ N(0, 1), independent; float32 or float64 (the float32 numbers, widened). The CPU, any
// GPU and any number of threads write the same bits. Distinct streams of a seed are independent.
STRUCTMAT_API void fill_gaussian(const Context& context, MatrixView out, std::uint64_t seed,
                                 std::uint32_t stream = 0);

}  // namespace structmat
