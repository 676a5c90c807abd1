// SPDX-License-Identifier: Apache-2.0
// The small triangular factor of one pass of orthonormalisation (orth.h), on the CPU.
#pragma once
#include <cstdint>
#include <vector>

namespace structmat {

class OrthFactor {
 public:
  // Before the first pass over n columns.
  void start(std::int64_t n);

  // From G = Y^T Y (element (i, j), i <= j, at gram[j * gram_stride(n) + i]; overwritten) R and D:
  // Y D R^-1 has orthonormal columns, but for those too close to the span of their predecessors,
  // which are made orthogonal to that span as far as rounding allows and keep their small norm.
  // `noise` is the norm below which there is only rounding in a column that had norm 1 before,
  // `growth` the ||R^-1||_F^2 up to which one pass suffices.
  void factor(double* gram, int pass, double noise, double growth);

  std::int64_t n = 0;
  std::vector<double> minus_r, scale, inverse;  // as solve_rows takes them
  std::vector<std::int64_t> empty;              // columns with nothing left in them
  bool done = false;                            // Y D R^-1 is orthonormal to rounding
  // Per column: the norm of its part outside the span of its predecessors over its own norm.
  std::vector<double> residual;

 private:
  bool cholesky(double* gram);          // false: another look is needed
  void guarded_cholesky(double* gram);  // the same where that fails
  double growth_ = 0;                   // ||R^-1||_F^2
  std::vector<double> work_, size_, pivot_;
  // Of norm 1 after the first pass, or since a column was replaced. A single pass may leave more
  // than noise of a column that lies in the span, where equal addends round alike: again and again
  // the same direction.
  std::vector<double> left_;
  std::vector<char> settled_;
};

}  // namespace structmat
