// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set. Loops over lanes are written for the compiler to vectorise;
// the operations are the same ones, so the bits are too.
#include <algorithm>

#include "random/philox.h"

namespace structmat {
namespace {

constexpr int kLanes = 16;

template <class T>
void fill_rows(T* out, std::int64_t row_stride, std::int64_t first, std::int64_t last,
               std::int64_t cols, std::uint64_t seed, std::uint32_t stream) {
  for (std::int64_t i = first; i < last; ++i) {
    T* row = out + i * row_stride;
    for (std::int64_t j = 0; j < cols; j += 4 * kLanes) {
      std::uint32_t words[4][kLanes];
      float values[4][kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const Philox drawn = random_words(i, j / 4 + lane, seed, stream);
        for (int k = 0; k < 4; ++k) words[k][lane] = drawn.word[k];
      }
      for (int k = 0; k < 4; ++k)
        for (int lane = 0; lane < kLanes; ++lane)
          values[k][lane] = gaussian_from_word(words[k][lane]);
      const int count = static_cast<int>(std::min<std::int64_t>(4 * kLanes, cols - j));
      for (int k = 0; k < count; ++k) row[j + k] = values[k % 4][k / 4];
    }
  }
}

}  // namespace

namespace STRUCTMAT_SIMD {

void gaussian_rows(float* out, std::int64_t row_stride, std::int64_t first, std::int64_t last,
                   std::int64_t cols, std::uint64_t seed, std::uint32_t stream) {
  fill_rows(out, row_stride, first, last, cols, seed, stream);
}
void gaussian_rows(double* out, std::int64_t row_stride, std::int64_t first, std::int64_t last,
                   std::int64_t cols, std::uint64_t seed, std::uint32_t stream) {
  fill_rows(out, row_stride, first, last, cols, seed, stream);
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
