// SPDX-License-Identifier: Apache-2.0
// Orthonormalisation of tall panels by CholeskyQR with scaled columns, once for all back ends.
// Yamamoto, Nakatsukasa, Yanagisawa, Fukaya, ETNA 44 (2015) (CholeskyQR2).
#pragma once
#include <cstdint>

namespace structmat {

// A row-major block of columns of a tall buffer.
template <class T>
struct Panel {
  T* data = nullptr;
  std::int64_t rows = 0, cols = 0, stride = 0;
  Panel columns(std::int64_t first, std::int64_t count) const {
    return {data + first, rows, count, stride};
  }
};

// One or two passes make a well-conditioned block orthonormal, three one of condition 1 / eps or
// with dependent columns; the others are for a random replacement that nearly lies in a nearly
// complete basis.
constexpr int kOrthPasses = 6;
// Where the caller asks for a basis of numerically dependent columns of any kind: each pass settles
// those within a factor 1e6. Radial basis functions in double take 8.
constexpr int kMaxOrthPasses = 12;
// A pivot of the Gram matrix of unit columns below this is not divided by, nor one whose column of
// R^-1 has a larger square: its column is left for the next pass, where its own norm scales it. The
// Gram matrix is kept in double; rounding there is 1e-16.
constexpr double kPivotThreshold = 1e-12;
constexpr double kMaxGrowth = 1e14;

}  // namespace structmat
