// SPDX-License-Identifier: Apache-2.0
// S is cut into tiles that stay in L1 or L2 (sweep_tiles_simd.h). While a tile is multiplied the
// next one is fetched into L2. OpenBLAS spends 1.2 (16 columns) to 0.3 (64) times the time of its
// kernel on copying the same matrix.
//
// Sums within a tile, and of those, in an order that sizes alone decide: one chain of additions
// over all rows would round too much where addends are alike.
#include "svd/sweep_simd.h"

#include <algorithm>
#include <vector>

#include "svd/narrow_simd.h"
#include "svd/sweep_tiles_simd.h"

namespace structmat {
namespace {

constexpr std::int64_t kNarrow = 3;  // columns up to which vectors run along S

// sum[i][j] += a[i] b[j] over `depth`. a (i, p) lies at a[i kPanel + p] in panels of `height` rows,
// or, transposed, at a[p kPanel + i] in one panel; b (p, .) at b[p kVecs lanes + .].
template <class S, int kRows, int kVecs, bool kTransposed>
void micro_kernel(const S* a, std::int64_t height, const S* b, std::int64_t depth, S* c, bool first,
                  Ahead& ahead) {
  constexpr int w = kLanes<S>;
  constexpr std::int64_t row = kTransposed ? 1 : kPanel, step = kTransposed ? kPanel : 1;
  Vec<S> sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) sum[i][j] = Vec<S>{};
  Ahead fetch = ahead;
  std::int64_t in_panel = 0;
  while (depth > 0) {
    const std::int64_t part = std::min(depth, kPrefetchStep);
    fetch.ask();
    for (std::int64_t p = 0; p < part; ++p) {
      Vec<S> line[kVecs];
#pragma GCC unroll 3
      for (int j = 0; j < kVecs; ++j) line[j] = load(b + j * w);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec<S> value = broadcast(a[i * row]);
#pragma GCC unroll 3
        for (int j = 0; j < kVecs; ++j) sum[i][j] = fma(value, line[j], sum[i][j]);
      }
      a += step;
      b += kVecs * w;
    }
    depth -= part;
    in_panel += part;
    if constexpr (!kTransposed)
      if (in_panel == kPanel) a += (height - 1) * kPanel, in_panel = 0;
  }
  ahead = fetch;
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) {
      S* const to = c + (i * kVecs + j) * w;
      store(to, first ? sum[i][j] : load(to) + sum[i][j]);
    }
}

template <class S>
using MicroKernel = void (*)(const S*, std::int64_t, const S*, std::int64_t, S*, bool, Ahead&);

// Rows of a block by vectors of a group: 24 sums in 32 registers, or 12 in 16.
constexpr int rows_of_block(int vecs) {
  return vecs == 3 ? (kVecBytes == 64 ? 8 : 4) : (kVecBytes == 64 ? 12 : 6);
}
template <class S, int kVecs, bool kTransposed, int... kRows>
MicroKernel<S> pick(int rows, std::integer_sequence<int, kRows...>) {
  static constexpr MicroKernel<S> table[] = {micro_kernel<S, kRows + 1, kVecs, kTransposed>...};
  return table[rows - 1];
}
template <class S, bool kTransposed>
MicroKernel<S> pick(int rows, int vecs) {
  if (vecs == 3)
    return pick<S, 3, kTransposed>(rows, std::make_integer_sequence<int, rows_of_block(3)>());
  if (vecs == 2)
    return pick<S, 2, kTransposed>(rows, std::make_integer_sequence<int, rows_of_block(2)>());
  return pick<S, 1, kTransposed>(rows, std::make_integer_sequence<int, rows_of_block(1)>());
}

// A thin panel's columns in groups of up to 3 vectors, each group by itself: element (i, j) of a
// group lies at [i * width + j]. Zeros beyond the last column. `single`: a group of width 1 for
// each column.
template <class S>
struct Groups {
  struct Group {
    std::int64_t first, cols, width, offset;  // offset: of the group in a row of all groups
    int vecs;
  };
  std::vector<Group> groups;
  std::int64_t width = 0;  // numbers of a row, all groups

  explicit Groups(std::int64_t cols, bool single = false) {
    constexpr std::int64_t w = kLanes<S>;
    if (single) {
      for (; width < cols; ++width) groups.push_back({width, 1, 1, width, 0});
      return;
    }
    for (std::int64_t first = 0; first < cols;) {
      const std::int64_t left = ceil_div(cols - first, w);
      const int vecs = static_cast<int>(left == 4 ? 2 : std::min<std::int64_t>(left, 3));
      const std::int64_t live = std::min(cols - first, vecs * w);
      groups.push_back({first, live, vecs * w, width, vecs});
      width += vecs * w;
      first += live;
    }
  }
  // Rows [r0, r0 + rows) of x, as rows of every group in a buffer of `height` rows.
  void pack(Panel<S> x, std::int64_t r0, std::int64_t rows, S* to, std::int64_t height,
            std::int64_t at) const {
    for (const Group& g : groups) {
      S* out = to + g.offset * height + at * g.width;
      for (std::int64_t i = 0; i < rows; ++i, out += g.width) {
        const S* from = x.data + (r0 + i) * x.stride + g.first;
        std::copy_n(from, g.cols, out);
        std::fill(out + g.cols, out + g.width, S{0});
      }
    }
  }
  void unpack(const S* from, std::int64_t height, std::int64_t rows, S* to,
              std::int64_t stride) const {
    for (const Group& g : groups) {
      const S* in = from + g.offset * height;
      for (std::int64_t i = 0; i < rows; ++i)
        std::copy_n(in + i * g.width, g.cols, to + i * stride + g.first);
    }
  }
};

// A tile (rows, cols), in panels of `height` rows, times rows of every group of b, added to c.
template <class S, bool kTransposed>
void multiply_tile(const Groups<S>& groups, const S* tile, std::int64_t height, std::int64_t rows,
                   std::int64_t cols, const S* b, std::int64_t b_height, std::int64_t b_at, S* c,
                   std::int64_t c_height, bool first, Ahead ahead) {
  const std::int64_t lines = kTransposed ? cols : rows, depth = kTransposed ? rows : cols;
  for (const auto& g : groups.groups) {
    const S* const b_group = b + g.offset * b_height + b_at * g.width;
    S* const c_group = c + g.offset * c_height;
    if (g.vecs == 0) {
      multiply_column<S, kTransposed>({tile, kPanel, height * kPanel}, rows, cols, b_group, c_group,
                                      first);
      continue;
    }
    const int step = rows_of_block(g.vecs);
    for (std::int64_t i = 0; i < lines; i += step) {
      const int live = static_cast<int>(std::min<std::int64_t>(step, lines - i));
      const S* const from =
          kTransposed ? tile + i / kPanel * kPanel * height + i % kPanel : tile + i * kPanel;
      pick<S, kTransposed>(live, g.vecs)(from, height, b_group, depth, c_group + i * g.width, first,
                                         ahead);
    }
  }
}

template <class S>
void multiply(const Context& context, const Sweep& a, Panel<S> x, Panel<S> y) {
  const std::int64_t m = a.s.rows, n = a.s.cols;
  if (m == 0 || n == 0 || x.cols == 0) return;
  const Groups<S> groups(x.cols);
  const Tiles<S> source(a);
  Scratch memory;  // of the call: X may be large
  S* const packed = memory.get<S>(n * groups.width);
  parallel_for(context, ceil_div(n, kStripe), [&](std::int64_t i) {
    const std::int64_t r0 = i * kStripe;
    groups.pack(x, r0, std::min(kStripe, n - r0), packed, n, r0);
  });
  const std::int64_t run = ceil_div(ceil_div(m, kWideRows), kMaxTasks) * kWideRows;
  Norms norms(a.norm, ceil_div(m, run));
  parallel_for(context, ceil_div(m, run), [&](std::int64_t task) {
    S* const tile = tile_memory<S>();
    S* const sums = sum_memory<S>(kWideRows * groups.width);
    const std::int64_t last = std::min(m, (task + 1) * run);
    for (std::int64_t r0 = task * run; r0 < last; r0 += kWideRows) {
      const std::int64_t rows = std::min(kWideRows, last - r0);
      for (std::int64_t c0 = 0; c0 < n; c0 += kWideCols) {
        const std::int64_t cols = std::min(kWideCols, n - c0);
        const bool ends = c0 + kWideCols >= n;  // the next tile lies below
        source.pack(r0, c0, rows, cols, kWideRows, tile, norms.of(task));
        multiply_tile<S, false>(groups, tile, kWideRows, rows, cols, packed, n, c0, sums, kWideRows,
                                c0 == 0,
                                source.ahead(r0 + (ends ? kWideRows : 0), kWideRows,
                                             ends ? 0 : c0 + kWideCols, kWideCols));
      }
      groups.unpack(sums, kWideRows, rows, y.data + r0 * y.stride, y.stride);
    }
  });
}

template <class S>
void multiply_transposed(const Context& context, const Sweep& a, Panel<S> y, Panel<S> z) {
  const std::int64_t m = a.s.rows, n = a.s.cols;
  if (n == 0 || y.cols == 0) return;
  const Slabs slabs(m, n);
  const Groups<S> groups(y.cols);
  const Tiles<S> source(a);
  Scratch memory;
  S* const partial = memory.get<S>((slabs.count - 1) * n * y.cols);
  const std::int64_t sum_count = (slabs.width + kTallRows) * groups.width;
  Norms norms(a.norm, slabs.tasks());
  parallel_for(context, slabs.tasks(), [&](std::int64_t task) {
    const auto [part, c0, cols, first, last] = slabs.task(task);
    S* const out = part == 0 ? z.data + c0 * z.stride : partial + ((part - 1) * n + c0) * y.cols;
    S* const tile = tile_memory<S>();
    Scratch large;  // kept only where it is small
    S* const sums = sum_count > (1 << 18) ? large.get<S>(sum_count) : sum_memory<S>(sum_count);
    S* const lines = sums + slabs.width * groups.width;
    if (first >= last) std::fill_n(sums, slabs.width * groups.width, S{0});
    for (std::int64_t r0 = first; r0 < last; r0 += kTallRows) {
      const std::int64_t rows = std::min(kTallRows, last - r0);
      groups.pack(y, r0, rows, lines, kTallRows, 0);
      source.pack(r0, c0, rows, cols, kTallRows, tile, norms.of(task));
      multiply_tile<S, true>(groups, tile, kTallRows, rows, cols, lines, kTallRows, 0, sums,
                             slabs.width, r0 == first,
                             source.ahead(r0 + kTallRows, kTallRows, c0, slabs.width));
    }
    groups.unpack(sums, slabs.width, cols, out, part == 0 ? z.stride : y.cols);
  });
  slabs.add(context, partial, z);
}

// sums[c] += over the rows of a tile in panels of `height` rows, or sums[i] += over its columns.
template <class S>
void add_sums(const S* tile, std::int64_t height, std::int64_t rows, std::int64_t cols,
              bool over_columns, double* sums) {
  for (std::int64_t c = 0; c < cols; c += kPanel, tile += height * kPanel) {
    const std::int64_t live = std::min(kPanel, cols - c);
    for (std::int64_t i = 0; i < rows; ++i) {
      const S* const row = tile + i * kPanel;
      if (!over_columns) {
        for (std::int64_t k = 0; k < live; ++k) sums[c + k] += static_cast<double>(row[k]);
      } else {
        double part[8] = {};
        for (std::int64_t k = 0; k < live; ++k) part[k % 8] += static_cast<double>(row[k]);
        for (const double value : part) sums[i] += value;
      }
    }
  }
}

// The two products of a block of `live` lines from `at` on, for a few columns, where it lies.
template <class S>
void gram_in_place(const GramSweep& a, std::int64_t at, std::int64_t live, std::int64_t cols,
                   const S* x, S* lines, S* z, bool first) {
  const std::int64_t n = a.columns ? a.s.rows : a.s.cols, stride = a.s.row_stride;
  const S* const block = static_cast<const S*>(a.s.data) + at * (a.columns ? 1 : stride);
  for (std::int64_t j = 0; j < cols; ++j)
    for (std::int64_t c = 0; c < n; c += kStripe) {
      const std::int64_t count = std::min(kStripe, n - c);
      const Lines<S> tile{block + c * (a.columns ? stride : 1), stride, kPanel};
      if (a.columns)
        multiply_column<S, true>(tile, count, live, x + j * n + c, lines + j * kPanel, c == 0);
      else
        multiply_column<S, false>(tile, live, count, x + j * n + c, lines + j * kPanel, c == 0);
    }
  for (std::int64_t j = 0; j < cols; ++j) {
    const Lines<S> tile{block, stride, kPanel};
    if (a.columns)
      multiply_column<S, false>(tile, n, live, lines + j * kPanel, z + j * n, first);
    else
      multiply_column<S, true>(tile, live, n, lines + j * kPanel, z + j * n, first);
  }
}

// Blocks of kPanel lines of S are packed whole, in steps that stay in L1 for the first product, and
// multiplied again from L2; where the copy would cost more than the products they stay where they
// lie. Each slab of blocks sums its own Z, as groups.
template <class S>
void multiply_gram(const Context& context, const GramSweep& a, Panel<S> x, Panel<S> z) {
  constexpr std::int64_t kLines = kPanel;
  const std::int64_t step = x.cols <= kNarrow ? kStripe : 3 * kPanel;
  const bool columns = a.columns;
  const std::int64_t n = columns ? a.s.rows : a.s.cols, m = columns ? a.s.cols : a.s.rows;
  const bool narrow = x.cols <= kNarrow;
  bool in_place = narrow && a.s.col_stride == 1 && a.norm == nullptr && a.sums == nullptr;
  dispatch_dtype(a.s.dtype,
                 [&](auto element) { in_place &= std::is_same_v<decltype(element), S>; });
  const Groups<S> groups(x.cols, narrow);
  const Sweep sweep{a.s};
  const Tiles<S> source(sweep);
  Scratch memory;
  const std::int64_t size = n * groups.width;
  S* const packed = memory.get<S>((1 + a.slabs) * size);
  S* const totals = packed + size;
  parallel_for(context, ceil_div(n, kStripe), [&](std::int64_t i) {
    const std::int64_t r0 = i * kStripe;
    groups.pack(x, r0, std::min(kStripe, n - r0), packed, n, r0);
  });
  const std::int64_t slab = ceil_div(ceil_div(m, a.slabs), kLines) * kLines;
  Norms norms(a.norm, a.slabs);
  Scratch sums_memory;
  double* const sums = a.sums != nullptr ? sums_memory.get<double>(a.slabs * n) : nullptr;
  parallel_for(context, a.slabs, [&](std::int64_t part) {
    static thread_local Scratch blocks;
    const std::int64_t height = columns ? n : kLines;
    const std::int64_t block_size = in_place ? 0 : ceil_div(n, kPanel) * kPanel * kLines;
    Scratch large;  // kept only where it is small
    S* const block = block_size > (1 << 19) ? large.get<S>(block_size) : blocks.get<S>(block_size);
    S* const lines = sum_memory<S>(kLines * groups.width);
    S* const total = totals + part * size;
    double* const sum = sums != nullptr ? sums + part * n : nullptr;
    const std::int64_t begin = part * slab, end = std::min(m, begin + slab);
    if (begin >= end) std::fill_n(total, size, S{0});
    if (sum != nullptr) std::fill_n(sum, n, 0.0);
    for (std::int64_t at = begin; at < end; at += kLines) {
      const std::int64_t live = std::min(kLines, end - at);
      if (in_place) {
        gram_in_place(a, at, live, x.cols, packed, lines, total, at == begin);
        continue;
      }
      for (std::int64_t c = 0; c < n; c += step) {
        const std::int64_t count = std::min(step, n - c);
        S* const tile = block + c * kLines;
        const bool ends = c + step >= n;  // the next step is in the next block
        const std::int64_t next = at + (ends ? kLines : 0), first = ends ? 0 : c + step;
        if (!columns) {
          source.pack(at, c, live, count, height, tile, norms.of(part));
          multiply_tile<S, false>(groups, tile, height, live, count, packed, n, c, lines, kLines,
                                  c == 0, source.ahead(next, kLines, first, step));
        } else {
          source.pack(c, at, count, live, height, tile, norms.of(part));
          multiply_tile<S, true>(groups, tile, height, count, live, packed, n, c, lines, kLines,
                                 c == 0, source.ahead(first, step, next, kLines));
        }
        if (sum != nullptr)
          add_sums(tile, height, columns ? count : live, columns ? live : count, columns, sum + c);
      }
      if (!columns)
        multiply_tile<S, true>(groups, block, height, live, n, lines, kLines, 0, total, n,
                               at == begin, Ahead{});
      else
        multiply_tile<S, false>(groups, block, height, n, live, lines, kLines, 0, total, n,
                                at == begin, Ahead{});
    }
  });
  parallel_for(context, ceil_div(n, 64), [&](std::int64_t i) {
    const std::int64_t r0 = i * 64, r1 = std::min(n, r0 + 64);
    for (const auto& g : groups.groups) {
      S* const first = totals + g.offset * n;
      for (std::int64_t part = 1; part < a.slabs; ++part)
        for (std::int64_t k = r0 * g.width; k < r1 * g.width; ++k)
          first[k] += first[part * size + k];
      for (std::int64_t r = r0; r < r1; ++r)
        std::copy_n(first + r * g.width, g.cols, z.data + r * z.stride + g.first);
    }
    if (sums != nullptr)
      for (std::int64_t r = r0; r < r1; ++r) {
        a.sums[r] = 0;
        for (std::int64_t part = 0; part < a.slabs; ++part) a.sums[r] += sums[part * n + r];
      }
  });
}

}  // namespace

namespace STRUCTMAT_SIMD {

void sweep(const Context& context, const Sweep& a, Panel<float> x, Panel<float> y) {
  multiply(context, a, x, y);
}
void sweep(const Context& context, const Sweep& a, Panel<double> x, Panel<double> y) {
  multiply(context, a, x, y);
}
void sweep_transposed(const Context& context, const Sweep& a, Panel<float> y, Panel<float> z) {
  multiply_transposed(context, a, y, z);
}
void sweep_transposed(const Context& context, const Sweep& a, Panel<double> y, Panel<double> z) {
  multiply_transposed(context, a, y, z);
}
void gram_sweep(const Context& context, const GramSweep& a, Panel<float> x, Panel<float> z) {
  multiply_gram(context, a, x, z);
}
void gram_sweep(const Context& context, const GramSweep& a, Panel<double> x, Panel<double> z) {
  multiply_gram(context, a, x, z);
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
