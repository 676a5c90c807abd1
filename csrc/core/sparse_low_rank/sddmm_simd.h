// SPDX-License-Identifier: Apache-2.0
// values[e] = sum_t dy[t, i] x[t, j] for the entries e = (i, j) of a support. For files under
// structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include <vector>

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
    const std::int64_t threads = thread_count(context), slabs = pattern.slabs(),
                       width = std::min(pattern.cols, sparse_slab_columns);
    // Parts of columns whose panel of 64 tokens fits the level-2 cache, and of rows for the other
    // threads. Each part has a panel of its own: one that another thread wrote took 1.4 of the
    // time.
    const std::int64_t per_slab = std::max(ceil_div(width, 2048), square_root(threads / slabs)),
                       step = ceil_div(ceil_div(width, per_slab), w) * w,
                       col_parts = slabs * ceil_div(width, step),
                       row_parts = ceil_div(threads, col_parts) *
                                   (threads % col_parts == 0 || col_parts % threads == 0 ? 1 : 2),
                       rows_step = ceil_div(ceil_div(pattern.rows, row_parts), 16) * 16;
    parallel_for(context, col_parts * row_parts, [&](std::int64_t task) {
      const std::int64_t part = task % col_parts, s = part / ceil_div(width, step),
                         j0 = s * sparse_slab_columns + part % ceil_div(width, step) * step,
                         i0 = task / col_parts * rows_step;
      const Part range{i0, std::min(pattern.rows, i0 + rows_step), j0,
                       std::min({pattern.cols, (s + 1) * sparse_slab_columns, j0 + step}), s};
      if (range.i0 < range.i1 && range.j0 < range.j1) part_of(range, totals);
    });
    if constexpr (!std::is_same_v<S, T>)
      parallel_for(context, ceil_div(pattern.nnz, kConvert), [&](std::int64_t part) {
        const std::int64_t e = part * kConvert;
        convert(totals + e, values + e, std::min(kConvert, pattern.nnz - e));
      });
  }

  static constexpr std::int64_t kConvert = 1 << 16;

  static std::int64_t square_root(std::int64_t a) {
    std::int64_t root = 0;
    while ((root + 1) * (root + 1) <= a) ++root;
    return root;
  }

  // Rows [i0, i1) and columns [j0, j1), of slab s.
  struct Part {
    std::int64_t i0, i1, j0, j1, s;
  };
  // The entries of a group in a part: `columns` from [begin, begin + count) on.
  struct Entries {
    std::int64_t begin, count;
  };

  void part_of(const Part& part, S* totals) const {
    static thread_local Scratch memory, y_memory;
    const TokenTiles<S> tiles(x.rows, kTileVecs);
    S* const panel = memory.get<S>((part.j1 - part.j0) * tiles.width);
    S* const y = y_memory.get<S>(kChunk * tiles.width);
    const std::int64_t group = pattern.group, g0 = part.i0 / group, slabs = pattern.slabs();
    std::vector<Entries> entries;
    for (std::int64_t g = g0; g <= (part.i1 - 1) / group; ++g) {
      const std::uint16_t *const first = pattern.columns + pattern.starts[g * slabs + part.s],
                                 *const last =
                                     pattern.columns + pattern.starts[g * slabs + part.s + 1];
      const auto at = [&](std::int64_t j) {
        return std::lower_bound(first, last, j - part.s * sparse_slab_columns,
                                [](std::uint16_t a, std::int64_t b) { return a < b; });
      };
      const std::uint16_t* const begin = at(part.j0);
      entries.push_back({begin - pattern.columns, at(part.j1) - begin});
    }
    for (std::int64_t i = 0; i < tiles.count; ++i) {
      const TokenTile tile = tiles[i];
      load_panel<S, T>(x, tile, part.j0, part.j1, panel);
      const S* const origin = panel - (part.j0 - part.s * sparse_slab_columns) * tile.ld;
      for (std::int64_t i0 = part.i0; i0 < part.i1; i0 += kChunk) {
        const std::int64_t i1 = std::min(part.i1, i0 + kChunk);
        const Entries* const of = entries.data() - g0;
        if (group == 16)
          groups(tile, origin, of, i0, i1, y, totals);
        else
          rows(tile, origin, of, i0, i1, y, totals);
      }
    }
  }

  // `panel` + column * ld is that column's, `entries`[g] those of group g.
  void rows(const TokenTile& tile, const S* panel, const Entries* entries, std::int64_t i0,
            std::int64_t i1, S* y, S* totals) const {
    load_panel<S, T>(dy, tile, i0, i1, y);
    const auto kernel =
        sampled_kernel_for<S>(tile.vecs, std::make_integer_sequence<int, kTileVecs>());
    for (std::int64_t i = i0; i < i1; ++i) {
      const std::int64_t g = i / pattern.group;
      const Entries e = entries[g];
      if (e.count == 0) continue;
      const auto of = SparseMatrix<S>{pattern, totals}.group(g);
      kernel(
          pattern.columns + e.begin, e.count, y + (i - i0) * tile.ld, panel, tile.t0 == 0,
          totals + pattern.group * of.first + (i - g * pattern.group) * of.k + e.begin - of.first);
    }
  }

  // Groups of 16 rows, whose dy are vectors as they lie: vector (v, t) goes to y + (v * tokens + t)
  // * w.
  void groups(const TokenTile& tile, const S* panel, const Entries* entries, std::int64_t i0,
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
      const auto of = SparseMatrix<S>{pattern, totals}.group(g);
      S* const to = totals + 16 * of.first + (i - g * 16) * of.k - of.first;
      const auto [begin, count] = entries[g];
      for (std::int64_t e = begin; e < begin + count; e += w) {
        const int live = static_cast<int>(std::min<std::int64_t>(w, begin + count - e));
        Vec<S> sums[w];
        sampled_square(pattern.columns + e, live, y + (i - i0) * tokens, panel, tile, sums);
        for (int row = 0; row < height; ++row) {
          S* const line = to + row * of.k + e;
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
