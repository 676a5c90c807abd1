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

}  // namespace structmat::blas
