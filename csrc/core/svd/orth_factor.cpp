// SPDX-License-Identifier: Apache-2.0
#include "svd/orth_factor.h"

#include <algorithm>
#include <cmath>

#include "blas.h"
#include "svd/orth.h"

namespace structmat {
namespace {

// R of G = R^T R, where a row with a pivot below the threshold becomes one of the identity: its
// column is neither divided by noise nor subtracted from later ones.
void guarded_cholesky(double* g, std::int64_t n) {
  for (std::int64_t j = 0; j < n; ++j) {
    double* column = g + j * n;
    double pivot = column[j];
    for (std::int64_t i = 0; i < j; ++i) {
      const double* other = g + i * n;
      double sum = column[i];
      for (std::int64_t k = 0; k < i; ++k) sum -= other[k] * column[k];
      // other[i] < 0 marks the row of a small pivot.
      column[i] = other[i] > 0 ? sum / other[i] : 0.0;
      pivot -= column[i] * column[i];
    }
    const bool small = !(pivot >= kPivotThreshold);
    column[j] = small ? -1.0 : std::sqrt(pivot);
  }
  for (std::int64_t j = 0; j < n; ++j) g[j * n + j] = std::abs(g[j * n + j]);
}

}  // namespace

GramFactor factor_gram(double* gram, std::int64_t n, int pass, double eps) {
  GramFactor out;
  // After the first pass columns have norm 1, or what is left of 1: below 16 eps that is rounding.
  const double noise = pass > 0 ? 256 * eps * eps : 0.0;
  std::vector<double> scale(static_cast<std::size_t>(n));
  double deviation = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    const double square = gram[j * n + j];
    const bool empty = !(square > noise);
    if (empty) out.empty.push_back(j);
    scale[static_cast<std::size_t>(j)] = empty ? 0.0 : 1 / std::sqrt(square);
    deviation = std::max(deviation, std::abs(square - 1));
    for (std::int64_t i = 0; i < j; ++i) deviation = std::max(deviation, std::abs(gram[j * n + i]));
  }
  for (std::int64_t j = 0; j < n; ++j) {
    for (std::int64_t i = 0; i < j; ++i)
      gram[j * n + i] *= scale[static_cast<std::size_t>(i)] * scale[static_cast<std::size_t>(j)];
    gram[j * n + j] = 1;
  }
  const std::vector<double> scaled(gram, gram + n * n);
  bool whole = blas::potrf(static_cast<int>(n), gram, static_cast<int>(n)) == 0;
  for (std::int64_t j = 0; whole && j < n; ++j)
    whole = gram[j * n + j] * gram[j * n + j] >= kPivotThreshold;
  if (!whole) {
    std::copy(scaled.begin(), scaled.end(), gram);
    guarded_cholesky(gram, n);
  }
  blas::trtri(static_cast<int>(n), gram, static_cast<int>(n));
  for (std::int64_t j = 0; j < n; ++j)
    for (std::int64_t i = 0; i <= j; ++i) gram[j * n + i] *= scale[static_cast<std::size_t>(i)];
  // Columns this near to orthonormal are so to rounding after W; others need another look.
  out.done = whole && out.empty.empty() && deviation <= 0.1 && pass > 0;
  return out;
}

}  // namespace structmat
