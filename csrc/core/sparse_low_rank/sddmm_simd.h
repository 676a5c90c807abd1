// SPDX-License-Identifier: Apache-2.0
// values[e] = sum_t dy[t, i] x[t, j] for the entries e = (i, j) of a support. For files under
// structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include "product_simd.h"
#include "sparse_low_rank/spmm_simd.h"

namespace structmat {
namespace {

// One row's entries over one tile: totals[e] (+)= y . x_e, y and the rows of the panel of kVecs
// vectors. As many entries as lanes are summed at a time, then their lanes by one transposed sum.
template <class S, int kVecs>
void sampled_kernel(const std::uint16_t* columns, std::int64_t count, const S* y, const S* panel,
                    bool begin, S* totals) {
  constexpr int w = kLanes<S>;
  constexpr std::int64_t ld = kVecs * w;
  Vec<S> of_y[kVecs];
#pragma GCC unroll 8
  for (int v = 0; v < kVecs; ++v) of_y[v] = load(y + v * w);
  for (std::int64_t e = 0; e < count; e += w) {
    Vec<S> sums[w];
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) {
      const S* const x = panel + columns[std::min(e + i, count - 1)] * ld;
      sums[i] = of_y[0] * load(x);
#pragma GCC unroll 8
      for (int v = 1; v < kVecs; ++v) sums[i] = fma(of_y[v], load(x + v * w), sums[i]);
    }
    Vec<S> sum = sum_lanes<S>(sums);
    if (e + w <= count) {
      store(totals + e, begin ? sum : load(totals + e) + sum);
    } else {
      S line[w];
      store(line, sum);
      for (std::int64_t i = 0; i < count - e; ++i)
        totals[e + i] = begin ? line[i] : totals[e + i] + line[i];
    }
  }
}

template <class S, int... kIndex>
auto sampled_kernel_for(std::int64_t vecs, std::integer_sequence<int, kIndex...>) {
  using Kernel = void (*)(const std::uint16_t*, std::int64_t, const S*, const S*, bool, S*);
  static constexpr Kernel table[] = {sampled_kernel<S, kIndex + 1>...};
  return table[vecs - 1];
}

// As many entries of `w` rows as lanes: row vectors of dy (tokens, w) times numbers of x.
template <class S>
inline void sampled_square(const std::uint16_t* columns, int live, const S* y, const S* panel,
                           const TokenTile& tile, Vec<S> (&sums)[kLanes<S>]) {
  constexpr int w = kLanes<S>;
  const S* x[w];
  for (int i = 0; i < w; ++i) x[i] = panel + columns[std::min(i, live - 1)] * tile.ld;
  for (int i = 0; i < w; ++i) sums[i] = Vec<S>{};
  for (std::int64_t t = 0; t < tile.tokens(); ++t) {
    const Vec<S> row = load(y + t * w);
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) sums[i] = fma(row, broadcast(x[i][t]), sums[i]);
  }
  transpose<S>(sums);
}

template <class T>
struct SampledProduct {
  using S = accumulator_t<T>;
  static constexpr int w = kLanes<S>;
  // Rows at a time: whole runs of dy's rows are read, and a slab of the panel meets many.
  static constexpr std::int64_t kChunk = 256;

  ConstMatrixView dy, x;
  SparsePatternView pattern;
  T* values;

  void run(const Context& context) const {
    if (pattern.nnz == 0) return;
    if (pattern.groups() == 1 && pattern.rows > 16) return columns(context);
    static thread_local Scratch panel_memory;
    Scratch total_memory;
    S* totals;
    if constexpr (std::is_same_v<S, T>)
      totals = values;
    else
      totals = total_memory.get<S>(pattern.nnz);
    if (x.rows == 0) std::fill_n(totals, pattern.nnz, S{0});
    const TokenTiles<S> tiles(x.rows, kTileVecs);
    const std::int64_t m = pattern.rows, n = pattern.cols,
                       parts = std::min<std::int64_t>(4 * thread_count(context), ceil_div(n, w));
    for (std::int64_t i = 0; i < tiles.count; ++i) {
      const TokenTile tile = tiles[i];
      S* const panel = panel_memory.get<S>(n * tile.ld);
      parallel_for(context, parts, [&](std::int64_t part) {
        const std::int64_t squares = ceil_div(n, w), j0 = squares * part / parts * w,
                           j1 = std::min(n, squares * (part + 1) / parts * w);
        load_panel<S, T>(x, tile, j0, j1, panel + j0 * tile.ld);
      });
      parallel_for(context, ceil_div(m, kChunk), [&](std::int64_t chunk) {
        const std::int64_t i0 = chunk * kChunk, i1 = std::min(m, i0 + kChunk);
        if (pattern.group == 16)
          groups(tile, panel, i0, i1, totals);
        else
          rows(tile, panel, i0, i1, totals);
      });
    }
    if constexpr (!std::is_same_v<S, T>)
      parallel_for(context, ceil_div(pattern.nnz, kConvert), [&](std::int64_t part) {
        const std::int64_t e = part * kConvert;
        convert(totals + e, values + e, std::min(kConvert, pattern.nnz - e));
      });
  }

  static constexpr std::int64_t kConvert = 1 << 16;

  void rows(const TokenTile& tile, const S* panel, std::int64_t i0, std::int64_t i1,
            S* totals) const {
    static thread_local Scratch memory;
    S* const y = memory.get<S>(kChunk * tile.ld);
    load_panel<S, T>(dy, tile, i0, i1, y);
    const auto kernel =
        sampled_kernel_for<S>(tile.vecs, std::make_integer_sequence<int, kTileVecs>());
    const std::int64_t slabs = pattern.slabs();
    for (std::int64_t s = 0; s < slabs; ++s)
      for (std::int64_t i = i0; i < i1; ++i) {
        const std::int64_t g = i / pattern.group, begin = pattern.starts[g * slabs + s],
                           count = pattern.starts[g * slabs + s + 1] - begin;
        if (count == 0) continue;
        const auto of = SparseMatrix<S>{pattern, totals}.group(g);
        const std::int64_t at =
            pattern.group * of.first + (i - g * pattern.group) * of.k + begin - of.first;
        kernel(pattern.columns + begin, count, y + (i - i0) * tile.ld,
               panel + s * sparse_slab_columns * tile.ld, tile.t0 == 0, totals + at);
      }
  }

  // Groups of 16 rows, whose dy are vectors as they lie.
  void groups(const TokenTile& tile, const S* panel, std::int64_t i0, std::int64_t i1,
              S* totals) const {
    static thread_local Scratch memory;
    // dy as vectors of rows: vector (v, t) at y + (v * tokens + t) * w.
    const std::int64_t slabs = pattern.slabs(), tokens = tile.tokens();
    S* const all = memory.get<S>(ceil_div(i1 - i0, w) * tokens * w);
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t i = i0; i < i1; i += w) {
        const T* const from = row_of<T>(dy, tile.t0 + t) + i;
        store(all + ((i - i0) / w * tokens + t) * w,
              i + w <= i1 ? load_wide<S>(from) : load_wide_part<S>(from, static_cast<int>(i1 - i)));
      }
    for (std::int64_t i = i0; i < i1; i += w) {
      const std::int64_t g = i / 16;
      const int height = static_cast<int>(std::min<std::int64_t>(w, i1 - i));
      const S* const y = all + (i - i0) / w * tokens * w;
      const std::int64_t first = pattern.starts[g * slabs],
                         k = pattern.starts[(g + 1) * slabs] - first;
      S* const to = totals + 16 * first + (i - g * 16) * k;
      for (std::int64_t s = 0; s < slabs; ++s) {
        const std::int64_t begin = pattern.starts[g * slabs + s],
                           stop = pattern.starts[g * slabs + s + 1];
        for (std::int64_t e = begin; e < stop; e += w) {
          const int live = static_cast<int>(std::min<std::int64_t>(w, stop - e));
          Vec<S> sums[w];
          sampled_square(pattern.columns + e, live, y, panel + s * sparse_slab_columns * tile.ld,
                         tile, sums);
          for (int row = 0; row < height; ++row) {
            S* const line = to + row * k + e - first;
            if (live == w) {
              store(line, tile.t0 == 0 ? sums[row] : load(line) + sums[row]);
            } else {
              S out[w];
              store(out, sums[row]);
              for (int q = 0; q < live; ++q) line[q] = tile.t0 == 0 ? out[q] : line[q] + out[q];
            }
          }
        }
      }
    }
  }

  // All rows have the same columns: a dense product, of copies of these.
  void columns(const Context& context) const {
    Scratch memory;
    const std::int64_t m = pattern.rows, tokens = x.rows, k = pattern.starts[pattern.slabs()];
    T* const gathered = memory.get<T>(tokens * k);
    parallel_for(context, ceil_div(tokens, 64), [&](std::int64_t tile) {
      for (std::int64_t t = tile * 64; t < std::min(tokens, tile * 64 + 64); ++t)
        for (std::int64_t s = 0; s < pattern.slabs(); ++s) {
          const T* const from = row_of<T>(x, t) + s * sparse_slab_columns;
          for (std::int64_t e = pattern.starts[s]; e < pattern.starts[s + 1]; ++e)
            gathered[t * k + e] = from[pattern.columns[e]];
        }
    });
    // As low_rank's gradient of U: the larger operand is better not the one that is gathered.
    multiply(context, Product<T, T, T>{k,
                                       m,
                                       tokens,
                                       {gathered, k, true},
                                       {row_of<T>(dy, 0), dy.row_stride, false},
                                       values,
                                       k,
                                       nullptr,
                                       true});
  }
};

}  // namespace
}  // namespace structmat
