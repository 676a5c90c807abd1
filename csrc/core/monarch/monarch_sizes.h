// SPDX-License-Identifier: Apache-2.0
// Which hidden unit is where: pure functions of the weights' sizes.
#pragma once
#include <cstdint>

#include "structmat/monarch.h"

namespace structmat::monarch {

// K input blocks of I inputs and Q hidden units, J output blocks of L outputs and S hidden units.
struct Sizes {
  std::int64_t K, Q, I, J, L, S;
  std::int64_t R;  // of the canonical form, where q = j R + r and s = k R + r
  bool interleaved_hidden, interleaved_output;

  // Inlined always: files of several instruction sets include it (cmake/Simd.cmake).
  [[gnu::always_inline]] explicit Sizes(const MonarchWeights& w)
      : K(w.w1.sizes[0]),
        Q(w.w1.sizes[1] * w.w1.sizes[2]),
        I(w.w1.sizes[3]),
        J(w.w2.sizes[0]),
        L(w.w2.sizes[1]),
        S(w.w2.sizes[2] * w.w2.sizes[3]),
        R(w.w1.sizes[2]),
        interleaved_hidden(w.interleaved_hidden),
        interleaved_output(w.interleaved_output) {}

  [[gnu::always_inline]] inline std::int64_t n() const { return K * I; }
  [[gnu::always_inline]] inline std::int64_t m() const { return J * L; }
  [[gnu::always_inline]] inline std::int64_t hidden() const { return K * Q; }

  // Unit q of input block k is unit `s` of output block `j`.
  struct Place {
    std::int64_t j, s;
  };
  [[gnu::always_inline]] inline Place place(std::int64_t k, std::int64_t q) const {
    if (interleaved_hidden) return {(k * Q + q) % J, (k * Q + q) / J};
    return {q / R, k * R + q % R};
  }
  // Back: unit s of output block j is unit `q` of input block `k`.
  struct PlaceBack {
    std::int64_t k, q;
  };
  [[gnu::always_inline]] inline PlaceBack place_back(std::int64_t j, std::int64_t unit) const {
    if (interleaved_hidden) return {(unit * J + j) / Q, (unit * J + j) % Q};
    return {unit / R, j * R + unit % R};
  }
  [[gnu::always_inline]] inline std::int64_t column(std::int64_t j, std::int64_t l) const {  // of y
    return interleaved_output ? l * J + j : j * L + l;
  }
};

}  // namespace structmat::monarch
