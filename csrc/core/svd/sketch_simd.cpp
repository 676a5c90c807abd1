// SPDX-License-Identifier: Apache-2.0
// Products of a strided matrix S with a sparse random sign matrix R: Y = S R or Z = S^T R. Each row
// of R has four entries +-1, one in each quarter of its columns (the block construction of Nelson
// and Nguyen, FOCS 2013, "OSNAP"). As the start of a block Krylov space it does what a Gaussian one
// does, for four additions an entry of S in place of one product a column: reading S is what it
// costs.
//
// Tiles of S are packed as for dense products. Rows of a panel, its columns for S R, are added to
// the sums of the columns of R that take them; those lists are made once, by tiles of R.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "random/philox.h"
#include "svd/sweep_tiles_simd.h"

namespace structmat {
namespace {

constexpr std::int64_t kEntries = 4;  // of a row of R
constexpr std::int64_t kTileRows = kPanel;

// By tile of kTileRows rows of R and by column: the rows with +1, then those with -1.
class Lists {
 public:
  Lists(const Context& context, std::int64_t rows, std::int64_t cols, std::uint64_t seed)
      : cols_(cols) {
    const std::int64_t tiles = ceil_div(rows, kTileRows);
    rows_.resize(static_cast<std::size_t>(tiles * kTileRows * kEntries));
    ends_.resize(static_cast<std::size_t>(tiles * 2 * cols));
    parallel_for(context, tiles, [&](std::int64_t tile) { fill(tile, rows, seed); });
  }

  // sums[c sums_stride ..] += the rows of a panel (kPanel numbers each) that column c takes.
  template <class S>
  void add(std::int64_t tile, const S* panel, S* sums, std::int64_t sums_stride,
           Ahead& ahead) const {
    constexpr int w = kLanes<S>, vecs = kPanel / w;
    const Entry* row = &rows_[static_cast<std::size_t>(tile * kTileRows * kEntries)];
    const Entry* end = &ends_[static_cast<std::size_t>(tile * 2 * cols_)];
    const Entry* const base = row;
    for (std::int64_t c = 0; c < cols_; ++c, sums += sums_stride) {
      ahead.ask();
      Vec<S> sum[vecs];
#pragma GCC unroll 24
      for (int v = 0; v < vecs; ++v) sum[v] = load(sums + v * w);
      for (const Entry* const last = base + *end++; row < last; ++row)
#pragma GCC unroll 24
        for (int v = 0; v < vecs; ++v) sum[v] += load(panel + *row * kPanel + v * w);
      for (const Entry* const last = base + *end++; row < last; ++row)
#pragma GCC unroll 24
        for (int v = 0; v < vecs; ++v) sum[v] -= load(panel + *row * kPanel + v * w);
#pragma GCC unroll 24
      for (int v = 0; v < vecs; ++v) store(sums + v * w, sum[v]);
    }
  }

 private:
  using Entry = std::uint8_t;  // up to 192 a tile

  void fill(std::int64_t tile, std::int64_t rows, std::uint64_t seed) {
    const std::int64_t first = tile * kTileRows, count = std::min(kTileRows, rows - first);
    std::int64_t lists[kTileRows * kEntries];  // 2 column + (negative)
    Entry* const ends = &ends_[static_cast<std::size_t>(tile * 2 * cols_)];
    std::fill_n(ends, 2 * cols_, Entry{0});
    for (std::int64_t r = 0; r < count; ++r) {
      const Philox random = random_words(first + r, 0, seed, 0);
      for (std::int64_t k = 0; k < kEntries; ++k) {
        const std::int64_t low = k * cols_ / kEntries, high = (k + 1) * cols_ / kEntries;
        const std::uint32_t word = random.word[k];
        const std::int64_t column =
            low +
            static_cast<std::int64_t>((word >> 1) * static_cast<std::uint64_t>(high - low) >> 31);
        lists[r * kEntries + k] = 2 * column + (word & 1);
        ++ends[lists[r * kEntries + k]];
      }
    }
    Entry* const out = &rows_[static_cast<std::size_t>(tile * kTileRows * kEntries)];
    Entry sum = 0;
    for (std::int64_t i = 0; i < 2 * cols_; ++i) {
      const Entry size = ends[i];
      ends[i] = sum;
      sum = static_cast<Entry>(sum + size);
    }
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t k = 0; k < kEntries; ++k)
        out[ends[lists[r * kEntries + k]]++] = static_cast<Entry>(r);
  }

  const std::int64_t cols_;
  std::vector<std::uint8_t> rows_, ends_;
};

template <class S>
void transpose_panel(const S* from, S* to) {
  constexpr int w = kLanes<S>;
  for (std::int64_t i = 0; i < kPanel; i += w)
    for (std::int64_t j = 0; j < kPanel; j += w) {
      Vec<S> square[w];
#pragma GCC unroll 16
      for (int k = 0; k < w; ++k) square[k] = load(from + (i + k) * kPanel + j);
      transpose<S>(square);
#pragma GCC unroll 16
      for (int k = 0; k < w; ++k) store(to + (j + k) * kPanel + i, square[k]);
    }
}

// to (rows, cols) = the transpose of `from`, rows `stride` apart.
template <class S>
void untranspose(const S* from, std::int64_t stride, std::int64_t rows, std::int64_t cols, S* to,
                 std::int64_t to_stride) {
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < cols; ++c) to[r * to_stride + c] = from[c * stride + r];
}

// A tile of S R: all of a row's columns.
template <class S>
void multiply(const Context& context, const Sweep& a, std::uint64_t seed, Panel<S> y) {
  const std::int64_t m = a.s.rows, n = a.s.cols;
  if (m == 0 || n == 0 || y.cols == 0) return;
  const Lists lists(context, n, y.cols, seed);
  const Tiles<S> source(a);
  const std::int64_t run = ceil_div(ceil_div(m, kTallRows), kMaxTasks) * kTallRows;
  Norms norms(a.norm, ceil_div(m, run));
  parallel_for(context, ceil_div(m, run), [&](std::int64_t task) {
    S* const tile = tile_memory<S>();
    S* const sums = sum_memory<S>((y.cols + kPanel) * kPanel);
    S* const turned = sums + y.cols * kPanel;
    const std::int64_t last = std::min(m, (task + 1) * run);
    for (std::int64_t r0 = task * run; r0 < last; r0 += kTallRows) {
      const std::int64_t rows = std::min(kTallRows, last - r0);
      std::fill_n(sums, y.cols * kPanel, S{0});
      for (std::int64_t c0 = 0; c0 < n; c0 += kWideCols) {
        const std::int64_t cols = std::min(kWideCols, n - c0);
        const bool ends = c0 + kWideCols >= n;  // the next tile lies below
        Ahead ahead = source.ahead(r0 + (ends ? kTallRows : 0), kTallRows,
                                   ends ? 0 : c0 + kWideCols, kWideCols);
        source.pack(r0, c0, rows, cols, kTallRows, tile, norms.of(task));
        for (std::int64_t c = 0; c < cols; c += kPanel) {
          transpose_panel(tile + c * kTallRows, turned);
          lists.add((c0 + c) / kPanel, turned, sums, kPanel, ahead);
        }
      }
      untranspose(sums, kPanel, rows, y.cols, y.data + r0 * y.stride, y.stride);
    }
  });
}

// As the dense product (sweep_simd.cpp): stripes of columns, slabs of rows where those are few.
template <class S>
void multiply_transposed(const Context& context, const Sweep& a, std::uint64_t seed, Panel<S> z) {
  const std::int64_t m = a.s.rows, n = a.s.cols;
  if (n == 0 || z.cols == 0) return;
  const Lists lists(context, m, z.cols, seed);
  const Slabs slabs(m, n);
  const Tiles<S> source(a);
  Scratch memory;
  S* const partial = memory.get<S>((slabs.count - 1) * n * z.cols);
  Norms norms(a.norm, slabs.tasks());
  parallel_for(context, slabs.tasks(), [&](std::int64_t task) {
    const auto [part, c0, cols, first, last] = slabs.task(task);
    S* const out = part == 0 ? z.data + c0 * z.stride : partial + ((part - 1) * n + c0) * z.cols;
    S* const tile = tile_memory<S>();
    Scratch large;  // kept only where it is small
    const std::int64_t count = slabs.width * z.cols;
    S* const sums = count > (1 << 18) ? large.get<S>(count) : sum_memory<S>(count);
    std::fill_n(sums, count, S{0});
    for (std::int64_t r0 = first; r0 < last; r0 += kTallRows) {
      Ahead ahead = source.ahead(r0 + kTallRows, kTallRows, c0, slabs.width);
      source.pack(r0, c0, std::min(kTallRows, last - r0), cols, kTallRows, tile, norms.of(task));
      for (std::int64_t c = 0; c < cols; c += kPanel)
        lists.add(r0 / kPanel, tile + c * kTallRows, sums + c, slabs.width, ahead);
    }
    untranspose(sums, slabs.width, cols, z.cols, out, part == 0 ? z.stride : z.cols);
  });
  slabs.add(context, partial, z);
}

}  // namespace

namespace STRUCTMAT_SIMD {

#define STRUCTMAT_SKETCH(S)                                                                   \
  void sweep_sketch(const Context& context, const Sweep& a, std::uint64_t seed, Panel<S> y) { \
    multiply(context, a, seed, y);                                                            \
  }                                                                                           \
  void sweep_sketch_transposed(const Context& context, const Sweep& a, std::uint64_t seed,    \
                               Panel<S> z) {                                                  \
    multiply_transposed(context, a, seed, z);                                                 \
  }
STRUCTMAT_SKETCH(float)
STRUCTMAT_SKETCH(double)

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
