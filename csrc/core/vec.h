// SPDX-License-Identifier: Apache-2.0
// Vectors of the instruction set a file is compiled for (see simd.h). Include it only in files
// listed under structmat_simd_sources: everything here is in an anonymous namespace, as it differs
// between levels.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include "half.h"

// maskz_ forms: the plain ones start from undefined registers, which gcc 12 takes for a mistake.
namespace structmat {
namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class S>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVecBytes)));
  typedef std::int32_t index __attribute__((vector_size(kVecBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVecBytes)));
  typedef std::int64_t index __attribute__((vector_size(kVecBytes)));
};
template <class S>
using Vec = typename VecOf<S>::type;
template <class S>
constexpr int kLanes = kVecBytes / static_cast<int>(sizeof(S));

template <class S>
inline Vec<S> load(const S* p) {
  Vec<S> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
inline void store(S* p, Vec<S> v) {
  std::memcpy(p, &v, sizeof v);
}
template <class S>
inline Vec<S> broadcast(S s) {
  return s - Vec<S>{};  // s + 0 would turn -0 into 0, hence be an addition
}

// Keeps a value in its register: gcc would rather load it again for each of its uses.
template <class V>
inline void pin(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#else
  static_cast<void>(v);
#endif
}

// a b + c, rounded once where the machine can (AVX2 and up).
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__)
// As from_float. The compiler makes no vectors of that where the count is small.
inline __m256i round_bfloat16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v), upper = _mm512_maskz_srli_epi32(-1, bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_maskz_srli_epi32(
      -1, _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_maskz_cvtepi32_epi16(
      -1, _mm512_mask_or_epi32(rounded, nan, upper, _mm512_set1_epi32(0x40)));
}
#endif

// to[i] = from[i], widened or rounded.
template <class From, class To>
inline void convert(const From* from, To* to, std::int64_t count) {
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(To));
  } else {
    std::int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= count; i += 16) {
      if constexpr (std::is_same_v<From, float16>)
        _mm512_storeu_ps(to + i,
                         _mm512_maskz_cvtph_ps(-1, _mm256_loadu_si256((const __m256i*)(from + i))));
      else if constexpr (std::is_same_v<To, float16>)
        _mm256_storeu_si256((__m256i*)(to + i),
                            _mm512_maskz_cvtps_ph(-1, _mm512_loadu_ps(from + i), 0));
      else if constexpr (std::is_same_v<To, bfloat16>)
        _mm256_storeu_si256((__m256i*)(to + i), round_bfloat16(_mm512_loadu_ps(from + i)));
      else
        break;
    }
#elif defined(__F16C__)
    for (; i + 8 <= count; i += 8) {
      if constexpr (std::is_same_v<From, float16>)
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
      else if constexpr (std::is_same_v<To, float16>)
        _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
      else
        break;
    }
#endif
    for (; i < count; ++i) {  // bfloat16: shifts, which the compiler turns into vectors
      if constexpr (sizeof(To) == 2)
        to[i] = from_float<To>(from[i]);
      else
        to[i] = to_float(from[i]);
    }
  }
}

// A vector of numbers stored as T.
template <class S, class T>
inline Vec<S> load_wide(const T* p) {
  if constexpr (std::is_same_v<S, T>) {
    return load(p);
  } else {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (std::is_same_v<T, float16>) return _mm512_maskz_cvtph_ps(-1, bits);
    return _mm512_castsi512_ps(
        _mm512_maskz_slli_epi32(-1, _mm512_maskz_cvtepu16_epi32(-1, bits), 16));
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (std::is_same_v<T, float16>) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
    S wide[kLanes<S>];
    for (int i = 0; i < kLanes<S>; ++i) wide[i] = to_float(p[i]);
    return load(wide);
#endif
  }
}
// Its first `count` numbers, then zeros.
template <class S, class T>
inline Vec<S> load_wide_part(const T* p, int count) {
  S wide[kLanes<S>] = {};
  for (int i = 0; i < count; ++i) wide[i] = to_float(p[i]);
  return load(wide);
}

// Lane i is lane index(i) of a, or lane index(i) - lanes of b.
template <class S, class Index, int... kLane>
inline Vec<S> shuffle(Vec<S> a, Vec<S> b, Index, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, Index{}(kLane)...);
}
template <class S, class Index>
inline Vec<S> shuffle(Vec<S> a, Vec<S> b, Index index) {
  return shuffle<S>(a, b, index, std::make_integer_sequence<int, kLanes<S>>());
}

// Transposes a square of vectors: log2(lanes) rounds of interleaving row i with row i + lanes / 2.
template <class S>
inline void transpose(Vec<S> (&rows)[kLanes<S>]) {
  constexpr int n = kLanes<S>;
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
    Vec<S> out[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      const Vec<S> a = rows[i], b = rows[i + n / 2];
      out[2 * i] = shuffle<S>(a, b, [](int lane) { return lane % 2 * n + lane / 2; });
      out[2 * i + 1] = shuffle<S>(a, b, [](int lane) { return lane % 2 * n + (lane + n) / 2; });
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = out[i];
  }
}

}  // namespace
}  // namespace structmat
