// SPDX-License-Identifier: Apache-2.0
#include "simd.h"
#include "svd/orth_simd.h"

namespace structmat {

#define STRUCTMAT_DECLARE_ORTH(level)                                                             \
  namespace level {                                                                               \
  void add_gram(const float*, std::int64_t, std::int64_t, std::int64_t, double*);                 \
  void add_gram(const double*, std::int64_t, std::int64_t, std::int64_t, double*);                \
  void solve_rows(const float*, std::int64_t, float*, std::int64_t, std::int64_t, std::int64_t,   \
                  const double*, const double*, const double*);                                   \
  void solve_rows(const double*, std::int64_t, double*, std::int64_t, std::int64_t, std::int64_t, \
                  const double*, const double*, const double*);                                   \
  }
STRUCTMAT_DECLARE_ORTH(baseline)
STRUCTMAT_DECLARE_ORTH(avx2)
STRUCTMAT_DECLARE_ORTH(avx512)

template <class T>
void add_gram(const T* y, std::int64_t row_stride, std::int64_t rows, std::int64_t cols,
              double* gram) {
  STRUCTMAT_SIMD_CALL(add_gram, y, row_stride, rows, cols, gram);
}
template <class T>
void solve_rows(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride,
                std::int64_t rows, std::int64_t cols, const double* minus_r, const double* scale,
                const double* inverse) {
  STRUCTMAT_SIMD_CALL(solve_rows, from, from_stride, to, to_stride, rows, cols, minus_r, scale,
                      inverse);
}
template void add_gram(const float*, std::int64_t, std::int64_t, std::int64_t, double*);
template void add_gram(const double*, std::int64_t, std::int64_t, std::int64_t, double*);
template void solve_rows(const float*, std::int64_t, float*, std::int64_t, std::int64_t,
                         std::int64_t, const double*, const double*, const double*);
template void solve_rows(const double*, std::int64_t, double*, std::int64_t, std::int64_t,
                         std::int64_t, const double*, const double*, const double*);

}  // namespace structmat
