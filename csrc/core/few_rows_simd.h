// SPDX-License-Identifier: Apache-2.0
// For few rows of A: C (m, n) = A B^T + bias (few_rows), C = A B (by_rows_range), and for few rows
// of A and B C = A^T B (outer_range). The time is that of reading B or writing C once, as it lies
// in memory. Each element is summed in one order: no tiling or thread changes a bit. For files
// under structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include <algorithm>

#include "parallel.h"
#include "scratch.h"
#include "vec.h"

namespace structmat {
namespace {

#if defined(__AVX512F__)
constexpr int kDotRows = 8;  // rows of B at a time, times up to 3 of A: 24 sums in 32 registers
#else
constexpr int kDotRows = 4;
#endif
constexpr int kDotTokens = 3;

// Lane i of the result: the sum of all lanes of v[i]. A round adds each pair of vectors by one
// blend and one shuffle: lanes whose bit kRound is set go on with the second. Fewer vectors than
// lanes: the last rounds add a vector to itself, and lanes repeat. Inlined by force: in a call the
// vectors go through memory, 1.3 times the time of one token with blocks of 64 columns.
template <class S, int kRound = 1, int kCount>
[[gnu::always_inline]] inline Vec<S> sum_lanes(const Vec<S> (&v)[kCount]) {
  constexpr int n = kLanes<S>;
  static_assert(kCount <= n);
  if constexpr (kRound == n) {
    return v[0];
  } else {
    constexpr int left = kCount > 1 ? kCount / 2 : 1, other = kCount > 1 ? 1 : 0;
    Vec<S> sums[left];
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i) {
      const Vec<S> a = v[i * (1 + other)], b = v[i * (1 + other) + other];
      sums[i] = shuffle<S>(a, b, [](int lane) { return lane + ((lane & kRound) != 0 ? n : 0); }) +
                shuffle<S>(a, b, [](int lane) {
                  return (lane ^ kRound) + ((lane & kRound) != 0 ? n : 0);
                });
    }
    return sum_lanes<S, 2 * kRound>(sums);
  }
}

// out[t * kDotRows + j] = a_t . b_j
template <class S, class T, int kTokens>
inline void dots(std::int64_t k, const S* a, std::int64_t a_stride, const T* b,
                 const std::int64_t (&offset)[kDotRows], S* out) {
  constexpr int w = kLanes<S>;
  Vec<S> sum[kTokens][kDotRows] = {};
  const auto step = [&](std::int64_t p, auto&& load_b, auto&& load_a) {
    Vec<S> value[kTokens];
#pragma GCC unroll 3
    for (int t = 0; t < kTokens; ++t) value[t] = load_a(a + t * a_stride + p);
#pragma GCC unroll 8
    for (int j = 0; j < kDotRows; ++j) {
      const Vec<S> weight = load_b(b + offset[j] + p);
#pragma GCC unroll 3
      for (int t = 0; t < kTokens; ++t) sum[t][j] = fma(value[t], weight, sum[t][j]);
    }
  };
  std::int64_t p = 0;
  for (; p + w <= k; p += w)
    step(p, [](const T* q) { return load_wide<S>(q); }, [](const S* q) { return load(q); });
  if (p < k)
    step(
        p, [&](const T* q) { return load_wide_part<S>(q, static_cast<int>(k - p)); },
        [&](const S* q) { return load_wide_part<S>(q, static_cast<int>(k - p)); });
  if constexpr (kDotRows <= w) {
#pragma GCC unroll 3
    for (int t = 0; t < kTokens; ++t) {
      const Vec<S> sums = sum_lanes<S>(sum[t]);
      std::memcpy(out + t * kDotRows, &sums, kDotRows * sizeof(S));
    }
  } else {  // two lanes: doubles of the baseline
    for (int t = 0; t < kTokens; ++t)
      for (int j = 0; j < kDotRows; ++j) out[t * kDotRows + j] = sum[t][j][0] + sum[t][j][1];
  }
}

// Columns [j0, j1) of C: rows of B. A is (m, k) of the sums' type.
template <class S, class T, class TC>
void few_rows_range(std::int64_t m, std::int64_t k, const S* a, std::int64_t a_stride, const T* b,
                    std::int64_t b_stride, const TC* bias, TC* c, std::int64_t c_stride,
                    std::int64_t j0, std::int64_t j1) {
  const std::int64_t groups = ceil_div(m, kDotTokens);
  for (std::int64_t j = j0; j < j1; j += kDotRows) {
    std::int64_t offset[kDotRows];  // rows past the last read it again and are not written
    for (int i = 0; i < kDotRows; ++i) offset[i] = std::min(j + i, j1 - 1) * b_stride;
    const int live = static_cast<int>(std::min<std::int64_t>(kDotRows, j1 - j));
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t t = m * group / groups;
      const int tokens = static_cast<int>(m * (group + 1) / groups - t);
      alignas(64) S out[kDotTokens * kDotRows];
      if (tokens == 3)
        dots<S, T, 3>(k, a + t * a_stride, a_stride, b, offset, out);
      else if (tokens == 2)
        dots<S, T, 2>(k, a + t * a_stride, a_stride, b, offset, out);
      else
        dots<S, T, 1>(k, a + t * a_stride, a_stride, b, offset, out);
      if (bias != nullptr)
        for (int s = 0; s < tokens; ++s)
          for (int i = 0; i < live; ++i) out[s * kDotRows + i] += to_float(bias[j + i]);
      for (int s = 0; s < tokens; ++s)
        convert(out + s * kDotRows, c + (t + s) * c_stride + j, live);
    }
  }
}

// A core reads 100 bytes from its cache or does 150 operations in a nanosecond; another thread pays
// from 2.5 us of work on.
inline std::int64_t few_rows_tasks(const Context& context, std::int64_t m, std::int64_t numbers,
                                   std::int64_t bytes) {
  const std::int64_t nanoseconds = bytes / 100 + 2 * numbers * m / 150;
  return std::clamp<std::int64_t>(nanoseconds / 2500, 1, thread_count(context));
}

template <class S, class T, class TC>
void few_rows(const Context& context, std::int64_t m, std::int64_t n, std::int64_t k, const S* a,
              std::int64_t a_stride, const T* b, std::int64_t b_stride, const TC* bias, TC* c,
              std::int64_t c_stride) {
  if (m == 0 || n == 0) return;
  const std::int64_t tasks =
      few_rows_tasks(context, m, n * k, n * k * static_cast<std::int64_t>(sizeof(T)));
  const std::int64_t step = ceil_div(ceil_div(n, kDotRows), tasks) * kDotRows;
  parallel_for(context, ceil_div(n, step), [&](std::int64_t task) {
    few_rows_range(m, k, a, a_stride, b, b_stride, bias, c, c_stride, task * step,
                   std::min(n, (task + 1) * step));
  });
}

// c_t += sum over kDepth rows of B: a[t, d] b[d, :], on `cols` columns; c has room for whole
// vectors
template <class S, class T, int kTokens, int kDepth>
inline void add_rows(const S* a, std::int64_t a_stride, const T* b, std::int64_t b_stride, S* c,
                     std::int64_t c_stride, std::int64_t cols) {
  constexpr int w = kLanes<S>;
  Vec<S> value[kTokens][kDepth];
  for (int t = 0; t < kTokens; ++t)
    for (int d = 0; d < kDepth; ++d) value[t][d] = broadcast(a[t * a_stride + d]);
  std::int64_t j = 0;
  for (; j + w <= cols; j += w) {
    Vec<S> sum[kTokens];
    for (int t = 0; t < kTokens; ++t) sum[t] = load(c + t * c_stride + j);
#pragma GCC unroll 8
    for (int d = 0; d < kDepth; ++d) {
      Vec<S> weight = load_wide<S>(b + d * b_stride + j);
      pin(weight);
      for (int t = 0; t < kTokens; ++t) sum[t] = fma(value[t][d], weight, sum[t]);
    }
    for (int t = 0; t < kTokens; ++t) store(c + t * c_stride + j, sum[t]);
  }
  for (int t = 0; j < cols && t < kTokens; ++t) {
    Vec<S> sum = load(c + t * c_stride + j);
    for (int d = 0; d < kDepth; ++d)
      sum = fma(value[t][d], load_wide_part<S>(b + d * b_stride + j, static_cast<int>(cols - j)),
                sum);
    store(c + t * c_stride + j, sum);
  }
}

// Columns [j0, j1) of C (m, n) = A B with B (k, n): whole rows of B are read, several at a time.
template <class S, class T, class TC>
void by_rows_range(std::int64_t m, std::int64_t k, const S* a, std::int64_t a_stride, const T* b,
                   std::int64_t b_stride, TC* c, std::int64_t c_stride, std::int64_t j0,
                   std::int64_t j1) {
  static thread_local Scratch memory;
  // Some rows of B and m of C at a time stay in the level-1 cache.
  const std::int64_t columns = m <= 4 ? 1024 : 256;
  S* const sums = memory.get<S>(m * columns);
  for (std::int64_t j = j0; j < j1; j += columns) {
    const std::int64_t cols = std::min(columns, j1 - j);
    std::fill_n(sums, m * columns, S{0});
    const auto add = [&](auto depth, std::int64_t p) {
      constexpr int d = decltype(depth)::value;
      const T* rows = b + p * b_stride + j;
      std::int64_t t = 0;
      for (; t + 4 <= m; t += 4)
        add_rows<S, T, 4, d>(a + t * a_stride + p, a_stride, rows, b_stride, sums + t * columns,
                             columns, cols);
      for (; t < m; ++t)
        add_rows<S, T, 1, d>(a + t * a_stride + p, a_stride, rows, b_stride, sums + t * columns,
                             columns, cols);
    };
    std::int64_t p = 0;
    for (; m < 4 && p + 8 <= k; p += 8) add(std::integral_constant<int, 8>(), p);
    for (; p + 4 <= k; p += 4) add(std::integral_constant<int, 4>(), p);
    for (; p < k; ++p) add(std::integral_constant<int, 1>(), p);
    for (std::int64_t t = 0; t < m; ++t) convert(sums + t * columns, c + t * c_stride + j, cols);
  }
}

#if defined(__AVX512F__)
constexpr int kOuterVecs = 4;  // 16 sums, 4 vectors of B and 1 of A in 32 registers
#else
constexpr int kOuterVecs = 2;
#endif
constexpr int kOuterRows = 4;

// c (kRows, live) = sum over k rows: a[t, i] b[t, :]; live is kVecs vectors, or less than one.
template <class S, class TC, int kRows, int kVecs>
inline void outer_tile(std::int64_t k, const S* a, std::int64_t a_stride, const S* b,
                       std::int64_t b_stride, TC* c, std::int64_t c_stride, int live) {
  constexpr int w = kLanes<S>, width = kVecs * w;
  Vec<S> sum[kRows][kVecs] = {};
  for (std::int64_t t = 0; t < k; ++t) {
    Vec<S> row[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      row[v] =
          live < w ? load_wide_part<S>(b + t * b_stride, live) : load(b + t * b_stride + v * w);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const Vec<S> value = broadcast(a[t * a_stride + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[i][v] = fma(value, row[v], sum[i][v]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) {
    if (std::is_same_v<S, TC> && live == width) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v)
        store(reinterpret_cast<S*>(c + i * c_stride) + v * w, sum[i][v]);
    } else {
      S line[width];
      for (int v = 0; v < kVecs; ++v) store(line + v * w, sum[i][v]);
      convert(line, c + i * c_stride, live);
    }
  }
}

// Rows [i0, i1) of C (m, n) = A^T B with A (k, m), B (k, n). Nothing is packed: a part of B of 64
// KB meets all rows of C. With 24 KB, which would stay in the level-1 cache, 8 rows of 1,024
// columns take 1.4 of the time: pieces of C too short for the prefetcher.
template <class S, class TC>
void outer_range(std::int64_t k, std::int64_t n, const S* a, std::int64_t a_stride, const S* b,
                 std::int64_t b_stride, TC* c, std::int64_t c_stride, std::int64_t i0,
                 std::int64_t i1) {
  constexpr int w = kLanes<S>, width = kOuterVecs * w;
  const std::int64_t columns =
      std::max<std::int64_t>((64 << 10) / sizeof(S) / std::max<std::int64_t>(k, 1) / width, 1) *
      width;
  for (std::int64_t j0 = 0; j0 < n; j0 += columns) {
    const std::int64_t j1 = std::min(n, j0 + columns);
    const auto rows = [&](auto count, std::int64_t i) {
      constexpr int height = decltype(count)::value;
      std::int64_t j = j0;
      for (; j + width <= j1; j += width)
        outer_tile<S, TC, height, kOuterVecs>(k, a + i, a_stride, b + j, b_stride,
                                              c + i * c_stride + j, c_stride, width);
      for (; j < j1; j += w)
        outer_tile<S, TC, height, 1>(k, a + i, a_stride, b + j, b_stride, c + i * c_stride + j,
                                     c_stride, static_cast<int>(std::min<std::int64_t>(w, j1 - j)));
    };
    std::int64_t i = i0;
    for (; i + kOuterRows <= i1; i += kOuterRows)
      rows(std::integral_constant<int, kOuterRows>(), i);
    for (; i < i1; ++i) rows(std::integral_constant<int, 1>(), i);
  }
}

}  // namespace
}  // namespace structmat
