// SPDX-License-Identifier: Apache-2.0
// The back ends of streaming_svd.h, and the arithmetic of weights that they share.
#pragma once
#include <cmath>
#include <cstdint>

#include "structmat/streaming_svd.h"

namespace structmat {

// LAPACK's dsyevd counts its 1 + 6 n + 2 n^2 elements of work space in 32 bits.
constexpr std::int64_t kLargestProblem = 32766;

// The sum of decay^(2 i) over i < count: the weight of that many rows.
inline double decayed_count(double decay, std::int64_t count) {
  if (decay == 1) return static_cast<double>(count);
  const double step = 2 * std::log(decay);
  return std::expm1(step * static_cast<double>(count)) / std::expm1(step);
}
inline double decayed(double decay, std::int64_t count) {
  return decay == 1 ? 1.0 : std::pow(decay, static_cast<double>(count));
}

// How the rows in `factor` join `count` later ones: all earlier rows are multiplied by `factor`,
// and about the common mean, mean + share (later - mean), the two groups' rows are those about
// their own means and one more, between (later - mean).
struct StreamingJoin {
  double factor, share, between;

  StreamingJoin(const StreamingSvdState& s, std::int64_t count) : factor(decayed(s.decay, count)) {
    const double later = decayed_count(s.decay, count);
    const double earlier = factor * factor * decayed_count(s.decay, s.rows - s.buffered);
    share = later / (earlier + later);
    between = std::sqrt(earlier * share);
  }
};

// Buffered rows are not counted in `s.rows - s.buffered`; `rows` have the buffer's type.
#define STRUCTMAT_STREAMING_SVD_BACKEND(device)                                                    \
  void streaming_svd_store_##device(const Context&, const StridedMatrixView& rows, MatrixView to); \
  void streaming_svd_store_##device(const Context&, const CsrView& rows, MatrixView to);           \
  void streaming_svd_fold_##device(const Context&, const StreamingSvdState& s,                     \
                                   const StridedMatrixView& rows);                                 \
  void streaming_svd_merge_##device(const Context&, const StreamingSvdState& s,                    \
                                    const StreamingSvdState& other);                               \
  void streaming_svd_result_##device(const Context&, const StreamingSvdState& s,                   \
                                     std::uint64_t seed, VectorView sigma, MatrixView vh,          \
                                     SvdInfo* info);                                               \
  void streaming_svd_check_##device(const Context&, const StridedMatrixView& values, double* finite)

STRUCTMAT_STREAMING_SVD_BACKEND(cpu);
STRUCTMAT_STREAMING_SVD_BACKEND(cuda);
std::size_t streaming_svd_workspace_cuda(const StreamingSvdState& s);

}  // namespace structmat
