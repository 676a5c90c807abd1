// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"
#include "structmat/svd.h"

namespace structmat {

struct BlockFacts {
  double unit = 0;      // of z: 0 or a power of two, no smaller than those of the blocks before
  double norm = 0;      // ||A||_F, where it was asked for
  double finite = 1.0;  // 0: the products hold NaN or Inf, and z is worth nothing
};

// Both products with a block of rows A (b, n), of a matrix read block by block: y = A x, and z
// grows by A^T y[:, :l] / unit, where facts->unit is raised, and z with it, so that y / unit stays
// below 2 and squares stay in range. x (n, l + p), y (b, l + p) and z (n, l); z float64, x and y
// float64 where A is, else float32. Each element of A is read twice, and converted and summed as in
// randomized_svd. On the CPU only.
STRUCTMAT_API void block_sweep(const Context& context, const StridedMatrixView& a,
                               ConstMatrixView x, MatrixView y, MatrixView z, bool measure,
                               BlockFacts* facts);

}  // namespace structmat
