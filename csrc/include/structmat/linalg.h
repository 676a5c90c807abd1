// SPDX-License-Identifier: Apache-2.0
// Building blocks of decompositions: orthonormal bases and products with A^T A.
#pragma once
#include <cstddef>
#include <cstdint>

#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"
#include "structmat/svd.h"

namespace structmat {

// Q (m, l) with orthonormal columns whose span contains that of Y (m, l), m >= l: the Q of the QR
// factorisation with a positive diagonal where Y has full rank. Q has Y's type, float32 for 16-bit
// Y. residual[j] (float64) is ||(I - P_j) Y_j|| / ||Y_j||, P_j the projection on the columns before
// j: where it is 0 or rounding, column j of Q is a random direction orthogonal to all others, a
// function of (seed, m, l). On the CPU, NaN or Inf in Y throws LinAlgError; a GPU is not waited
// for, so there Q and the residuals are NaN.
STRUCTMAT_API void orthonormalize(const Context& context, const StridedMatrixView& y,
                                  std::uint64_t seed, MatrixView q, VectorView residual);

// Device memory the call above asks for, in bytes.
STRUCTMAT_API std::size_t orthonormalize_workspace(const Context& context,
                                                   const StridedMatrixView& y);

// Z (n, l) = A^T (A X), A (m, n), X (n, l), of one type, reading A once where reading it is what
// costs. Sums, A X among them, are kept in float32 (float64 for float64) and rounded once.
STRUCTMAT_API void gram_matmul(const Context& context, const StridedMatrixView& a,
                               const StridedMatrixView& x, MatrixView z);

// Device memory the call above asks for, in bytes.
STRUCTMAT_API std::size_t gram_matmul_workspace(const Context& context, const StridedMatrixView& a,
                                                const StridedMatrixView& x);

}  // namespace structmat
