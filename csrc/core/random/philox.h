// SPDX-License-Identifier: Apache-2.0
// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, SC'11) and normal variates made of correctly rounded
// operations only, so that every machine draws the same bits. For host and device code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace structmat {
namespace {  // compiled once per instruction set (simd.h): nothing here may be shared

struct Philox {
  std::uint32_t word[4];
};

STRUCTMAT_HOST_DEVICE inline Philox philox4x32(Philox counter, std::uint64_t seed) {
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
  std::uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c[0];
    const std::uint64_t p1 = std::uint64_t{0xCD9E8D57u} * c[2];
    const std::uint32_t c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    const std::uint32_t c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<std::uint32_t>(p1);
    c[3] = static_cast<std::uint32_t>(p0);
    c[0] = c0;
    c[2] = c2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return counter;
}

// Four neighbours of a row: entries (row, 4 group .. 4 group + 3).
STRUCTMAT_HOST_DEVICE inline Philox random_words(std::int64_t row, std::int64_t group,
                                                 std::uint64_t seed, std::uint32_t stream) {
  return philox4x32({{static_cast<std::uint32_t>(row), static_cast<std::uint32_t>(row >> 32),
                      static_cast<std::uint32_t>(group), stream}},
                    seed);
}

// Rounded once and never contracted into fused operations, whatever the compiler's flags.
STRUCTMAT_HOST_DEVICE inline float mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;  // built with -ffp-contract=off
#endif
}

// ln(y) for normal y in (0, 1]: the polynomial of Cephes' logf, error below 1e-7 (1 + |ln y|).
STRUCTMAT_HOST_DEVICE inline float log_exactly_rounded(float y) {
  const std::uint32_t bits = float_to_bits(y);
  // y = 2^e m with m in [sqrt(1/2), sqrt(2)).
  const std::int32_t offset = static_cast<std::int32_t>(bits - 0x3f3504f3u) >> 23;
  const float m = bits_to_float(bits - (static_cast<std::uint32_t>(offset) << 23));
  const float e = static_cast<float>(offset);
  const float x = m - 1.0f, z = x * x;
  float p = 7.0376836292e-2f;
  p = mul_add(p, x, -1.1514610310e-1f);
  p = mul_add(p, x, 1.1676998740e-1f);
  p = mul_add(p, x, -1.2420140846e-1f);
  p = mul_add(p, x, 1.4249322787e-1f);
  p = mul_add(p, x, -1.6668057665e-1f);
  p = mul_add(p, x, 2.0000714765e-1f);
  p = mul_add(p, x, -2.4999993993e-1f);
  p = mul_add(p, x, 3.3333331174e-1f);
  p = mul_add(p * x, z, mul_add(e, -2.12194440e-4f, -0.5f * z));
  return mul_add(e, 0.693359375f, x + p);
}

// The normal quantile of a uniform word: sqrt(2) erfinv(x), x = (2 word + 1) / 2^32 - 1, with
// Giles' single-precision polynomials ("Approximating the erfinv function", GPU Computing Gems,
// 2012).
STRUCTMAT_HOST_DEVICE inline float gaussian_from_word(std::uint32_t word) {
  const std::uint32_t flip = word >> 31 ? 0u : ~0u;  // fold at the median: |x| = (2 h + 1) 2^-32
  const std::uint32_t h = (word ^ flip) & 0x7fffffffu;
  const float magnitude = static_cast<float>(static_cast<std::int32_t>(h)) * 0x1p-31f + 0x1p-32f;
  // 1 - |x| from the integer: the tail keeps its resolution.
  const float rest =
      static_cast<float>(static_cast<std::int32_t>(0x7fffffffu - h)) * 0x1p-31f + 0x1p-32f;
  const float w = -log_exactly_rounded(rest * (1.0f + magnitude));
  const float a = w - 2.5f;
  float p = 2.81022636e-08f;
  p = mul_add(p, a, 3.43273939e-07f);
  p = mul_add(p, a, -3.5233877e-06f);
  p = mul_add(p, a, -4.39150654e-06f);
  p = mul_add(p, a, 0.00021858087f);
  p = mul_add(p, a, -0.00125372503f);
  p = mul_add(p, a, -0.00417768164f);
  p = mul_add(p, a, 0.246640727f);
  p = mul_add(p, a, 1.50140941f);
  const float b = sqrtf(w) - 3.0f;
  float q = -0.000200214257f;
  q = mul_add(q, b, 0.000100950558f);
  q = mul_add(q, b, 0.00134934322f);
  q = mul_add(q, b, -0.00367342844f);
  q = mul_add(q, b, 0.00573950773f);
  q = mul_add(q, b, -0.0076224613f);
  q = mul_add(q, b, 0.00943887047f);
  q = mul_add(q, b, 1.00167406f);
  q = mul_add(q, b, 2.83297682f);
  const float value = (w < 5.0f ? p : q) * magnitude * 1.41421356f;
  return bits_to_float(float_to_bits(value) ^ (flip & 0x80000000u));
}

}  // namespace
}  // namespace structmat
