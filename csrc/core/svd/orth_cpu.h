// SPDX-License-Identifier: Apache-2.0
// Orthonormal bases of tall panels on the CPU: the passes of orth.h, by tiles of rows that stay in
// L2.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "blas.h"
#include "parallel.h"
#include "random/random_kernels.h"
#include "svd/operand_cpu.h"
#include "svd/orth.h"
#include "svd/orth_factor.h"

namespace structmat {

constexpr std::int64_t kTile = 256;  // rows of a tall panel worked on at a time: they stay in L2

template <class T>
class OrthCpu {
 public:
  // For panels of at most `max_cols` columns, against bases of at most `max_cols`.
  OrthCpu(const Context& context, std::int64_t max_cols, std::uint64_t seed)
      : context_(context),
        seed_(seed),
        c_(scratch<T>(max_cols * max_cols)),
        gram_(scratch<double>(max_cols * max_cols)) {}

  // Whether the last panel given to normalize() was free of NaN and Inf.
  bool finite() const { return finite_; }

  // Scales each column by a power of two to a largest entry in [1, 2).
  void normalize(Panel<T> y) {
    const std::int64_t slabs = slab_count(y.rows, 1), slab = ceil_div(y.rows, slabs);
    const auto largest = scratch<T>(slabs * y.cols);
    const auto finite = scratch<bool>(slabs);
    parallel_for(context_, slabs, [&](std::int64_t i) {
      T* out = largest.get() + i * y.cols;
      std::fill_n(out, y.cols, T{0});
      bool in_range = true;
      for (std::int64_t r = i * slab; r < std::min(y.rows, (i + 1) * slab); ++r)
        for (std::int64_t j = 0; j < y.cols; ++j) {
          const T magnitude = std::abs(y.data[r * y.stride + j]);
          out[j] = std::max(out[j], magnitude);
          in_range &= magnitude <= std::numeric_limits<T>::max();
        }
      finite[i] = in_range;
    });
    finite_ = std::all_of(finite.get(), finite.get() + slabs, [](bool f) { return f; });
    auto scale = scratch<T>(y.cols);
    for (std::int64_t j = 0; j < y.cols; ++j) {
      T value = 0;
      for (std::int64_t i = 0; i < slabs; ++i) value = std::max(value, largest[i * y.cols + j]);
      scale[j] = value > 0 ? power_of_two_inverse(value) : T{1};
    }
    rows(y.rows, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t r = first; r < last; ++r)
        for (std::int64_t j = 0; j < y.cols; ++j) y.data[r * y.stride + j] *= scale[j];
    });
    done_ = false;
  }
  // y -= q (q^T y)
  void project(Panel<T> y, Panel<T> q) {
    if (done_) return;
    inner(q, y, c_.get(), y.cols);
    rows(y.rows, [&](std::int64_t first, std::int64_t last) {
      blas::gemm('N', 'N', to_int(y.cols), to_int(last - first), to_int(q.cols), T{-1}, c_.get(),
                 to_int(y.cols), q.data + first * q.stride, to_int(q.stride), T{1},
                 y.data + first * y.stride, to_int(y.stride));
    });
  }
  // The upper triangle of y^T y, in double.
  void gram(Panel<T> y) {
    if (done_) return;
    sum_over_rows<double>(y.rows, y.cols, y.cols, gram_.get(),
                          [&](std::int64_t first, std::int64_t last, double* out) {
                            std::fill_n(out, y.cols * y.cols, 0.0);
                            const auto wide = scratch<double>(kTile * y.cols);
                            for (std::int64_t r0 = first; r0 < last; r0 += kTile) {
                              const std::int64_t count = std::min(kTile, last - r0);
                              for (std::int64_t r = 0; r < count; ++r)
                                std::copy_n(y.data + (r0 + r) * y.stride, y.cols,
                                            wide.get() + r * y.cols);
                              blas::syrk(to_int(y.cols), to_int(count), 1, wide.get(),
                                         to_int(y.cols), 1, out, to_int(y.cols));
                            }
                          });
  }
  void factor(std::int64_t cols, int pass) {
    if (done_) return;
    factor_ = factor_gram(gram_.get(), cols, pass, std::numeric_limits<T>::epsilon());
    std::copy_n(gram_.get(), cols * cols, c_.get());
  }
  // y <- y W; columns that were found empty become random ones.
  void apply(Panel<T> y, std::uint32_t stream) {
    if (done_) return;
    rows(y.rows, [&](std::int64_t first, std::int64_t last) {
      blas::trmm(to_int(y.cols), to_int(last - first), c_.get(), to_int(y.cols),
                 y.data + first * y.stride, to_int(y.stride));
      if (factor_.empty.empty()) return;
      const T scale = 1 / std::sqrt(static_cast<T>(y.rows));
      const auto random = scratch<T>(y.cols);
      for (std::int64_t r = first; r < last; ++r) {
        fill_gaussian_rows(random.get() - r * y.cols, y.cols, r, r + 1, y.cols, seed_, stream);
        for (std::int64_t j : factor_.empty) y.data[r * y.stride + j] = scale * random[j];
      }
    });
    done_ = factor_.done;
  }

  template <class Body>  // body(first, last) over tiles of rows
  void rows(std::int64_t count, Body&& body) {
    parallel_for(context_, ceil_div(count, kTile),
                 [&](std::int64_t i) { body(i * kTile, std::min(count, (i + 1) * kTile)); });
  }
  // out = sum over slabs of rows, in order; body(first, last, partial) writes its part.
  template <class Sum, class Body>
  void sum_over_rows(std::int64_t count, std::int64_t height, std::int64_t width, Sum* out,
                     Body&& body) {
    const std::int64_t slabs = slab_count(count, std::max(height, width));
    const std::int64_t slab = ceil_div(count, slabs), size = height * width;
    const auto partial = scratch<Sum>((slabs - 1) * size);
    parallel_for(context_, slabs, [&](std::int64_t i) {
      body(i * slab, std::min(count, (i + 1) * slab),
           i == 0 ? out : partial.get() + (i - 1) * size);
    });
    if (slabs == 1) return;
    parallel_for(context_, ceil_div(size, 4096), [&](std::int64_t i) {
      const std::int64_t first = i * 4096, last = std::min(size, first + 4096);
      for (std::int64_t part = 0; part + 1 < slabs; ++part)
        for (std::int64_t j = first; j < last; ++j) out[j] += partial[part * size + j];
    });
  }
  // out (a.cols, b.cols) = a^T b, contiguous
  void inner(Panel<T> a, Panel<T> b, T* out, std::int64_t ld) {
    sum_over_rows<T>(
        a.rows, a.cols, b.cols, out, [&](std::int64_t first, std::int64_t last, T* part) {
          blas::gemm('N', 'T', to_int(b.cols), to_int(a.cols), to_int(last - first), T{1},
                     b.data + first * b.stride, to_int(b.stride), a.data + first * a.stride,
                     to_int(a.stride), T{0}, part, to_int(ld));
        });
  }

 private:
  static int to_int(std::int64_t size) { return static_cast<int>(size); }
  static T power_of_two_inverse(T x) {  // finite for subnormal x too
    return std::ldexp(T{1}, std::min(-std::ilogb(x), std::numeric_limits<T>::max_exponent - 1));
  }
  // Slabs of rows summed on their own, whose results have `cols` columns: no more in all than a
  // panel in float32. Of the sizes alone, so that the bits do not depend on threads.
  static std::int64_t slab_count(std::int64_t rows, std::int64_t cols) {
    return std::clamp<std::int64_t>(std::min(rows / 1024, rows / (2 * cols)), 1, 64);
  }

  const Context context_;
  const std::uint64_t seed_;
  const std::unique_ptr<T[]> c_;
  const std::unique_ptr<double[]> gram_;
  GramFactor factor_;
  bool done_ = false, finite_ = true;
};

}  // namespace structmat
