// SPDX-License-Identifier: Apache-2.0
// Products of a strided matrix S with a sparse random matrix R: Y = S R or Z = S^T R. Each row of R
// has four entries, one in each quarter of its columns (the block construction of Nelson and
// Nguyen, FOCS 2013, "OSNAP"), uniform in +-[1/2, 3/2): signs alone would make two rows in 2048
// parallel, for 16 columns, and a Krylov space from there would never tell those two coordinates
// apart. Reading S is what the product costs.
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

// R by tiles of kTileRows rows: for each column the rows with an entry there, and the entries.
template <class S>
class Lists {
 public:
  Lists(const Context& context, std::int64_t rows, std::int64_t cols, std::uint64_t seed)
      : cols_(cols) {
    const std::int64_t tiles = ceil_div(rows, kTileRows);
    rows_.resize(static_cast<std::size_t>(tiles * kTileEntries));
    entries_.resize(static_cast<std::size_t>(tiles * kTileEntries));
    ends_.resize(static_cast<std::size_t>(tiles * cols));
    parallel_for(context, tiles, [&](std::int64_t tile) { fill(tile, rows, seed); });
  }

  // sums[c sums_stride ..] += the rows of a panel (kPanel numbers each) times column c's entries.
  void add(std::int64_t tile, const S* panel, S* sums, std::int64_t sums_stride,
           Ahead& ahead) const {
    constexpr int w = kLanes<S>, vecs = kPanel / w;
    const std::uint8_t* const rows = &rows_[static_cast<std::size_t>(tile * kTileEntries)];
    const S* const entries = &entries_[static_cast<std::size_t>(tile * kTileEntries)];
    const std::uint8_t* const ends = &ends_[static_cast<std::size_t>(tile * cols_)];
    int i = 0;
    for (std::int64_t c = 0; c < cols_; ++c, sums += sums_stride) {
      ahead.ask();
      Vec<S> sum[vecs];
#pragma GCC unroll 24
      for (int v = 0; v < vecs; ++v) sum[v] = load(sums + v * w);
      for (; i < ends[c]; ++i) {
        const Vec<S> entry = broadcast(entries[i]);
#pragma GCC unroll 24
        for (int v = 0; v < vecs; ++v)
          sum[v] = fma(entry, load(panel + rows[i] * kPanel + v * w), sum[v]);
      }
#pragma GCC unroll 24
      for (int v = 0; v < vecs; ++v) store(sums + v * w, sum[v]);
    }
  }

 private:
  static constexpr std::int64_t kTileEntries = kTileRows * kEntries;
  static_assert(kTileEntries < 256, "places in a tile are kept as bytes");

  void fill(std::int64_t tile, std::int64_t rows, std::uint64_t seed) {
    const std::int64_t first = tile * kTileRows, count = std::min(kTileRows, rows - first);
    std::int64_t columns[kTileEntries];
    S entries[kTileEntries];
    std::uint8_t* const ends = &ends_[static_cast<std::size_t>(tile * cols_)];
    std::fill_n(ends, cols_, std::uint8_t{0});
    for (std::int64_t r = 0; r < count; ++r) {
      const Philox place = random_words(first + r, 0, seed, 0);
      const Philox value = random_words(first + r, 1, seed, 0);
      for (std::int64_t k = 0; k < kEntries; ++k) {
        const std::int64_t low = k * cols_ / kEntries, high = (k + 1) * cols_ / kEntries;
        const auto width = static_cast<std::uint64_t>(high - low);
        const std::int64_t i = r * kEntries + k;
        columns[i] = low + static_cast<std::int64_t>(place.word[k] * width >> 32);
        const S size = S(0.5) + static_cast<S>(value.word[k] >> 9) * S(0x1p-23);
        entries[i] = (value.word[k] & 1) != 0 ? size : -size;
        ++ends[columns[i]];
      }
    }
    std::uint8_t sum = 0;
    for (std::int64_t c = 0; c < cols_; ++c) {
      const std::uint8_t size = ends[c];
      ends[c] = sum;
      sum = static_cast<std::uint8_t>(sum + size);
    }
    for (std::int64_t i = 0; i < count * kEntries; ++i) {
      const std::size_t at = static_cast<std::size_t>(tile * kTileEntries) + ends[columns[i]]++;
      rows_[at] = static_cast<std::uint8_t>(i / kEntries);
      entries_[at] = entries[i];
    }
  }

  const std::int64_t cols_;
  std::vector<std::uint8_t> rows_, ends_;  // ends_: by tile and column, in rows_ and entries_
  std::vector<S> entries_;
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
  const Lists<S> lists(context, n, y.cols, seed);
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
  const Lists<S> lists(context, m, z.cols, seed);
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
