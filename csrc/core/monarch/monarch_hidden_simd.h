// SPDX-License-Identifier: Apache-2.0
// The permutation between the factors, as the results of one are stored for the other. For files
// under structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include "monarch/monarch_sizes.h"
#include "vec.h"

namespace structmat {
namespace {

using monarch::Sizes;

// Unit u of block b and token t at data[b * block + u * ld + t], or, of few tokens, at
// data[b * block + t * ld + u].
template <class S>
struct Hidden {
  S* data;
  std::int64_t block, ld;
};

// One token's units of blocks [b0, b1) of one factor, `step` apart in z, to their places among the
// blocks of the other: from the blocks of x to those of y (kForward) or back. z has room for whole
// vectors a block.
template <class S, bool kForward>
void permute(const Sizes& s, const S* z, std::int64_t step, std::int64_t b0, std::int64_t b1,
             const Hidden<S>& to, std::int64_t t) {
  constexpr int w = kLanes<S>;
  const std::int64_t units = kForward ? s.Q : s.S, count = b1 - b0;
  S* const line = to.data + t * to.ld;
  if (s.interleaved_hidden) {
    for (std::int64_t b = b0; b < b1; ++b)
      for (std::int64_t u = 0; u < units; ++u) {
        const S value = z[(b - b0) * step + u];
        if constexpr (kForward) {
          const auto [j, at] = s.place(b, u);
          line[j * to.block + at] = value;
        } else {
          const auto [k, q] = s.place_back(b, u);
          line[k * to.block + q] = value;
        }
      }
  } else if (s.R > 1) {  // runs of R units stay together
    const std::int64_t runs = units / s.R;
    const auto copy = [&](auto length) {
      for (std::int64_t b = b0; b < b1; ++b)
        for (std::int64_t v = 0; v < runs; ++v)
          std::memcpy(line + v * to.block + b * s.R, z + (b - b0) * step + v * s.R,
                      static_cast<std::size_t>(length) * sizeof(S));
    };
    if (s.R == 2)
      copy(std::integral_constant<std::int64_t, 2>());
    else if (s.R == 4)
      copy(std::integral_constant<std::int64_t, 4>());
    else if (s.R == 8)
      copy(std::integral_constant<std::int64_t, 8>());
    else if (s.R == 16)
      copy(std::integral_constant<std::int64_t, 16>());
    else
      copy(s.R);
  } else {  // one unit a pair of blocks: unit v of block b becomes unit b of block v
    for (std::int64_t v0 = 0; v0 < units; v0 += w) {
      Vec<S> square[w];
      for (int b = 0; b < w; ++b) square[b] = b < count ? load(z + b * step + v0) : Vec<S>{};
      transpose<S>(square);
      const int height = static_cast<int>(std::min<std::int64_t>(w, units - v0));
      for (int v = 0; v < height; ++v) {
        S* const run = line + (v0 + v) * to.block + b0;
        if (count == w) {
          store(run, square[v]);
        } else {
          S out[w];
          store(out, square[v]);
          std::copy_n(out, count, run);
        }
      }
    }
  }
}

}  // namespace
}  // namespace structmat
