// SPDX-License-Identifier: Apache-2.0
// Sums of products of bfloat16, two at a time: a word of 32 bits holds two numbers, which vdpbf16ps
// multiplies with those of another and adds in fp32, at twice the rate of fp32. It takes subnormal
// numbers for zero. For files under structmat_simd_sources (everything is in an anonymous
// namespace).
#pragma once
#include <algorithm>
#include <type_traits>

#include "vec.h"

namespace structmat {
namespace {

// What one lane holds along a sum: a number of the sums' type, or (kPairs) a word of two bfloat16.
template <bool kPairs>
constexpr int kWordNumbers = kPairs ? 2 : 1;

template <bool kPairs, class S>
inline Vec<S> broadcast_word(S word) {
#if defined(__AVX512F__)
  if constexpr (kPairs) {  // not by way of arithmetic, which would change a word
    std::int32_t bits;
    std::memcpy(&bits, &word, sizeof bits);
    return reinterpret_cast<Vec<S>>(_mm512_set1_epi32(bits));
  }
#endif
  return broadcast(word);
}

// sum + a b, lane by lane.
template <bool kPairs, class V>
inline V multiply_add(V a, V b, V sum) {
#if defined(__AVX512F__)
  if constexpr (kPairs) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // by name: at Simd::avx512bf16 alone
    return sum;
  }
#else
  static_assert(!kPairs);
#endif
  return fma(a, b, sum);
}

typedef std::uint32_t WordBits __attribute__((vector_size(kVecBytes)));

// Rounded to bfloat16, still fp32.
inline Vec<float> round_to_bfloat16(Vec<float> v) {
  const WordBits bits = reinterpret_cast<WordBits>(v), rounded = bits + 0x7fff + (bits >> 16 & 1);
  const WordBits top = v == v ? rounded : (bits | 0x400000);
  return reinterpret_cast<Vec<float>>(top & 0xffff0000);
}

// Lane by lane the word (low, high) of numbers that are rounded already.
inline Vec<float> pair_words(Vec<float> low, Vec<float> high) {
  return reinterpret_cast<Vec<float>>(reinterpret_cast<WordBits>(low) >> 16 |
                                      (reinterpret_cast<WordBits>(high) & 0xffff0000));
}

// Lines of numbers (depth, ld), rounded already, as words (depth / 2 rounded up, lanes).
inline void pair_lines(const float* from, std::int64_t depth, std::int64_t ld, std::int64_t lanes,
                       float* to) {
  for (std::int64_t p = 0; p < depth; p += 2, from += 2 * ld, to += lanes)
    for (std::int64_t t = 0; t < lanes; t += kLanes<float>)
      store(to + t, pair_words(load(from + t), p + 1 < depth ? load(from + ld + t) : Vec<float>{}));
}

// Sums over tokens take the tokens of two neighbouring vectors for pairs: a line of tokens is
// paired vector by vector.
inline std::int64_t token_words(std::int64_t tokens) {
  constexpr std::int64_t w = kLanes<float>;
  return tokens / (2 * w) * w + std::min(tokens % (2 * w), w);
}

// A line of tokens, with room for whole vectors of words.
inline void pair_tokens(const float* line, std::int64_t tokens, float* to) {
  constexpr std::int64_t w = kLanes<float>;
  for (; tokens > 0; tokens -= 2 * w, line += 2 * w, to += w) {
    const std::int64_t high = std::min(tokens - w, w);
    store(to, pair_words(load(line), high == w ? load(line + w)
                                     : high > 0
                                         ? load_wide_part<float>(line + w, static_cast<int>(high))
                                         : Vec<float>{}));
  }
}

// Rows of tokens (tokens, ld), in place.
inline void pair_token_rows(float* rows, std::int64_t tokens, std::int64_t ld) {
  constexpr std::int64_t w = kLanes<float>;
  const std::int64_t words = token_words(tokens);
  for (std::int64_t p = 0; p < words; ++p) {
    const std::int64_t low = p / w * 2 * w + p % w, high = low + w;
    for (std::int64_t i = 0; i < ld; i += w)
      store(rows + p * ld + i,
            pair_words(load(rows + low * ld + i),
                       high < tokens ? load(rows + high * ld + i) : Vec<float>{}));
  }
}

}  // namespace
}  // namespace structmat
