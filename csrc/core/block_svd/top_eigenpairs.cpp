// SPDX-License-Identifier: Apache-2.0
#include "block_svd/top_eigenpairs.h"

#include <algorithm>

#include "blas.h"
#include "simd.h"

namespace structmat {

#define STRUCTMAT_DECLARE_EIGENPAIRS(level)                                                      \
  namespace level {                                                                              \
  void tridiagonalize(double*, std::int64_t, double*, double*, double*, double*);                \
  void apply_reflections(double*, const double*, std::int64_t, double*, std::int64_t);           \
  bool top_tridiagonal_values(const double*, const double*, std::int64_t, std::int64_t, double*, \
                              double*);                                                          \
  bool tridiagonal_vectors(const double*, const double*, std::int64_t, std::int64_t,             \
                           const double*, double*, double*);                                     \
  }
STRUCTMAT_DECLARE_EIGENPAIRS(baseline)
STRUCTMAT_DECLARE_EIGENPAIRS(avx2)
STRUCTMAT_DECLARE_EIGENPAIRS(avx512)

namespace {

// Up to here reflections made one by one are faster than LAPACK's in blocks: 103 against 188 us for
// n = 128, 1.0 ms both for 256.
constexpr std::int64_t kLargestInCache = 192;
constexpr std::int64_t kFewValues = 16;  // up to here multisection is faster than LAPACK's dsterf

}  // namespace

bool top_eigenpairs(double* g, std::int64_t n, std::int64_t most, double* values,
                    std::int64_t count, double* vectors, double* work) {
  const std::int64_t stride = padded(n);
  const int size = static_cast<int>(n), leading = static_cast<int>(stride);
  double *d = work, *e = d + stride, *tau = e + stride, *rest = tau + stride;
  const bool small = n <= kLargestInCache;
  if (small) {
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < i; ++j) g[j * stride + i] = g[i * stride + j];
      std::fill(g + i * stride + n, g + (i + 1) * stride, 0.0);
    }
    STRUCTMAT_SIMD_CALL(tridiagonalize, g, n, d, e, tau, rest);
  } else {
    blas::sytrd(size, g, leading, d, e, tau);
  }
  if (most > kFewValues) {
    double *all = rest, *beside = all + stride;
    std::copy_n(d, n, all);
    std::copy_n(e, n - 1, beside);
    if (!blas::sterf(size, all, beside)) return false;
    for (std::int64_t r = 0; r < most; ++r) values[r] = all[n - 1 - r];
  } else if (!STRUCTMAT_SIMD_CALL(top_tridiagonal_values, d, e, n, most, values, rest)) {
    return false;
  }
  if (!STRUCTMAT_SIMD_CALL(tridiagonal_vectors, d, e, n, count, values, vectors, rest))
    return false;
  if (small)
    STRUCTMAT_SIMD_CALL(apply_reflections, g, tau, n, vectors, count);
  else
    blas::ormtr(size, static_cast<int>(count), g, leading, tau, vectors, leading);
  return true;
}

}  // namespace structmat
