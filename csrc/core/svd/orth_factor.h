// SPDX-License-Identifier: Apache-2.0
// The small triangular factor of one pass of CholeskyQR (orth.h), on the CPU.
#pragma once
#include <cstdint>
#include <vector>

namespace structmat {

struct GramFactor {
  std::vector<std::int64_t> empty;  // columns with nothing left in them
  bool done = false;                // after multiplication by W the columns are orthonormal
};

// From the upper triangle of G = Y^T Y (by columns, n x n) W, upper triangular, in its place:
// Y W has orthonormal columns, but for those too close to the span of their predecessors, which are
// made orthogonal to that span as far as rounding allows and keep their small norm. `eps` is that
// of Y.
GramFactor factor_gram(double* gram, std::int64_t n, int pass, double eps);

}  // namespace structmat
