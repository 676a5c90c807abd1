// SPDX-License-Identifier: Apache-2.0
// Products of a tile with one column, for panels too narrow to fill a vector: vectors run along the
// tile. For sweep_simd.cpp alone, in an anonymous namespace like it.
#pragma once
#include <algorithm>

#include "svd/sweep_tiles_simd.h"

namespace structmat {
namespace {

// Where the numbers of a tile lie: rows `stride` apart in panels `panel` apart. Packed, or in
// place.
template <class S>
struct Lines {
  const S* data;
  std::int64_t stride, panel;
};

// c[i] += sum of a[i] b over the columns of a tile, its vectors along the columns.
template <class S>
void add_dots(Lines<S> tile, std::int64_t rows, std::int64_t cols, const S* b, S* c) {
  constexpr int w = kLanes<S>, kRows = 4;
  for (std::int64_t i = 0; i < rows; i += kRows) {
    const std::int64_t last = rows - 1 - i;  // rows beyond it are computed again
    const S* row[kRows];
    for (int k = 0; k < kRows; ++k)
      row[k] = tile.data + (i + std::min<std::int64_t>(k, last)) * tile.stride;
    Vec<S> sum[kRows] = {};
    S rest[kRows] = {};
    for (std::int64_t p = 0; p < cols; p += kPanel) {
      const std::int64_t live = std::min(kPanel, cols - p);
      std::int64_t q = 0;
      for (; q + w <= live; q += w) {
        const Vec<S> right = load(b + p + q);
#pragma GCC unroll 4
        for (int k = 0; k < kRows; ++k) sum[k] = fma(load(row[k] + q), right, sum[k]);
      }
      for (; q < live; ++q)
        for (int k = 0; k < kRows; ++k) rest[k] += row[k][q] * b[p + q];
      for (int k = 0; k < kRows; ++k) row[k] += tile.panel;
    }
    for (int k = 0; k < kRows && k <= last; ++k) {
      S lanes[w];
      store(lanes, sum[k]);
      for (int step = w / 2; step > 0; step /= 2)
        for (int q = 0; q < step; ++q) lanes[q] += lanes[q + step];
      c[i + k] += lanes[0] + rest[k];
    }
  }
}
// c[j] += sum of a[., j] b over the rows of a tile.
template <class S>
void add_rows(Lines<S> tile, std::int64_t rows, std::int64_t cols, const S* b, S* c) {
  constexpr int w = kLanes<S>, kVecs = kPanel / w;
  for (std::int64_t p = 0; p < cols; p += kPanel, tile.data += tile.panel) {
    if (cols - p >= kPanel) {
      Vec<S> sum[kVecs] = {};
      for (std::int64_t i = 0; i < rows; ++i) {
        const Vec<S> factor = broadcast(b[i]);
#pragma GCC unroll 24
        for (int k = 0; k < kVecs; ++k)
          sum[k] = fma(factor, load(tile.data + i * tile.stride + k * w), sum[k]);
      }
      for (int k = 0; k < kVecs; ++k) store(c + p + k * w, load(c + p + k * w) + sum[k]);
      continue;
    }
    std::int64_t q = 0;
    for (; p + q + w <= cols; q += w) {
      Vec<S> sum{};
      for (std::int64_t i = 0; i < rows; ++i)
        sum = fma(broadcast(b[i]), load(tile.data + i * tile.stride + q), sum);
      store(c + p + q, load(c + p + q) + sum);
    }
    for (; p + q < cols; ++q) {
      S sum = 0;
      for (std::int64_t i = 0; i < rows; ++i) sum += b[i] * tile.data[i * tile.stride + q];
      c[p + q] += sum;
    }
  }
}

template <class S, bool kTransposed>
void multiply_column(Lines<S> tile, std::int64_t rows, std::int64_t cols, const S* b, S* c,
                     bool first) {
  if (first) std::fill_n(c, kTransposed ? cols : rows, S{0});
  kTransposed ? add_rows(tile, rows, cols, b, c) : add_dots(tile, rows, cols, b, c);
}

}  // namespace
}  // namespace structmat
