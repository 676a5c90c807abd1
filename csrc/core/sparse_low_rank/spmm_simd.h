// SPDX-License-Identifier: Apache-2.0
// Rows of a sparse matrix times a panel of tokens. For files under structmat_simd_sources
// (everything is in an anonymous namespace).
#pragma once
#include <utility>

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

  // sums (i1 - i0, ld) += rows [i0, i1) times the panel.
  template <class S>
  void multiply(std::int64_t i0, std::int64_t i1, const S* panel, const TokenTile& tile,
                S* sums) const {
    static thread_local Scratch memory;
    const std::int64_t slabs = pattern.slabs();
    for (std::int64_t i = i0; i < i1;) {
      const std::int64_t g = i / pattern.group, end = std::min(i1, (g + 1) * pattern.group);
      const Group of = group(g);
      // Blocks of rows of nearly equal size.
      const int height = static_cast<int>((end - i) / ceil_div(end - i, kSparseRows));
      const T* const from = of.values + (i - g * pattern.group) * of.k;
      const S* values;
      if constexpr (std::is_same_v<S, T>) {
        values = from;
      } else {
        S* const wide = memory.get<S>(height * of.k);
        convert(from, wide, height * of.k);
        values = wide;
      }
      for (std::int64_t s = 0; s < slabs; ++s) {
        const std::int64_t begin = pattern.starts[g * slabs + s],
                           count = pattern.starts[g * slabs + s + 1] - begin;
        if (count > 0)
          multiply_sparse_rows<S>(
              {pattern.columns + begin, count, values + (begin - of.first), of.k}, height,
              panel + s * sparse_slab_columns * tile.ld, tile, sums + (i - i0) * tile.ld);
      }
      i += height;
    }
  }
};

}  // namespace
}  // namespace structmat
