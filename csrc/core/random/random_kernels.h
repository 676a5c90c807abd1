// SPDX-License-Identifier: Apache-2.0
// The back ends of random.h.
#pragma once
#include <cstdint>

#include "structmat/context.h"
#include "structmat/matrix.h"

namespace structmat {

void fill_gaussian_cpu(const Context& context, MatrixView out, std::uint64_t seed,
                       std::uint32_t stream);
void fill_gaussian_cuda(const Context& context, MatrixView out, std::uint64_t seed,
                        std::uint32_t stream);

// Rows [first, last) of out, on the calling thread, with the best instruction set.
template <class T>
void fill_gaussian_rows(T* out, std::int64_t row_stride, std::int64_t first, std::int64_t last,
                        std::int64_t cols, std::uint64_t seed, std::uint32_t stream);

}  // namespace structmat
