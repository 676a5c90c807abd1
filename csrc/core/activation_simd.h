// SPDX-License-Identifier: Apache-2.0
// Activations of a run of numbers in place. fp32: within 6 units in the last place of the exact
// function of z, tails included; fp64 by the C library. For files under structmat_simd_sources
// (everything is in an anonymous namespace).
#pragma once
#include <cmath>
#include <cstdint>

#include "structmat/activation.h"
#include "vec.h"

namespace structmat {
namespace {

// exp(x), x <= 0, in two factors: 2^n e^r with |r| <= ln 2 / 2, e^r by its series, 2^n in halves. A
// product with it takes the second factor last, so that it keeps its digits where e^x itself would
// be below the normal numbers. Zero below x = -110.
struct Exp {
  Vec<float> first, second;
  Vec<float> value() const { return first * second; }
};
inline Exp exp_negative(Vec<float> x) {
  typedef VecOf<float>::index Bits;
  const auto all = [](float v) { return broadcast(v); };
  const Vec<float> low = all(-110.0f), given = x;
  x = x < low ? low : x;  // NaN stays
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
  const Vec<float> shifted = fma(x, all(1.44269504f), all(12582912.0f));
  const Vec<float> n = shifted - all(12582912.0f);
  Vec<float> r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  Vec<float> p = all(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = fma(p, r, all(c));
  Bits k = reinterpret_cast<Bits>(shifted) - 0x4b400000;
  const Bits half = k >> 1;
  const Vec<float> first = reinterpret_cast<Vec<float>>((half + 127) << 23);
  const Vec<float> second = reinterpret_cast<Vec<float>>((k - half + 127) << 23);
  return {p * first, given < low ? Vec<float>{} : second};
}

inline Vec<float> relu(Vec<float> z) {
  return z < Vec<float>{} ? Vec<float>{} : z;  // NaN stays
}

inline Vec<float> silu(Vec<float> z) {
  const Exp e = exp_negative(z > Vec<float>{} ? -z : z);
  return (z > Vec<float>{} ? z : z * e.first * e.second) / (broadcast(1.0f) + e.value());
}

// z Phi(z) by Q(a) = Phi(-a), a = |z|: Q(a) e^(a^2/2) (a + 3.5) is a polynomial of
// (a - 3.5) / (a + 3.5), 7e-9 off at most for a < 14.5, where Q is below the least float.
inline Vec<float> gelu(Vec<float> z) {
  const auto all = [](float v) { return broadcast(v); };
  Vec<float> a = z < Vec<float>{} ? -z : z;
  const Vec<float> inverse = all(1.0f) / (a + all(3.5f));
  const Vec<float> c = a > all(14.5f) ? all(14.5f) : a;
  const Vec<float> t = (c - all(3.5f)) * inverse;
  Vec<float> p = all(1.106894e-04f);
  for (float k : {4.2189786e-04f, -4.949437e-04f, -3.1753108e-03f, 6.493116e-03f, 1.7406378e-02f,
                  -1.1605304e-01f, 3.1542504e-01f, -5.655618e-01f, 7.4441606e-01f})
    p = fma(p, t, all(k));
  // e^(-a^2/2), with the rounding of a^2 put back: a^2 is up to 200.
  const Vec<float> square = c * c;
  const Vec<float> rest = fma(c, c, -square);
  const Exp e = exp_negative(all(-0.5f) * square);
  const Vec<float> tail = p * inverse * fma(all(-0.5f) * rest, e.first, e.first),
                   scale = a > all(14.5f) ? Vec<float>{} : e.second;
  return z < Vec<float>{} ? z * tail * scale : z * (all(1.0f) - tail * scale);
}

inline double relu(double z) {
  return z < 0 ? 0 : z;
}
inline double silu(double z) {
  const double e = std::exp(z > 0 ? -z : z);
  return z * (z > 0 ? 1 : e) / (1 + e);
}
inline double gelu(double z) {
  return z * 0.5 * std::erfc(z * -0.70710678118654752440);
}

template <class F>
inline void apply(float* z, std::int64_t count, F&& f) {
  constexpr int w = kLanes<float>;
  std::int64_t i = 0;
  for (; i + w <= count; i += w) store(z + i, f(load(z + i)));
  if (i < count) {
    float line[w] = {};
    std::memcpy(line, z + i, static_cast<std::size_t>(count - i) * sizeof(float));
    store(line, f(load(line)));
    std::memcpy(z + i, line, static_cast<std::size_t>(count - i) * sizeof(float));
  }
}
template <class F>
inline void apply(double* z, std::int64_t count, F&& f) {
  for (std::int64_t i = 0; i < count; ++i) z[i] = f(z[i]);
}

template <class S>
inline void activate(Activation activation, S* z, std::int64_t count) {
  if (activation == Activation::relu)
    apply(z, count, [](auto v) { return relu(v); });
  else if (activation == Activation::gelu)
    apply(z, count, [](auto v) { return gelu(v); });
  else if (activation == Activation::silu)
    apply(z, count, [](auto v) { return silu(v); });
}

}  // namespace
}  // namespace structmat
