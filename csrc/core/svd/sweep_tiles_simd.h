// SPDX-License-Identifier: Apache-2.0
// A strided matrix S by tiles, each copied once as panels of kPanel columns; the panels serve S X
// (rows of S against rows of X) and S^T Y (columns of S against rows of Y) alike. The copy converts
// and measures, and undoes what costs in place: rows 2^k bytes apart share a set of the caches.
#pragma once
#include <algorithm>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "scratch.h"
#include "svd/sweep_simd.h"
#include "vec.h"

namespace structmat {
namespace {

constexpr std::int64_t kPanel = 48;  // columns of a panel: a multiple of every block's rows
// Tiles of S X, 23 KB of floats, stay in L1; those of S^T Y, 190 KB, in L2 with their results: the
// rows of narrower ones would be fetched by pieces too short for the memory (0.8 of the speed).
constexpr std::int64_t kWideRows = 24, kWideCols = 240;
constexpr std::int64_t kTallRows = 48, kStripe = 1008;
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

// A float's square cannot leave double's range: no scale, and the sums are vectors.
template <class S>
void measure(const S* data, std::int64_t count, Norm& norm) {
  if constexpr (std::is_same_v<S, float>) {
    constexpr int lanes = 32;  // several chains of additions
    double sums[lanes] = {};
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes)
#pragma GCC unroll 32
      for (int k = 0; k < lanes; ++k) {
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
            if (norm != nullptr && live < kPanel) measure(out, live, *norm);
          }
        if (norm != nullptr)
          for (std::int64_t c = 0; c + kPanel <= cols; c += kPanel)
            measure(to + c * height, rows * kPanel, *norm);
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
// S^T Y by stripes of columns; where those are few, the sum over rows is cut into slabs, added in
// order. Their partial results take no more room than Y and Z together.
struct Slabs {
  std::int64_t rows, cols, stripes, width, count, height;

  Slabs(std::int64_t m, std::int64_t n) : rows(m), cols(n), stripes(ceil_div(n, kStripe)) {
    width = ceil_div(ceil_div(n, stripes), kPanel) * kPanel;
    count = std::clamp<std::int64_t>(
        std::min({ceil_div(32, stripes), 1 + m / n, m / (4 * kTallRows), kMaxSlabs}), 1, kMaxSlabs);
    height = ceil_div(ceil_div(m, count), kTallRows) * kTallRows;
  }
  struct Task {
    std::int64_t part, c0, cols, first, last;  // rows [first, last), `cols` columns from c0 on
  };
  std::int64_t tasks() const { return stripes * count; }
  Task task(std::int64_t i) const {
    const std::int64_t part = i / stripes, c0 = std::min(cols, i % stripes * width);
    return {part, c0, std::min(width, cols - c0), part * height,
            std::min(rows, (part + 1) * height)};
  }
  // z += every slab's partial result but the first's.
  template <class S>
  void add(const Context& context, const S* partial, Panel<S> z) const {
    if (count == 1) return;
    parallel_for(context, ceil_div(cols, 64), [&](std::int64_t i) {
      for (std::int64_t c = i * 64; c < std::min(cols, (i + 1) * 64); ++c)
        for (std::int64_t part = 0; part + 1 < count; ++part)
          for (std::int64_t j = 0; j < z.cols; ++j)
            z.data[c * z.stride + j] += partial[(part * cols + c) * z.cols + j];
    });
  }
};
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

}  // namespace
}  // namespace structmat
