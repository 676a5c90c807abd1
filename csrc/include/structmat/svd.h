// SPDX-License-Identifier: Apache-2.0
// Truncated singular value decomposition from a few passes over the matrix.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>

#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"

namespace structmat {

// Element (i, j) lies at data[i * row_stride + j * col_stride]: rows, columns, a transpose or any
// slice. Strides may be zero.
struct StridedMatrixView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;
  std::int64_t col_stride = 1;

  StridedMatrixView() = default;
  StridedMatrixView(const void* data, DType dtype, std::int64_t rows, std::int64_t cols,
                    std::int64_t row_stride, std::int64_t col_stride)
      : data(data),
        dtype(dtype),
        rows(rows),
        cols(cols),
        row_stride(row_stride),
        col_stride(col_stride) {}
  StridedMatrixView(const ConstMatrixView& m)
      : StridedMatrixView(m.data, m.dtype, m.rows, m.cols, m.row_stride, 1) {}
};

struct SvdOptions {
  std::int64_t rank = 0;                   // 1 .. min(m, n)
  std::optional<std::int64_t> oversample;  // >= 0; default: at least 8, to a block of 16 columns
  // >= 2 passes over A. Default 5; on the CPU 8 to 10, with narrower blocks, where that is less
  // work and neither this nor `oversample` is given.
  std::optional<std::int64_t> sweeps;
  std::uint64_t seed = 0;
  bool center = false;  // of A less the mean of its rows, which is not formed
};

// Facts about a decomposition of A, with `center` of the centred one; they lie where the matrices
// lie. All are doubles so that they can be one tensor.
struct SvdInfo {
  double error;   // estimate of ||A - U S Vh||_F / ||A||_F
  double norm;    // ||A||_F
  double rank;    // singular values above max(m, n) eps S[0], at most the rank asked for
  double sweeps;  // passes over A made, those of a second try included
  double finite;  // 1; 0 where A holds NaN or Inf or a product overflowed: then U, S and Vh are NaN
  double converged = 1;  // 0 where a tolerance was not met for certain
};

// A (m, n) ~ U diag(S) Vh: U (m, k), S (k,) descending, Vh (k, n), all of A's type, float32 for
// 16-bit A. The entry of largest magnitude of each column of U is positive. On the CPU, NaN or Inf
// in A throws LinAlgError; a GPU is not waited for, so there `info->finite` tells.
STRUCTMAT_API void randomized_svd(const Context& context, const StridedMatrixView& a,
                                  const SvdOptions& options, MatrixView u, VectorView s,
                                  MatrixView vh, SvdInfo* info);

// Device memory the call above asks for, in bytes: O((m + n) l + l^2) for a basis of l columns,
// twice rank + oversample; 32 MB for cuBLAS; 2^24 numbers, or a row, where A is 16-bit, has two
// strides or is centred.
STRUCTMAT_API std::size_t randomized_svd_workspace(const Context& context,
                                                   const StridedMatrixView& a,
                                                   const SvdOptions& options);

// `bytes` of memory of the context's device, aligned to 256, that live as long as the pointer. The
// last one may go while work enqueued before that uses them: freed in the order of the stream.
using SvdAllocate = std::function<std::shared_ptr<void>(std::size_t bytes)>;

class SvdSearch;

// The decomposition of the least rank, up to a tenth more, whose error is at most
// `rtol` ||A||_F (0 < rtol < 1) for certain: `info->converged` is 0, and the rank that of all that
// was found, where rounding or `options.sweeps` forbid it. `options.rank` is 0.
//
//   structmat::SvdToTolerance found(context, a, 0.01);
//   std::vector<float> u(m * found.rank()), s(found.rank()), vh(found.rank() * n);
//   found.factors({u.data(), m, found.rank()}, ...);
//
// The constructor does the work; A is not looked at after it. Its memory on the CPU is its own, on
// a GPU what `allocate` gives: as `randomized_svd` needs for a basis of three times the rank found,
// or of min(m, n). On a GPU it waits for the device after each pair of passes, and so cannot be
// captured in a graph. NaN or Inf in A throw LinAlgError there too.
class STRUCTMAT_API SvdToTolerance {
 public:
  SvdToTolerance(const Context& context, const StridedMatrixView& a, double rtol,
                 const SvdOptions& options = {}, const SvdAllocate& allocate = {});
  SvdToTolerance(SvdToTolerance&&) noexcept;
  SvdToTolerance& operator=(SvdToTolerance&&) noexcept;
  ~SvdToTolerance();

  std::int64_t rank() const;
  // U (m, rank), S (rank,), Vh (rank, n) and the facts, as randomized_svd gives them; on a GPU
  // enqueued.
  void factors(MatrixView u, VectorView s, MatrixView vh, SvdInfo* info);

 private:
  StridedMatrixView a_;
  std::unique_ptr<SvdSearch> search_;
};

// The arguments of one decomposition of many, of any shape, type and rank.
struct SvdProblem {
  StridedMatrixView a;
  SvdOptions options;
  MatrixView u;
  VectorView s;
  MatrixView vh;
  SvdInfo* info = nullptr;
};

// All problems, each with the bits of a call of its own. On the CPU whole matrices run side by
// side, one thread each, but for those too large to share the threads evenly; on a GPU four at a
// time, on streams forked from the context's and joined again, and those of 2^26 entries or more
// one after the other. A matrix without a finite decomposition stops no other and throws nothing,
// on the CPU too: its `info->finite` is 0 and its results are NaN.
STRUCTMAT_API void randomized_svd(const Context& context, const SvdProblem* problems,
                                  std::int64_t count);

// What those that run at the same time ask for.
STRUCTMAT_API std::size_t randomized_svd_workspace(const Context& context,
                                                   const SvdProblem* problems, std::int64_t count);

}  // namespace structmat
