// SPDX-License-Identifier: Apache-2.0
// The two products of a pass of orthonormalisation (orth.h) over a tile of rows, in double whatever
// the type of the rows, on the calling thread and with the best instruction set. Sums run over rows
// and columns in order: the bits depend on the instruction set alone.
#pragma once
#include <cstdint>

#include "ceil_div.h"

namespace structmat {

// Stride of a small square matrix of n columns: whole blocks of every instruction set.
constexpr std::int64_t gram_stride(std::int64_t n) {
  return ceil_div(n, 16) * 16;
}

// gram[j * stride + i] += sum_r y[r, j] y[r, i] for i <= j; the rest of the stride x stride numbers
// is overwritten.
template <class T>
void add_gram(const T* y, std::int64_t row_stride, std::int64_t rows, std::int64_t cols,
              double* gram);

// to = (from D) R^-1 by substitution, D = diag(scale): `minus_r` holds -R above its diagonal,
// row-major with gram_stride(cols), `inverse` one over the diagonal. `from` may be `to`.
template <class T>
void solve_rows(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride,
                std::int64_t rows, std::int64_t cols, const double* minus_r, const double* scale,
                const double* inverse);

}  // namespace structmat
