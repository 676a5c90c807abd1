// SPDX-License-Identifier: Apache-2.0
// values[e] = sum_t dy[t, i] x[t, j] for the entries e = (i, j) of a support. For files under
// structmat_simd_sources (everything is in an anonymous namespace).
//
// As in spmm_simd.h 9.2 ms are the floor of the level-2 cache for 4096 x 4096 at 3 % and 1024
// tokens; measured 13.7, of which 3 transpose x and dy. Groups of 16 rows: 4.6 and 8.3 ms.
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
    Scratch total_memory;
    S* totals;
    if constexpr (std::is_same_v<S, T>)
      totals = values;
    else
      totals = total_memory.get<S>(pattern.nnz);
    if (x.rows == 0) std::fill_n(totals, pattern.nnz, S{0});
    // Threads share out the rows, and each transposes x for itself: a panel that another thread
    // wrote took 1.4 of the time, and parts of columns would meet in the cache lines of the values.
    const std::int64_t threads = threads_for(context, x.rows * (pattern.nnz + pattern.cols)),
                       step = ceil_div(ceil_div(pattern.rows, threads), 16) * 16;
    parallel_for(context, ceil_div(pattern.rows, step), [&](std::int64_t part) {
      for (std::int64_t s = 0; s < pattern.slabs(); ++s)
        slab(s, part * step, std::min(pattern.rows, (part + 1) * step), totals);
    });
    if constexpr (!std::is_same_v<S, T>)
      parallel_for(context, ceil_div(pattern.nnz, kConvert), [&](std::int64_t part) {
        const std::int64_t e = part * kConvert;
        convert(totals + e, values + e, std::min(kConvert, pattern.nnz - e));
      });
  }

  static constexpr std::int64_t kConvert = 1 << 16;

  // Rows [i0, i1), columns of slab s.
  void slab(std::int64_t s, std::int64_t i0, std::int64_t i1, S* totals) const {
    static thread_local Scratch memory, y_memory;
    const std::int64_t j0 = s * sparse_slab_columns,
                       j1 = std::min(pattern.cols, j0 + sparse_slab_columns);
    const TokenTiles<S> tiles(x.rows, pattern.group == 16 ? kTileVecs : panel_vecs(j1 - j0));
    S* const panel = memory.get<S>((j1 - j0) * tiles.width);
    S* const y = y_memory.get<S>(kChunk * tiles.width);
    for (std::int64_t i = 0; i < tiles.count; ++i) {
      const TokenTile tile = tiles[i];
      load_panel<S, T>(x, tile, j0, j1, panel);
      for (std::int64_t c = i0; c < i1; c += kChunk) {
        const std::int64_t end = std::min(i1, c + kChunk);
        if (pattern.group == 16)
          groups(tile, panel, s, c, end, y, totals);
        else
          rows(tile, panel, s, c, end, y, totals);
      }
    }
  }

  // The entries of a group in a slab: `columns` from `begin` on. Those of its row i are
  // totals + at + i * k from there on.
  struct Entries {
    std::int64_t begin, count, at, k;
  };
  Entries entries(std::int64_t g, std::int64_t s) const {
    const std::int64_t slabs = pattern.slabs(), first = pattern.starts[g * slabs],
                       begin = pattern.starts[g * slabs + s];
    return {begin, pattern.starts[g * slabs + s + 1] - begin, (pattern.group - 1) * first + begin,
            pattern.starts[(g + 1) * slabs] - first};
  }

  void rows(const TokenTile& tile, const S* panel, std::int64_t s, std::int64_t i0, std::int64_t i1,
            S* y, S* totals) const {
    load_panel<S, T>(dy, tile, i0, i1, y);
    const auto kernel =
        sampled_kernel_for<S>(tile.vecs, std::make_integer_sequence<int, kTileVecs>());
    for (std::int64_t i = i0; i < i1; ++i) {
      const std::int64_t g = i / pattern.group;
      const Entries e = entries(g, s);
      if (e.count > 0)
        kernel(pattern.columns + e.begin, e.count, y + (i - i0) * tile.ld, panel, tile.t0 == 0,
               totals + e.at + (i - g * pattern.group) * e.k);
    }
  }

  // Groups of 16 rows, whose dy are vectors as they lie: vector (v, t) goes to y + (v * tokens + t)
  // * w.
  void groups(const TokenTile& tile, const S* panel, std::int64_t s, std::int64_t i0,
              std::int64_t i1, S* y, S* totals) const {
    const std::int64_t tokens = tile.tokens();
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t i = i0; i < i1; i += w) {
        const T* const from = row_of<T>(dy, tile.t0 + t) + i;
        store(y + ((i - i0) / w * tokens + t) * w,
              i + w <= i1 ? load_wide<S>(from) : load_wide_part<S>(from, static_cast<int>(i1 - i)));
      }
    for (std::int64_t i = i0; i < i1; i += w) {
      const std::int64_t g = i / 16;
      const int height = static_cast<int>(std::min<std::int64_t>(w, i1 - i));
      const Entries of = entries(g, s);
      for (std::int64_t e = 0; e < of.count; e += w) {
        const int live = static_cast<int>(std::min<std::int64_t>(w, of.count - e));
        Vec<S> sums[w];
        sampled_square(pattern.columns + of.begin + e, live, y + (i - i0) * tokens, panel, tile,
                       sums);
        for (int row = 0; row < height; ++row) {
          S* const line = totals + of.at + (i - g * 16 + row) * of.k + e;
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
