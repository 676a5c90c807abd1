// SPDX-License-Identifier: Apache-2.0
// Singular values and right singular vectors of a matrix whose rows arrive in a stream.
#pragma once
#include <cstddef>
#include <cstdint>

#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"
#include "structmat/svd.h"

namespace structmat {

// What a state of `n` columns and this rank keeps of its rows; a function of the two alone.
struct StreamingSvdShape {
  std::int64_t keep;   // rows of `factor`
  std::int64_t chunk;  // rows of `buffer`: they are folded into `factor` when it is full
  bool exact;          // `factor` is the matrix of second moments, (n, n): nothing is ever lost
};
STRUCTMAT_API StreamingSvdShape streaming_svd_shape(std::int64_t n, std::int64_t rank);

// The state after rows x_1 .. x_N, standing for A with rows decay^(N - i) (x_i - mean), or without
// the mean where `center` is false. Its memory is the caller's, where the rows are; all zeros is
// the state of no rows. Operations change what the views show and the two counts.
struct StreamingSvdState {
  std::int64_t rank = 0;
  double decay = 1;  // in (0, 1]: every row multiplies those before it by this
  bool center = false;
  MatrixView buffer;  // (chunk, n), of the type of the rows: the last `buffered` ones
  MatrixView factor;  // (keep, n) float64: F with F^T F ~ A^T A; where exact A^T A, of which the
                      // lower triangle is set
  VectorView mean;    // (n) float64, of the rows that `factor` holds, weighted by decay^(2 (N - i))
  VectorView facts;   // (2) float64: energy lost from `factor`; the largest magnitude of its rows,
                      // faded by decay, which are in units of the power of two below (float64
                      // rows only; 0: none yet)
  std::int64_t rows = 0;      // N
  std::int64_t buffered = 0;  // less than chunk
};

// Rows of a CSR matrix with `state.buffer.cols` columns, on the state's device: row i holds
// values[k] in column columns[k], starts[i] <= k < starts[i + 1]. Columns of a row are distinct.
struct CsrView {
  const std::int64_t* starts = nullptr;
  const std::int64_t* columns = nullptr;
  const void* values = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
};

// Appends rows of the buffer's type. They must be finite (see below); the result depends on the
// rows alone, bit for bit, not on how they are cut into calls. An error within leaves what `state`
// shows as it was, on the CPU and within the first chunk that it fills; else the state is lost.
STRUCTMAT_API void streaming_svd_update(const Context& context, StreamingSvdState& state,
                                        const StridedMatrixView& rows);
STRUCTMAT_API void streaming_svd_update(const Context& context, StreamingSvdState& state,
                                        const CsrView& rows);

// *finite <- 1, or 0 where `values` hold NaN or Inf; `finite` lies where they lie.
STRUCTMAT_API void streaming_svd_check(const Context& context, const StridedMatrixView& values,
                                       double* finite);

// Folds the buffered rows into `factor` before the buffer is full.
STRUCTMAT_API void streaming_svd_fold(const Context& context, StreamingSvdState& state);

// The state as if `other`'s rows had followed those of `state`: associative to rounding. The two
// have the same n, rank, decay, center and types, and share no memory.
STRUCTMAT_API void streaming_svd_merge(const Context& context, StreamingSvdState& state,
                                       const StreamingSvdState& other);

// A ~ U diag(S) Vh, S (rank,) descending, Vh (rank, n) with orthonormal rows, both of the buffer's
// type (float32 for 16-bit rows), from a state with nothing buffered. The entry of largest
// magnitude of each row of Vh is positive. `info->error` is ||A - A Vh^T Vh||_F / ||A||_F, or
// somewhat more; `info->sweeps` is 1. On the CPU a singular value out of range throws LinAlgError;
// a GPU is not waited for, so there `info->finite` tells.
STRUCTMAT_API void streaming_svd_result(const Context& context, const StreamingSvdState& state,
                                        std::uint64_t seed, VectorView s, MatrixView vh,
                                        SvdInfo* info);

// Device memory that any of the calls above asks for, in bytes.
STRUCTMAT_API std::size_t streaming_svd_workspace(const Context& context,
                                                  const StreamingSvdState& state);

}  // namespace structmat
