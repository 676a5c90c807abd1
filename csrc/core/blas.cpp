// SPDX-License-Identifier: Apache-2.0
#include "blas.h"

#ifdef STRUCTMAT_BLAS_SCIPY_OPENBLAS
#define BLAS(name) scipy_##name##_
extern "C" void scipy_openblas_set_num_threads(int);
extern "C" char* scipy_openblas_get_config(void);
namespace {
// OpenBLAS's own pool next to OpenMP's made small calls 20x slower, and results depend on its size.
[[maybe_unused]] const int one_thread = (scipy_openblas_set_num_threads(1), 0);
}  // namespace
#else
#define BLAS(name) name##_
#endif

extern "C" {
void BLAS(sgemm)(const char*, const char*, const int*, const int*, const int*, const float*,
                 const float*, const int*, const float*, const int*, const float*, float*,
                 const int*);
void BLAS(dgemm)(const char*, const char*, const int*, const int*, const int*, const double*,
                 const double*, const int*, const double*, const int*, const double*, double*,
                 const int*);
}

namespace structmat::blas {

#ifdef STRUCTMAT_BLAS_SCIPY_OPENBLAS
const char* name() {
  return scipy_openblas_get_config();
}
#else
const char* name() {
  return "the system's LAPACK";
}
#endif

void gemm(char transa, char transb, int m, int n, int k, float alpha, const float* a, int lda,
          const float* b, int ldb, float beta, float* c, int ldc) {
  BLAS(sgemm)(&transa, &transb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}
void gemm(char transa, char transb, int m, int n, int k, double alpha, const double* a, int lda,
          const double* b, int ldb, double beta, double* c, int ldc) {
  BLAS(dgemm)(&transa, &transb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}

}  // namespace structmat::blas
