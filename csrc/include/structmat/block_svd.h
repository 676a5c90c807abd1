// SPDX-License-Identifier: Apache-2.0
// Truncated SVDs of many matrices of one size, such as the blocks of a larger one.
#pragma once
#include <cstddef>
#include <cstdint>

#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"

namespace structmat {

// Where the result of block_svd goes: contiguous arrays, u, s and vh of double for blocks of double
// and of float for all others, on the device of the context.
struct BlockSvd {
  void* u;        // (a, b, p, rank), orthonormal columns
  void* s;        // (a, b, rank), descending
  void* vh;       // (a, b, rank, q), orthonormal rows
  double* norms;  // (a, b, 2): ||A||_F and the norm of what is left out, ||A - U diag(s) Vh||_F
};

// The `rank` largest singular triplets, 1 to min(p, q), of every block of `blocks` (a, b, p, q), to
// rounding: close and repeated values, blocks of lower rank and of zeros included. The blocks are
// read through their strides, and widened where they are of 16 bits. All parts of a block with NaN
// or infinity, or whose decomposition does not converge, are NaN.
STRUCTMAT_API void block_svd(const Context& context, const ConstArrayView& blocks,
                             std::int64_t rank, const BlockSvd& result);

// Bytes of Context::workspace the call needs on the device of `context`.
STRUCTMAT_API std::size_t block_svd_workspace(const Context& context, const ConstArrayView& blocks,
                                              std::int64_t rank);

}  // namespace structmat
