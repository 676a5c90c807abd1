// SPDX-License-Identifier: Apache-2.0
// A tile of tokens of x, transposed: number (j, t) at data[j * ld + t], in the type of the sums.
// For files under structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include <algorithm>

#include "parallel.h"
#include "structmat/matrix.h"
#include "vec.h"

namespace structmat {
namespace {

#if defined(__AVX512F__)
constexpr int kTileVecs = 4;
#else
constexpr int kTileVecs = 8;
#endif

template <class T>
const T* row_of(const ConstMatrixView& x, std::int64_t t) {
  return static_cast<const T*>(x.data) + t * x.row_stride;
}
template <class T>
T* row_of(const MatrixView& x, std::int64_t t) {
  return static_cast<T*>(x.data) + t * x.row_stride;
}

// Tokens [t0, t1) in whole vectors: the lanes of none are zeros.
struct TokenTile {
  std::int64_t t0, t1, vecs, ld;
  std::int64_t tokens() const { return t1 - t0; }
};

// `tokens` in tiles of at most `vecs` vectors.
template <class S>
struct TokenTiles {
  static constexpr int w = kLanes<S>;
  std::int64_t tokens, width, count;
  TokenTiles(std::int64_t tokens, std::int64_t vecs)
      : tokens(tokens), width(vecs * w), count(ceil_div(tokens, width)) {}
  TokenTile operator[](std::int64_t i) const {
    const std::int64_t t0 = i * width, t1 = std::min(tokens, t0 + width),
                       vecs = ceil_div(t1 - t0, w);
    return {t0, t1, vecs, vecs * w};
  }
};

// 2^18 multiply-adds take a core 3 us, as much as another thread costs.
inline std::int64_t threads_for(const Context& context, std::int64_t multiply_adds) {
  return multiply_adds < (1 << 18) ? 1 : thread_count(context);
}

// A panel of 64 tokens (32 doubles), or half of that where 4 bytes of so many columns would not
// leave the level-2 cache, of 1 MB or more, room for anything else.
inline std::int64_t panel_vecs(std::int64_t columns) {
  return columns > 2560 ? kTileVecs / 2 : kTileVecs;
}

// Columns [j0, j1) of x to to[(j - j0) * ld + t]. zeros[t], if wanted, is the sum of 0 x: NaN for a
// token with a number that is not finite.
template <class S, class T>
void load_panel(const ConstMatrixView& x, const TokenTile& tile, std::int64_t j0, std::int64_t j1,
                S* to, S* zeros = nullptr) {
  constexpr int w = kLanes<S>;
  for (std::int64_t v = 0; v < tile.vecs; ++v) {
    const std::int64_t t = tile.t0 + v * w;
    const int live = static_cast<int>(std::min<std::int64_t>(w, tile.t1 - t));
    const T* row[w];
    for (int i = 0; i < w; ++i) row[i] = row_of<T>(x, t + std::min(i, live - 1));
    Vec<S> zero{};
    for (std::int64_t j = j0; j < j1; j += w) {
      const int cols = static_cast<int>(std::min<std::int64_t>(w, j1 - j));
      Vec<S> square[w];
      if (live == w && cols == w) {
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i) square[i] = load_wide<S>(row[i] + j);
      } else {
        for (int i = 0; i < w; ++i)
          square[i] = i < live ? load_wide_part<S>(row[i] + j, cols) : Vec<S>{};
      }
      transpose<S>(square);
      S* const out = to + (j - j0) * tile.ld + v * w;
      if (cols == w) {
#pragma GCC unroll 16
        for (int i = 0; i < w; ++i) {
          zero = fma(square[i], Vec<S>{}, zero);
          store(out + i * tile.ld, square[i]);
        }
      } else {
        for (int i = 0; i < cols; ++i) {
          zero = fma(square[i], Vec<S>{}, zero);
          store(out + i * tile.ld, square[i]);
        }
      }
    }
    if (zeros != nullptr) store(zeros + v * w, zero);
  }
}

}  // namespace
}  // namespace structmat
