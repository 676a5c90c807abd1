// SPDX-License-Identifier: Apache-2.0
// Products of a strided matrix B with tall panels, tile by tile: Y = B X and Z = B^T Y. Tiles that
// BLAS cannot read in place (16-bit, any other strides) are converted one at a time; B is never
// copied.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "blas.h"
#include "half.h"
#include "parallel.h"
#include "structmat/svd.h"
#include "svd/svd_algorithm.h"

namespace structmat {

template <class T>
std::unique_ptr<T[]> scratch(std::int64_t count) {  // not set to zero
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count > 0 ? count : 1)]);
}

// The Euclidean norm of many numbers as scale * sqrt(sum): squares neither overflow nor vanish.
struct Norm {
  double scale = 0, sum = 0;

  template <class T>
  void add(const T* data, std::int64_t count) {
    T largest = 0;
    bool nan = false;
    for (std::int64_t i = 0; i < count; ++i) {
      const T magnitude = std::abs(data[i]);
      largest = magnitude > largest ? magnitude : largest;
      nan |= data[i] != data[i];
    }
    if (nan) largest = std::numeric_limits<T>::quiet_NaN();
    if (largest == 0) return;
    // A float's square cannot leave double's range, so those share the scale 1.
    const double unit = sizeof(T) == 4 || !std::isfinite(largest) ? 1.0 : power_below(largest);
    double partial[8] = {};
    std::int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      for (int k = 0; k < 8; ++k) {
        const double value = static_cast<double>(data[i + k]) / unit;
        partial[k] += value * value;
      }
    for (; i < count; ++i) {
      const double value = static_cast<double>(data[i]) / unit;
      partial[0] += value * value;
    }
    double total = 0;
    for (double p : partial) total += p;
    add({unit, total});
  }
  void add(Norm other) {
    if (other.scale == 0) return;
    if (scale < other.scale || scale == 0) std::swap(*this, other);
    if (other.scale > 0) sum += other.sum * (other.scale / scale) * (other.scale / scale);
  }
  double value() const { return scale * std::sqrt(sum); }

  static double power_below(double x) { return std::ldexp(1.0, std::ilogb(x)); }
};

template <class T>
class Operand {
 public:
  Operand(const Context& context, const StridedMatrixView& b)
      : context_(context), view_(b), transposed_(b.col_stride != 1 && b.row_stride == 1) {
    if (transposed_) {  // as stored: columns next to each other
      std::swap(view_.rows, view_.cols);
      std::swap(view_.row_stride, view_.col_stride);
    }
    in_place_ = view_.dtype == dtype_of<T>() && view_.col_stride == 1 &&
                view_.row_stride >= view_.cols &&
                view_.row_stride <= std::numeric_limits<int>::max();
  }

  // y = B x; with `norm` also B's.
  void multiply(Panel<T> x, Panel<T> y, Norm* norm) const {
    transposed_ ? by_columns(x, y, norm) : by_rows(x, y, norm);
  }
  // y = B^T x
  void multiply_transposed(Panel<T> x, Panel<T> y, Norm* norm) const {
    transposed_ ? by_rows(x, y, norm) : by_columns(x, y, norm);
  }
  // y = B
  void load(Panel<T> y, Norm* norm) const {
    const std::int64_t tile = 64;
    std::vector<Norm> norms(static_cast<std::size_t>(ceil_div(y.rows, tile)));
    parallel_for(context_, static_cast<std::int64_t>(norms.size()), [&](std::int64_t i) {
      for (std::int64_t r = i * tile; r < std::min(y.rows, (i + 1) * tile); ++r) {
        T* row = y.data + r * y.stride;
        if (transposed_)
          gather(0, r, y.cols, 1, row, 1);
        else
          gather(r, 0, 1, y.cols, row, y.cols);
        norms[static_cast<std::size_t>(i)].add(row, y.cols);
      }
    });
    for (const Norm& n : norms) norm->add(n);
  }

 private:
  static constexpr std::int64_t kDepth = 1024;  // of a converted tile: 256 x 1024 floats are 1 MB

  // A tile must be large for BLAS and small for many threads: 256 rows run 17 % faster than 64.
  static std::int64_t tile_of(std::int64_t size) {
    return size >= 4096 ? 256 : size >= 1024 ? 128 : 64;
  }

  // Tile (r0.., c0..) of the stored matrix into out, row-major with stride ld.
  void gather(std::int64_t r0, std::int64_t c0, std::int64_t rows, std::int64_t cols, T* out,
              std::int64_t ld) const {
    dispatch_dtype(view_.dtype, [&](auto element) {
      using S = decltype(element);
      const S* in =
          static_cast<const S*>(view_.data) + r0 * view_.row_stride + c0 * view_.col_stride;
      for (std::int64_t r = 0; r < rows; ++r) {
        const S* row = in + r * view_.row_stride;
        T* to = out + r * ld;
        if (view_.col_stride == 1)
          for (std::int64_t c = 0; c < cols; ++c) to[c] = static_cast<T>(to_float(row[c]));
        else
          for (std::int64_t c = 0; c < cols; ++c)
            to[c] = static_cast<T>(to_float(row[c * view_.col_stride]));
      }
    });
  }

  struct Tile {
    const T* data;
    int ld;
  };
  Tile tile(std::int64_t r0, std::int64_t c0, std::int64_t rows, std::int64_t cols,
            std::unique_ptr<T[]>& buffer, Norm* norm) const {
    Tile out;
    if (in_place_) {
      out = {static_cast<const T*>(view_.data) + r0 * view_.row_stride + c0,
             static_cast<int>(view_.row_stride)};
    } else {
      if (!buffer) buffer = scratch<T>(256 * kDepth);
      gather(r0, c0, rows, cols, buffer.get(), cols);
      out = {buffer.get(), static_cast<int>(cols)};
    }
    if (norm != nullptr)
      for (std::int64_t r = 0; r < rows; ++r) norm->add(out.data + r * out.ld, cols);
    return out;
  }

  // y = S x for the stored S: tiles of rows, each with its whole sum.
  void by_rows(Panel<T> x, Panel<T> y, Norm* norm) const {
    const std::int64_t height = tile_of(view_.rows), tiles = ceil_div(view_.rows, height);
    std::vector<Norm> norms(static_cast<std::size_t>(norm != nullptr ? tiles : 0));
    parallel_for(context_, tiles, [&](std::int64_t i) {
      const std::int64_t r0 = i * height, rows = std::min(height, view_.rows - r0);
      std::unique_ptr<T[]> buffer;
      const std::int64_t depth = in_place_ ? std::int64_t{1} << 20 : kDepth;
      for (std::int64_t c0 = 0; c0 < view_.cols; c0 += depth) {
        const std::int64_t cols = std::min(depth, view_.cols - c0);
        const Tile s = tile(r0, c0, rows, cols, buffer,
                            norm != nullptr ? &norms[static_cast<std::size_t>(i)] : nullptr);
        blas::gemm('N', 'N', static_cast<int>(x.cols), static_cast<int>(rows),
                   static_cast<int>(cols), T{1}, x.data + c0 * x.stride, static_cast<int>(x.stride),
                   s.data, s.ld, c0 > 0 ? T{1} : T{0}, y.data + r0 * y.stride,
                   static_cast<int>(y.stride));
      }
    });
    for (const Norm& n : norms) norm->add(n);
  }

  // y = S^T x: tiles of columns. Where those are few, the sum over rows is split into slabs, added
  // in order; their partial results take no more room than x.
  void by_columns(Panel<T> x, Panel<T> y, Norm* norm) const {
    const std::int64_t width = tile_of(view_.cols), tiles = ceil_div(view_.cols, width);
    const std::int64_t slabs = std::clamp<std::int64_t>(
        std::min({16 / tiles, view_.rows / view_.cols, view_.rows / 4096}), 1, 16);
    const std::int64_t slab = ceil_div(view_.rows, slabs), size = view_.cols * x.cols;
    const auto partial = scratch<T>((slabs - 1) * size);
    std::vector<Norm> norms(static_cast<std::size_t>(norm != nullptr ? tiles * slabs : 0));
    parallel_for(context_, tiles * slabs, [&](std::int64_t i) {
      const std::int64_t part = i / tiles, c0 = i % tiles * width;
      const std::int64_t cols = std::min(width, view_.cols - c0);
      T* out = part == 0 ? y.data + c0 * y.stride : partial.get() + (part - 1) * size + c0 * x.cols;
      const int out_ld = static_cast<int>(part == 0 ? y.stride : x.cols);
      std::unique_ptr<T[]> buffer;
      const std::int64_t depth = in_place_ ? std::int64_t{1} << 20 : kDepth;
      const std::int64_t first = part * slab, last = std::min(view_.rows, first + slab);
      for (std::int64_t r0 = first; r0 < last; r0 += depth) {
        const std::int64_t rows = std::min(depth, last - r0);
        const Tile s = tile(r0, c0, rows, cols, buffer,
                            norm != nullptr ? &norms[static_cast<std::size_t>(i)] : nullptr);
        blas::gemm('N', 'T', static_cast<int>(x.cols), static_cast<int>(cols),
                   static_cast<int>(rows), T{1}, x.data + r0 * x.stride, static_cast<int>(x.stride),
                   s.data, s.ld, r0 > first ? T{1} : T{0}, out, out_ld);
      }
    });
    if (slabs > 1)
      parallel_for(context_, ceil_div(view_.cols, 64), [&](std::int64_t i) {
        for (std::int64_t c = i * 64; c < std::min(view_.cols, (i + 1) * 64); ++c)
          for (std::int64_t part = 0; part + 1 < slabs; ++part)
            for (std::int64_t j = 0; j < x.cols; ++j)
              y.data[c * y.stride + j] += partial[part * size + c * x.cols + j];
      });
    for (const Norm& n : norms) norm->add(n);
  }

  const Context context_;
  StridedMatrixView view_;
  const bool transposed_;
  bool in_place_;
};

}  // namespace structmat
