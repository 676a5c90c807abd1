// SPDX-License-Identifier: Apache-2.0
#include "blas.h"

#include <cstddef>
#include <vector>

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
void BLAS(dsyrk)(const char*, const char*, const int*, const int*, const double*, const double*,
                 const int*, const double*, double*, const int*);
void BLAS(dpotrf)(const char*, const int*, double*, const int*, int*);
void BLAS(dtrtri)(const char*, const char*, const int*, double*, const int*, int*);
void BLAS(dtrsm)(const char*, const char*, const char*, const char*, const int*, const int*,
                 const double*, const double*, const int*, double*, const int*);
void BLAS(sgeqrf)(const int*, const int*, float*, const int*, float*, float*, const int*, int*);
void BLAS(dgeqrf)(const int*, const int*, double*, const int*, double*, double*, const int*, int*);
void BLAS(sormqr)(const char*, const char*, const int*, const int*, const int*, const float*,
                  const int*, const float*, float*, const int*, float*, const int*, int*);
void BLAS(dormqr)(const char*, const char*, const int*, const int*, const int*, const double*,
                  const int*, const double*, double*, const int*, double*, const int*, int*);
void BLAS(dsyevd)(const char*, const char*, const int*, double*, const int*, double*, double*,
                  const int*, int*, const int*, int*);
void BLAS(dsterf)(const int*, double*, double*, int*);
void BLAS(dsytrd)(const char*, const int*, double*, const int*, double*, double*, double*, double*,
                  const int*, int*);
void BLAS(dormtr)(const char*, const char*, const char*, const int*, const int*, const double*,
                  const int*, const double*, double*, const int*, double*, const int*, int*);
void BLAS(sgesvd)(const char*, const char*, const int*, const int*, float*, const int*, float*,
                  float*, const int*, float*, const int*, float*, const int*, int*);
void BLAS(dgesvd)(const char*, const char*, const int*, const int*, double*, const int*, double*,
                  double*, const int*, double*, const int*, double*, const int*, int*);
void BLAS(sgesdd)(const char*, const int*, const int*, float*, const int*, float*, float*,
                  const int*, float*, const int*, float*, const int*, int*, int*);
void BLAS(dgesdd)(const char*, const int*, const int*, double*, const int*, double*, double*,
                  const int*, double*, const int*, double*, const int*, int*, int*);
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

void syrk(int n, int k, double alpha, const double* a, int lda, double beta, double* c, int ldc) {
  BLAS(dsyrk)("U", "N", &n, &k, &alpha, a, &lda, &beta, c, &ldc);
}
int potrf(int n, double* a, int lda) {
  int info = 0;
  BLAS(dpotrf)("U", &n, a, &lda, &info);
  return info;
}
void trtri(int n, double* a, int lda) {
  int info = 0;
  BLAS(dtrtri)("U", "N", &n, a, &lda, &info);
}
void trsm(char trans, int m, int n, const double* r, int ldr, double* b, int ldb) {
  const double one = 1;
  BLAS(dtrsm)("R", "U", &trans, "N", &m, &n, &one, r, &ldr, b, &ldb);
}

namespace {

// Asks for the size of the work space, then calls with it.
template <class T, class Call>
void with_work(Call call) {
  T size = 0;
  int query = -1;
  call(&size, &query);
  // A float holds 24 bits: a larger size may have been rounded down.
  const int lwork = static_cast<int>(static_cast<double>(size) * 1.000001) + 1;
  std::vector<T> work(static_cast<std::size_t>(lwork));
  call(work.data(), &lwork);
}

template <class T, class Geqrf>
void geqrf_with(Geqrf geqrf, int m, int n, T* a, int lda, T* tau) {
  int info = 0;
  with_work<T>([&](T* work, const int* lwork) { geqrf(&m, &n, a, &lda, tau, work, lwork, &info); });
}
template <class T, class Ormqr>
void ormqr_with(Ormqr ormqr, int m, int k, int n, const T* a, int lda, const T* tau, T* c,
                int ldc) {
  int info = 0;
  with_work<T>([&](T* work, const int* lwork) {
    ormqr("L", "N", &m, &k, &n, a, &lda, tau, c, &ldc, work, lwork, &info);
  });
}

}  // namespace

void geqrf(int m, int n, float* a, int lda, float* tau) {
  geqrf_with(BLAS(sgeqrf), m, n, a, lda, tau);
}
void geqrf(int m, int n, double* a, int lda, double* tau) {
  geqrf_with(BLAS(dgeqrf), m, n, a, lda, tau);
}
void ormqr(int m, int k, int n, const float* a, int lda, const float* tau, float* c, int ldc) {
  ormqr_with(BLAS(sormqr), m, k, n, a, lda, tau, c, ldc);
}
void ormqr(int m, int k, int n, const double* a, int lda, const double* tau, double* c, int ldc) {
  ormqr_with(BLAS(dormqr), m, k, n, a, lda, tau, c, ldc);
}
void sytrd(int n, double* a, int lda, double* d, double* e, double* tau) {
  int info = 0;
  with_work<double>([&](double* work, const int* lwork) {
    BLAS(dsytrd)("U", &n, a, &lda, d, e, tau, work, lwork, &info);
  });
}
void ormtr(int n, int k, const double* a, int lda, const double* tau, double* c, int ldc) {
  int info = 0;
  with_work<double>([&](double* work, const int* lwork) {
    BLAS(dormtr)("L", "U", "N", &n, &k, a, &lda, tau, c, &ldc, work, lwork, &info);
  });
}
bool sterf(int n, double* d, double* e) {
  int info = 0;
  BLAS(dsterf)(&n, d, e, &info);
  return info == 0;
}
bool syevd(int n, double* a, int lda, double* w) {
  double size = 0;
  int isize = 0, query = -1, info = 0;
  BLAS(dsyevd)("V", "U", &n, a, &lda, w, &size, &query, &isize, &query, &info);
  const int lwork = static_cast<int>(size);
  std::vector<double> work(static_cast<std::size_t>(lwork));
  std::vector<int> iwork(static_cast<std::size_t>(isize));
  BLAS(dsyevd)("V", "U", &n, a, &lda, w, work.data(), &lwork, iwork.data(), &isize, &info);
  return info == 0;
}

namespace {

template <class T, class Gesdd>
bool gesdd_with(Gesdd gesdd, int n, T* a, int lda, T* s, T* u, int ldu, T* vt, int ldvt) {
  std::vector<int> iwork(8 * static_cast<std::size_t>(n));
  int info = 0;
  with_work<T>([&](T* work, const int* lwork) {
    gesdd("A", &n, &n, a, &lda, s, u, &ldu, vt, &ldvt, work, lwork, iwork.data(), &info);
  });
  return info == 0;
}
template <class T, class Gesvd>
bool gesvd_with(Gesvd gesvd, int n, T* a, int lda, T* s, T* u, int ldu, T* vt, int ldvt) {
  int info = 0;
  with_work<T>([&](T* work, const int* lwork) {
    gesvd("A", "A", &n, &n, a, &lda, s, u, &ldu, vt, &ldvt, work, lwork, &info);
  });
  return info == 0;
}

}  // namespace

bool gesvd(int n, float* a, int lda, float* s, float* u, int ldu, float* vt, int ldvt) {
  return gesvd_with(BLAS(sgesvd), n, a, lda, s, u, ldu, vt, ldvt);
}
bool gesvd(int n, double* a, int lda, double* s, double* u, int ldu, double* vt, int ldvt) {
  return gesvd_with(BLAS(dgesvd), n, a, lda, s, u, ldu, vt, ldvt);
}
bool gesdd(int n, float* a, int lda, float* s, float* u, int ldu, float* vt, int ldvt) {
  return gesdd_with(BLAS(sgesdd), n, a, lda, s, u, ldu, vt, ldvt);
}
bool gesdd(int n, double* a, int lda, double* s, double* u, int ldu, double* vt, int ldvt) {
  return gesdd_with(BLAS(dgesdd), n, a, lda, s, u, ldu, vt, ldvt);
}

}  // namespace structmat::blas
