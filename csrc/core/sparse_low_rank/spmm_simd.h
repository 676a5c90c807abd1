// SPDX-License-Identifier: Apache-2.0
// Rows of a sparse matrix times a panel of tokens. For files under structmat_simd_sources
// (everything is in an anonymous namespace).
//
// A number of a row that shares its columns with no other takes one multiply-add a number of the
// panel, which comes from the level-2 cache: 32 bytes a cycle, 8 multiply-adds, half of what a core
// with AVX-512 can do. With 4096 x 4096 numbers at 3 % and 1024 tokens, 1.03 GFLOP, two such cores
// of 3.5 GHz need 9.2 ms; measured 13.3, of which 2.5 read x and write y (32 MB). Groups of 16 rows
// reuse the panel in registers: 4.6 ms of arithmetic, measured 7.0 with the same 2.5.
#pragma once
#include <algorithm>
#include <utility>

#include "few_rows_simd.h"
#include "scratch.h"
#include "sparse_low_rank/token_panel_simd.h"
#include "structmat/sparse_pattern.h"

namespace structmat {
namespace {

#if defined(__AVX512F__)
constexpr int kSparseRows = 6, kSparseVecs = 4;  // 24 sums, 4 vectors of x, 1 value
#elif defined(__AVX2__)
constexpr int kSparseRows = 6, kSparseVecs = 2;
#else
constexpr int kSparseRows = 4, kSparseVecs = 2;
#endif

// Some columns of some rows: value (i, e) at values[i * stride + e].
template <class S>
struct SparseRows {
  const std::uint16_t* columns;
  std::int64_t count;
  const S* values;
  std::int64_t stride;
};

// sums (kRows, kVecs vectors) += values times the rows of the panel that `columns` name. The sums
// stay in registers; few of them would wait for each other, hence the chains.
template <class S, int kRows, int kVecs>
void sparse_kernel(const SparseRows<S>& rows, const S* panel, std::int64_t ld, S* sums) {
  constexpr int w = kLanes<S>;
  constexpr int kChains = kRows * kVecs >= 8 ? 1 : kRows * kVecs >= 4 ? 2 : 4;
  Vec<S> sum[kChains][kRows][kVecs] = {};
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sum[0][i][v] = load(sums + i * ld + v * w);
  const auto step = [&](std::int64_t e, auto chain) {
    const S* const x = panel + rows.columns[e] * ld;
    Vec<S> in[kVecs];
    if constexpr (kRows > 1)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) in[v] = load(x + v * w);
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const Vec<S> value = broadcast(rows.values[i * rows.stride + e]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v)
        sum[chain][i][v] = fma(value, kRows > 1 ? in[v] : load(x + v * w), sum[chain][i][v]);
    }
  };
  std::int64_t e = 0;
  for (; e + kChains <= rows.count; e += kChains) {
    step(e, std::integral_constant<int, 0>());
    if constexpr (kChains > 1) step(e + 1, std::integral_constant<int, 1>());
    if constexpr (kChains > 2) {
      step(e + 2, std::integral_constant<int, 2>());
      step(e + 3, std::integral_constant<int, 3>());
    }
  }
  for (; e < rows.count; ++e) step(e, std::integral_constant<int, 0>());
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      Vec<S> total = sum[0][i][v];
      if constexpr (kChains == 2) total = total + sum[1][i][v];
      if constexpr (kChains == 4) total = (total + sum[1][i][v]) + (sum[2][i][v] + sum[3][i][v]);
      store(sums + i * ld + v * w, total);
    }
}

template <class S>
using SparseKernel = void (*)(const SparseRows<S>&, const S*, std::int64_t, S*);

template <class S, int... kIndex>
SparseKernel<S> sparse_kernel_for(int rows, int vecs, std::integer_sequence<int, kIndex...>) {
  static constexpr SparseKernel<S> table[] = {
      sparse_kernel<S, kIndex / kSparseVecs + 1, kIndex % kSparseVecs + 1>...};
  return table[(rows - 1) * kSparseVecs + vecs - 1];
}
template <class S, int... kIndex>
SparseKernel<S> one_row_kernel_for(int vecs, std::integer_sequence<int, kIndex...>) {
  static constexpr SparseKernel<S> table[] = {sparse_kernel<S, 1, kIndex + 1>...};
  return table[vecs - 1];
}

// As above for any number of vectors.
template <class S>
void multiply_sparse_rows(const SparseRows<S>& rows, int height, const S* panel,
                          const TokenTile& tile, S* sums) {
  const std::int64_t most = height == 1 ? kTileVecs : kSparseVecs;
  for (std::int64_t v = 0; v < tile.vecs; v += most) {
    const int vecs = static_cast<int>(std::min(most, tile.vecs - v));
    const std::int64_t at = v * kLanes<S>;
    const SparseKernel<S> kernel =
        height == 1
            ? one_row_kernel_for<S>(vecs, std::make_integer_sequence<int, kTileVecs>())
            : sparse_kernel_for<S>(height, vecs,
                                   std::make_integer_sequence<int, kSparseRows * kSparseVecs>());
    kernel(rows, panel + at, tile.ld, sums + at);
  }
}

// sum_e values[e] x[columns[e]]. Numbers one by one: a gather instruction takes as long.
template <class S>
S sparse_dot(const std::uint16_t* columns, const S* values, std::int64_t count, const S* x) {
  S sum[4] = {};
  std::int64_t e = 0;
  for (; e + 4 <= count; e += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum[i] += values[e + i] * x[columns[e + i]];
  for (; e < count; ++e) sum[0] += values[e] * x[columns[e]];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

constexpr int kScatterRows = 16;

// Row columns[e] - first of sums += sum_q value(q, e) row q of x, `height` of them.
template <class S>
void scatter_rows(const SparseRows<S>& rows, int height, const S* x, std::int64_t ld,
                  std::int64_t first, S* sums) {
  constexpr int w = kLanes<S>, half = kScatterRows / 2;
  for (std::int64_t v = 0; v < ld; v += w) {
    Vec<S> in[kScatterRows];
    if (height == kScatterRows) {
#pragma GCC unroll 16
      for (int q = 0; q < kScatterRows; ++q) in[q] = load(x + q * ld + v);
      for (std::int64_t e = 0; e < rows.count; ++e) {
        S* const to = sums + (rows.columns[e] - first) * ld + v;
        const S *low = rows.values + e, *high = low + half * rows.stride;
        Vec<S> sum = load(to), other{};
#pragma GCC unroll 8
        for (int q = 0; q < half; ++q) {
          sum = fma(broadcast(low[q * rows.stride]), in[q], sum);
          other = fma(broadcast(high[q * rows.stride]), in[half + q], other);
        }
        store(to, sum + other);
      }
    } else {
      for (std::int64_t e = 0; e < rows.count; ++e) {
        S* const to = sums + (rows.columns[e] - first) * ld + v;
        Vec<S> sum = load(to);
        for (int q = 0; q < height; ++q)
          sum = fma(broadcast(rows.values[q * rows.stride + e]), load(x + q * ld + v), sum);
        store(to, sum);
      }
    }
  }
}

// A sparse matrix: its pattern and values.
template <class T>
struct SparseMatrix {
  SparsePatternView pattern;
  const T* values;

  // The rows of group g: its columns and, from its row i on, its values.
  struct Group {
    std::int64_t first, k;  // of its columns
    const T* values;
  };
  Group group(std::int64_t g) const {
    const std::int64_t first = pattern.starts[g * pattern.slabs()],
                       k = pattern.starts[(g + 1) * pattern.slabs()] - first;
    return {first, k, values + pattern.group * first};
  }

  // body(s, begin, end): the columns of group g in slab s
  template <class Body>
  void for_slabs(std::int64_t g, Body&& body) const {
    for (std::int64_t s = 0, at = g * pattern.slabs(); s < pattern.slabs(); ++s, ++at)
      if (pattern.starts[at] < pattern.starts[at + 1])
        body(s, pattern.starts[at], pattern.starts[at + 1]);
  }

  // sums (i1 - i0, ld) += rows [i0, i1) times the panel, slab by slab, whose part of the panel
  // stays in the level-2 cache.
  template <class S>
  void multiply(std::int64_t i0, std::int64_t i1, const S* panel, const TokenTile& tile,
                S* sums) const {
    static thread_local Scratch memory;
    const std::int64_t slabs = pattern.slabs();
    for (std::int64_t s = 0; s < slabs; ++s)
      for (std::int64_t i = i0; i < i1;) {
        const std::int64_t g = i / pattern.group, end = std::min(i1, (g + 1) * pattern.group);
        const std::int64_t begin = pattern.starts[g * slabs + s],
                           count = pattern.starts[g * slabs + s + 1] - begin;
        // Blocks of rows of nearly equal size.
        const int height = static_cast<int>((end - i) / ceil_div(end - i, kSparseRows));
        if (count > 0) {
          const Group of = group(g);
          const T* const from = of.values + ((i - g * pattern.group) * of.k + begin - of.first);
          SparseRows<S> rows{pattern.columns + begin, count, nullptr, of.k};
          if constexpr (std::is_same_v<S, T>) {
            rows.values = from;
          } else {
            S* const wide = memory.get<S>(height * count);
            for (int q = 0; q < height; ++q) convert(from + q * of.k, wide + q * count, count);
            rows.values = wide;
            rows.stride = count;
          }
          multiply_sparse_rows<S>(rows, height, panel + s * sparse_slab_columns * tile.ld, tile,
                                  sums + (i - i0) * tile.ld);
        }
        i += height;
      }
  }

  // sums[t * (i1 - i0) + i - i0] += row i . x_t, for few tokens.
  template <class S>
  void multiply_few(std::int64_t i0, std::int64_t i1, std::int64_t tokens, const S* x,
                    std::int64_t x_stride, S* sums) const {
    static thread_local Scratch memory;
    for (std::int64_t i = i0; i < i1;) {
      const std::int64_t g = i / pattern.group, end = std::min(i1, (g + 1) * pattern.group);
      const Group of = group(g);
      const T* const from = of.values + (i - g * pattern.group) * of.k;
      // Rows that share columns: dense products with a copy of these, also where a task has only
      // one of them, for the order of sums may not depend on how rows are shared out.
      if (std::min(pattern.group, pattern.rows - g * pattern.group) > 1) {
        S* const gathered = memory.get<S>(tokens * (of.k + i1 - i0));
        S* const more = gathered + tokens * of.k;
        for_slabs(g, [&](std::int64_t s, std::int64_t begin, std::int64_t stop) {
          for (std::int64_t t = 0; t < tokens; ++t) {
            const S* const in = x + t * x_stride + s * sparse_slab_columns;
            S* const to = gathered + t * of.k;
            for (std::int64_t e = begin; e < stop; ++e) to[e - of.first] = in[pattern.columns[e]];
          }
        });
        few_rows_range<S, T, S>(tokens, of.k, gathered, of.k, from, of.k, nullptr, more, end - i, 0,
                                end - i);
        for (std::int64_t t = 0; t < tokens; ++t)
          for (std::int64_t q = 0; q < end - i; ++q)
            sums[t * (i1 - i0) + i - i0 + q] += more[t * (end - i) + q];
      } else {
        const S* values;
        if constexpr (std::is_same_v<S, T>) {
          values = from;
        } else {
          S* const wide = memory.get<S>(of.k);
          convert(from, wide, of.k);
          values = wide;
        }
        for_slabs(g, [&](std::int64_t s, std::int64_t begin, std::int64_t stop) {
          for (std::int64_t t = 0; t < tokens; ++t)
            sums[t * (i1 - i0) + i - i0] +=
                sparse_dot(pattern.columns + begin, values + (begin - of.first), stop - begin,
                           x + t * x_stride + s * sparse_slab_columns);
        });
      }
      i = end;
    }
  }

  // sums (j1 - j0, ld) += columns [j0, j1), as rows, times the panel: some rows of the panel in
  // registers meet every column of their group, whose sums stay in the level-2 cache.
  template <class S>
  void multiply_transposed(std::int64_t j0, std::int64_t j1, const S* panel, const TokenTile& tile,
                           S* sums) const {
    static thread_local Scratch memory;
    for (std::int64_t g = 0; g < pattern.groups(); ++g) {
      const Group of = group(g);
      const std::int64_t rows = std::min(pattern.group, pattern.rows - g * pattern.group);
      for_slabs(g, [&](std::int64_t s, std::int64_t begin, std::int64_t end) {
        const std::int64_t first = s * sparse_slab_columns;
        const auto at = [&](std::int64_t j) {
          return std::lower_bound(pattern.columns + begin, pattern.columns + end, j - first,
                                  [](std::uint16_t a, std::int64_t b) { return a < b; }) -
                 pattern.columns;
        };
        const std::int64_t e0 = at(j0), e1 = at(j1);
        if (e0 == e1) return;
        for (std::int64_t q = 0; q < rows; q += kScatterRows) {
          const int height = static_cast<int>(std::min<std::int64_t>(kScatterRows, rows - q));
          const T* const from = of.values + (q * of.k + e0 - of.first);
          SparseRows<S> block{pattern.columns + e0, e1 - e0, nullptr, of.k};
          if constexpr (std::is_same_v<S, T>) {
            block.values = from;
          } else {
            S* const wide = memory.get<S>(height * block.count);
            for (int i = 0; i < height; ++i)
              convert(from + i * of.k, wide + i * block.count, block.count);
            block.values = wide;
            block.stride = block.count;
          }
          scatter_rows(block, height, panel + (g * pattern.group + q) * tile.ld, tile.ld,
                       j0 - first, sums);
        }
      });
    }
  }
};

}  // namespace
}  // namespace structmat
