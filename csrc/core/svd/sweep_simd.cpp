// SPDX-License-Identifier: Apache-2.0
// S is cut into tiles that stay in L1, each copied once as panels of kPanel columns; the panels
// serve S X (rows of S against rows of X) and S^T Y (columns of S against rows of Y) alike. The
// copy converts and measures, and undoes what costs in place: rows 2^k bytes
// apart share a set of the caches. While a tile is multiplied the next one is fetched into L2.
// OpenBLAS spends 1.2 (16 columns) to 0.3 (64) times the time of its kernel on copying the same
// matrix.
//
// Sums within a tile, and of those, in an order that sizes alone decide: one chain of additions
// over all rows would round too much where addends are alike.
#include "svd/sweep_simd.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "scratch.h"
#include "vec.h"

namespace structmat {
namespace {

constexpr std::int64_t kPanel = 48;  // columns of a panel: a multiple of every block's rows
// Tiles of S X, 23 KB of floats, stay in L1; those of S^T Y, 180 KB, in L2 with their results: the
// rows of narrower ones would be fetched by pieces too short for the memory (0.8 of the speed).
constexpr std::int64_t kWideRows = 24, kWideCols = 240;
constexpr std::int64_t kTallRows = 48, kStripe = 960;
constexpr std::int64_t kMaxSlabs = 64, kMaxTasks = 128;
constexpr std::int64_t kPrefetchStep = 4;  // of depth; divides kPanel

// Lines of memory the next tile will read, `lines` in each of the rows `stride` bytes apart. A
// kernel asks for a few every few steps: asked for at once they would stall it.
struct Ahead {
  const char* row = nullptr;
  std::int64_t stride = 0, rows = 0;
  int lines = 0, line = 0;

  void ask() {
    for (int i = 0; i < 4 && rows > 0; ++i) {
      __builtin_prefetch(row + 64 * line);
      if (++line == lines) line = 0, row += stride, --rows;
    }
  }
};

// sum[i][j] += a[i] b[j] over `depth`. a (i, p) lies at a[i kPanel + p] in panels kWideRows kPanel
// apart, or, transposed, at a[p kPanel + i] in one panel; b (p, .) at b[p kVecs lanes + .].
template <class S, int kRows, int kVecs, bool kTransposed>
void micro_kernel(const S* a, const S* b, std::int64_t depth, S* c, bool first, Ahead& ahead) {
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
      if (in_panel == kPanel) a += kWideRows * kPanel - kPanel, in_panel = 0;
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
using MicroKernel = void (*)(const S*, const S*, std::int64_t, S*, bool, Ahead&);

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
// group lies at [i * width + j]. Zeros beyond the last column.
template <class S>
struct Groups {
  struct Group {
    std::int64_t first, cols, width, offset;  // offset: of the group in a row of all groups
    int vecs;
  };
  std::vector<Group> groups;
  std::int64_t width = 0;  // numbers of a row, all groups

  explicit Groups(std::int64_t cols) {
    constexpr std::int64_t w = kLanes<S>;
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

// A float's square cannot leave double's range: no scale, and the sums are vectors.
template <class S>
void measure(const S* data, std::int64_t count, Norm& norm) {
  if constexpr (std::is_same_v<S, float>) {
    double sums[8] = {};
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      for (int k = 0; k < 8; ++k) {
        const double value = data[i + k];
        sums[k] += value * value;
      }
    for (; i < count; ++i) sums[0] += static_cast<double>(data[i]) * data[i];
    double total = 0;
    for (const double sum : sums) total += sum;
    if (total != 0) norm.add(Norm{1.0, total});
  } else {
    norm.add(data, count);
  }
}

template <class S>
class Tiles {
 public:
  explicit Tiles(const Sweep& sweep) : sweep_(sweep), s_(sweep.s) {}

  // The tile at (r0, c0) as panels of `height` rows; columns beyond it are left as they are.
  void pack(std::int64_t r0, std::int64_t c0, std::int64_t rows, std::int64_t cols,
            std::int64_t height, S* to, Norm* norm) const {
    dispatch_dtype(s_.dtype, [&](auto element) {
      using E = decltype(element);
      if constexpr (std::is_same_v<S, double> == std::is_same_v<E, double>) {
        const E* in = static_cast<const E*>(s_.data) + r0 * s_.row_stride + c0 * s_.col_stride;
        for (std::int64_t i = 0; i < rows; ++i, in += s_.row_stride)
          for (std::int64_t c = 0; c < cols; c += kPanel) {
            const std::int64_t live = std::min(kPanel, cols - c);
            S* const out = to + c * height + i * kPanel;
            line(in + c * s_.col_stride, live, out);
            if (sweep_.high != nullptr) subtract(r0 + i, c0 + c, live, out);
            if (norm != nullptr) measure(out, live, *norm);
          }
      }
    });
  }
  // Rows [r0, r0 + rows) of `cols` columns from c0 on.
  Ahead ahead(std::int64_t r0, std::int64_t rows, std::int64_t c0, std::int64_t cols) const {
    if (s_.col_stride != 1 || c0 >= s_.cols || r0 >= s_.rows) return {};
    const std::int64_t size = static_cast<std::int64_t>(size_of(s_.dtype));
    return {static_cast<const char*>(s_.data) + (r0 * s_.row_stride + c0) * size,
            s_.row_stride * size, std::min(rows, s_.rows - r0),
            static_cast<int>(ceil_div(std::min(cols, s_.cols - c0) * size, 64))};
  }

 private:
  template <class E>
  void line(const E* in, std::int64_t count, S* out) const {
    if (s_.col_stride != 1)
      for (std::int64_t c = 0; c < count; ++c)
        out[c] = static_cast<S>(to_float(in[c * s_.col_stride]));
    else if (count == kPanel)  // a constant length
      convert(in, out, kPanel);
    else
      convert(in, out, count);
  }

  void subtract(std::int64_t row, std::int64_t col, std::int64_t count, S* out) const {
    const S* const high = static_cast<const S*>(sweep_.high) + (sweep_.of_rows ? row : col);
    const S* const low = static_cast<const S*>(sweep_.low) + (sweep_.of_rows ? row : col);
    if (sweep_.of_rows)
      for (std::int64_t c = 0; c < count; ++c) out[c] = (out[c] - *high) - *low;
    else
      for (std::int64_t c = 0; c < count; ++c) out[c] = (out[c] - high[c]) - low[c];
  }

  const Sweep& sweep_;
  const StridedMatrixView& s_;
};

// A tile (rows, cols) times rows of every group of b, added to c.
template <class S, bool kTransposed>
void multiply_tile(const Groups<S>& groups, const S* tile, std::int64_t rows, std::int64_t cols,
                   const S* b, std::int64_t b_height, std::int64_t b_at, S* c,
                   std::int64_t c_height, bool first, Ahead ahead) {
  const std::int64_t lines = kTransposed ? cols : rows, depth = kTransposed ? rows : cols;
  for (const auto& g : groups.groups) {
    const S* const b_group = b + g.offset * b_height + b_at * g.width;
    S* const c_group = c + g.offset * c_height;
    const int step = rows_of_block(g.vecs);
    for (std::int64_t i = 0; i < lines; i += step) {
      const int live = static_cast<int>(std::min<std::int64_t>(step, lines - i));
      const S* const from =
          kTransposed ? tile + i / kPanel * kPanel * kTallRows + i % kPanel : tile + i * kPanel;
      pick<S, kTransposed>(live, g.vecs)(from, b_group, depth, c_group + i * g.width, first, ahead);
    }
  }
}

template <class S>
S* tile_memory() {
  static thread_local Scratch memory;
  return memory.get<S>(std::max(kTallRows * kStripe, kWideRows * kWideCols));
}
template <class S>
S* sum_memory(std::int64_t count) {
  static thread_local Scratch memory;
  return memory.get<S>(count);
}
// The norms of tasks, added in order.
class Norms {
 public:
  Norms(Norm* total, std::int64_t tasks)
      : total_(total), parts_(static_cast<std::size_t>(total != nullptr ? tasks : 0)) {}
  ~Norms() {
    for (const Part& part : parts_) total_->add(part);
  }
  Norm* of(std::int64_t task) {
    return total_ != nullptr ? &parts_[static_cast<std::size_t>(task)] : nullptr;
  }

 private:
  struct Part : Norm {};  // a type of this file, and so its vector
  Norm* total_;
  std::vector<Part> parts_;
};

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
        multiply_tile<S, false>(groups, tile, rows, cols, packed, n, c0, sums, kWideRows, c0 == 0,
                                source.ahead(r0 + (ends ? kWideRows : 0), kWideRows,
                                             ends ? 0 : c0 + kWideCols, kWideCols));
      }
      groups.unpack(sums, kWideRows, rows, y.data + r0 * y.stride, y.stride);
    }
  });
}

// Stripes of columns; where those are few, the sum over rows is cut into slabs, added in order.
// Their partial results take no more room than y and z together.
template <class S>
void multiply_transposed(const Context& context, const Sweep& a, Panel<S> y, Panel<S> z) {
  const std::int64_t m = a.s.rows, n = a.s.cols;
  if (n == 0 || y.cols == 0) return;
  const std::int64_t stripes = ceil_div(n, kStripe);
  const std::int64_t width = ceil_div(ceil_div(n, stripes), kPanel) * kPanel;
  const std::int64_t slabs = std::clamp<std::int64_t>(
      std::min({ceil_div(32, stripes), 1 + m / n, m / (4 * kTallRows), kMaxSlabs}), 1, kMaxSlabs);
  const std::int64_t slab = ceil_div(ceil_div(m, slabs), kTallRows) * kTallRows;
  const Groups<S> groups(y.cols);
  const Tiles<S> source(a);
  Scratch memory;
  S* const partial = memory.get<S>((slabs - 1) * n * y.cols);
  const std::int64_t sum_count = (width + kTallRows) * groups.width;
  Norms norms(a.norm, stripes * slabs);
  parallel_for(context, stripes * slabs, [&](std::int64_t task) {
    const std::int64_t part = task / stripes, c0 = std::min(n, task % stripes * width);
    const std::int64_t cols = std::min(width, n - c0), last = std::min(m, (part + 1) * slab);
    S* const out = part == 0 ? z.data + c0 * z.stride : partial + ((part - 1) * n + c0) * y.cols;
    S* const tile = tile_memory<S>();
    Scratch large;  // kept only where it is small
    S* const sums = sum_count > (1 << 18) ? large.get<S>(sum_count) : sum_memory<S>(sum_count);
    S* const lines = sums + width * groups.width;
    if (part * slab >= last) std::fill_n(sums, width * groups.width, S{0});
    for (std::int64_t r0 = part * slab; r0 < last; r0 += kTallRows) {
      const std::int64_t rows = std::min(kTallRows, last - r0);
      groups.pack(y, r0, rows, lines, kTallRows, 0);
      source.pack(r0, c0, rows, cols, kTallRows, tile, norms.of(task));
      multiply_tile<S, true>(groups, tile, rows, cols, lines, kTallRows, 0, sums, width,
                             r0 == part * slab, source.ahead(r0 + kTallRows, kTallRows, c0, width));
    }
    groups.unpack(sums, width, cols, out, part == 0 ? z.stride : y.cols);
  });
  if (slabs > 1)
    parallel_for(context, ceil_div(n, 64), [&](std::int64_t i) {
      for (std::int64_t c = i * 64; c < std::min(n, (i + 1) * 64); ++c)
        for (std::int64_t part = 0; part + 1 < slabs; ++part)
          for (std::int64_t j = 0; j < y.cols; ++j)
            z.data[c * z.stride + j] += partial[(part * n + c) * y.cols + j];
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

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
