// SPDX-License-Identifier: Apache-2.0
// The steps of top_eigenpairs.h, with the best instruction set: tridiagonal form by reflections
// (Golub, Van Loan, Matrix Computations, 4th ed., 8.3.1), eigenvalues by multisection with Sturm
// counts (8.4.1), vectors by inverse iteration with vectors of close eigenvalues made orthogonal
// (8.2.2; LAPACK's dstein).
#pragma once
#include <cstdint>

#include "ceil_div.h"

namespace structmat {

// Stride of a matrix of n columns: whole vectors of every instruction set.
constexpr std::int64_t padded(std::int64_t n) {
  return ceil_div(n, 8) * 8;
}

// G = Q T Q^T, T with diagonal d (n) and e (n - 1) beside it. G (n, padded(n)), both triangles,
// zero past column n, becomes the reflections, row by row, with factors tau (n). `work`: 4
// padded(n).
void tridiagonalize(double* g, std::int64_t n, double* d, double* e, double* tau, double* work);

// vectors (count, padded(n)) <- Q vectors. Clears what `g` holds beside the reflections.
void apply_reflections(double* g, const double* tau, std::int64_t n, double* vectors,
                       std::int64_t count);

// The `count` largest eigenvalues of T, descending. False for T = 0. `work`: n. For more than some
// 16 of them dsterf is faster.
bool top_tridiagonal_values(const double* d, const double* e, std::int64_t n, std::int64_t count,
                            double* values, double* work);

// Vectors (count, padded(n)) of T for eigenvalues in descending order, eight at a time. False where
// inverse iteration does not converge. `work`: tridiagonal_work n.
constexpr std::int64_t tridiagonal_work = 48;
bool tridiagonal_vectors(const double* d, const double* e, std::int64_t n, std::int64_t count,
                         const double* values, double* vectors, double* work);

}  // namespace structmat
