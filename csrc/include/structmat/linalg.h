// SPDX-License-Identifier: Apache-2.0
// Building blocks of decompositions: orthonormal bases, products with A^T A, subspace tracking,
// the smallest singular triplets.
#pragma once
#include <cstddef>
#include <cstdint>
#include <optional>

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

// What a read of A can tell besides; null where it is not wanted. They lie where the matrices lie.
struct GramMoments {
  VectorView column_sums;  // (n) float64
  double* norm = nullptr;  // ||A||_F, whatever the range of A's squares
};

// Z (n, l) = A^T (A X), A (m, n), X (n, l), of one type, reading A once where reading it is what
// costs. Sums, A X among them, are kept in float32 (float64 for float64) and rounded once.
STRUCTMAT_API void gram_matmul(const Context& context, const StridedMatrixView& a,
                               const StridedMatrixView& x, MatrixView z, GramMoments moments = {});

// Device memory the call above asks for, in bytes.
STRUCTMAT_API std::size_t gram_matmul_workspace(const Context& context, const StridedMatrixView& a,
                                                const StridedMatrixView& x);

// One step of subspace iteration from a given start, of many: P = orth(A Q), B = A^T P,
// next = orth(B), with A (m, n) of any type, Q, next and B (n, r) and P (m, r) of float32, float64
// for float64 A, r <= min(m, n).
struct RangeStep {
  StridedMatrixView a, q;
  MatrixView p, next, b;
  double* finite = nullptr;  // <- 1; 0 where A or Q holds NaN or Inf or a product overflowed: then
                             // P or `next` is NaN. It lies where the matrices lie.
};

// All steps, of any shapes and types, each with the bits of a call of its own. On the CPU whole
// steps run side by side, one thread each, but for those too large to share the threads evenly; on
// a GPU one after the other. `seed`: of directions that a product does not determine.
STRUCTMAT_API void range_step(const Context& context, const RangeStep* steps, std::int64_t count,
                              std::uint64_t seed);

// Device memory the call above asks for, in bytes: that of the largest step.
STRUCTMAT_API std::size_t range_step_workspace(const Context& context, const RangeStep* steps,
                                               std::int64_t count);

struct SvdTailOptions {
  std::int64_t rank = 0;  // 1 .. min(m, n)
  std::optional<std::int64_t>
      oversample;  // >= 0, directions iterated beyond rank; rank, at least 8
  std::uint64_t seed = 0;
};

// The triplets of the `rank` smallest singular values of A (m, n), in the order of a full
// decomposition: U (m, k), S (k,) descending, Vh (k, n), all of A's type, float32 for 16-bit A. The
// entry of largest magnitude of each column of U is positive. `info->error` is the largest
// ||A^T u - s v|| / ||A||_F within the triangular factor, `info->sweeps` the steps of inverse
// iteration, 0 where all of that factor was decomposed. NaN or Inf in A throws LinAlgError. On the
// CPU alone; it makes a copy of A.
STRUCTMAT_API void svd_tail(const Context& context, const StridedMatrixView& a,
                            const SvdTailOptions& options, MatrixView u, VectorView s,
                            MatrixView vh, SvdInfo* info);

}  // namespace structmat
