// SPDX-License-Identifier: Apache-2.0
// The Fortran BLAS and LAPACK the core calls; with blas.cpp the only file that names their symbols.
// Every call runs on the calling thread alone: the core splits work itself (parallel.h).
#pragma once
#include <cstdint>

namespace structmat::blas {

const char* name();  // for people: library, version, build options

// Column-major, as in BLAS. Dimensions and leading dimensions must fit 32 bits: callers tile.
void gemm(char transa, char transb, int m, int n, int k, float alpha, const float* a, int lda,
          const float* b, int ldb, float beta, float* c, int ldc);
void gemm(char transa, char transb, int m, int n, int k, double alpha, const double* a, int lda,
          const double* b, int ldb, double beta, double* c, int ldc);

// The upper triangle of C = alpha A A^T + beta C, A (n, k).
void syrk(int n, int k, double alpha, const double* a, int lda, double beta, double* c, int ldc);
// The upper factor R of A = R^T R in place; the order of the first minor that is not positive, or
// 0.
int potrf(int n, double* a, int lda);
// A <- A^-1, A upper triangular.
void trtri(int n, double* a, int lda);
// B (m, n) <- B op(R)^-1, R upper triangular.
void trsm(char trans, int m, int n, const double* r, int ldr, double* b, int ldb);
// A (m, n) = Q R, m >= n: R takes A's upper triangle, Q's reflections the rest and tau (n).
void geqrf(int m, int n, float* a, int lda, float* tau);
void geqrf(int m, int n, double* a, int lda, double* tau);
// C (m, k) <- Q C, Q (m, m) from the n reflections of geqrf.
void ormqr(int m, int k, int n, const float* a, int lda, const float* tau, float* c, int ldc);
void ormqr(int m, int k, int n, const double* a, int lda, const double* tau, double* c, int ldc);
// The upper triangle of symmetric A (n, n) becomes A's eigenvectors by columns, w its eigenvalues,
// ascending; false where the iteration does not converge.
bool syevd(int n, double* a, int lda, double* w);
// The upper triangle of symmetric A (n, n) becomes the reflections of Q, tau (n - 1) their factors:
// A = Q T Q^T, T with diagonal d and e beside it.
void sytrd(int n, double* a, int lda, double* d, double* e, double* tau);
// d (n) becomes the eigenvalues, ascending, of the tridiagonal matrix with diagonal d and e (n - 1)
// beside it, which is destroyed; false where the iteration does not converge.
bool sterf(int n, double* d, double* e);
// C (n, k) <- Q C, Q from sytrd.
void ormtr(int n, int k, const double* a, int lda, const double* tau, double* c, int ldc);
// A (n, n) = U diag(S) Vt, A is destroyed; false where the iteration does not converge.
bool gesdd(int n, float* a, int lda, float* s, float* u, int ldu, float* vt, int ldvt);
bool gesdd(int n, double* a, int lda, double* s, double* u, int ldu, double* vt, int ldvt);
// The same by QR iteration: slower, with smaller residuals.
bool gesvd(int n, float* a, int lda, float* s, float* u, int ldu, float* vt, int ldvt);
bool gesvd(int n, double* a, int lda, double* s, double* u, int ldu, double* vt, int ldvt);

}  // namespace structmat::blas
