// SPDX-License-Identifier: Apache-2.0
// Orthonormal bases of tall panels on the CPU: the passes of orth.h, by tiles of rows that stay in
// L2.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "blas.h"
#include "parallel.h"
#include "random/random_kernels.h"
#include "svd/operand_cpu.h"
#include "svd/orth.h"
#include "svd/orth_factor.h"
#include "svd/orth_simd.h"

namespace structmat {

constexpr std::int64_t kTile = 256;  // rows of a tall panel worked on at a time: they stay in L2

// Sums and substitution are done in double for float panels too: converted in tiles that lie in
// level-1 cache, a single pass then suffices up to a condition of 8,000, where CholeskyQR2 in float
// would make two of the same cost. Its triangular factor is applied by substitution: a product with
// R^-1 would lose what later columns have in common with a nearly dependent one.
template <class T>
class OrthCpu {
 public:
  // For panels of at most `max_cols` columns, against bases of at most `max_cols`.
  OrthCpu(const Context& context, std::int64_t max_cols, std::uint64_t seed)
      : context_(context),
        seed_(seed),
        c_(scratch<T>(max_cols * max_cols)),
        gram_(scratch<double>(gram_stride(max_cols) * gram_stride(max_cols))) {}

  // y <- an orthonormal basis of the span of `from` (which may be y), see orth.h; false where that
  // holds NaN or Inf. The bits of columns replaced depend on `stream`, which is counted up.
  bool orthonormalize(Panel<T> from, Panel<T> y, Panel<T> before, int passes,
                      std::uint32_t& stream) {
    constexpr bool wide = std::is_same_v<T, double>;
    const bool alone = before.cols == 0;
    const double eps = std::numeric_limits<T>::epsilon();
    // What projection in T leaves of `before` grows with R^-1 as well.
    const double growth = wide || !alone ? 0.0 : eps * 0x1p49;
    const double noise = wide || !alone ? 16 * eps : 0x1p-40;
    if (wide || !alone) {  // squares of float entries neither overflow nor vanish in double
      if (!normalize(from, y)) return false;
      from = y;
    }
    factor_.start(y.cols);
    bool summed = false;
    for (int pass = 0; pass < passes; ++pass) {
      if (!alone) inner(before, from, c_.get(), y.cols);
      if (!summed) gram(from, before);
      for (std::int64_t j = 0; j < y.cols; ++j)
        if (!std::isfinite(gram_[j * gram_stride(y.cols) + j])) return false;
      const bool kept = alone || most_is_left(y.cols, before.cols);
      factor_.factor(gram_.get(), pass, noise, growth);
      const bool last = (factor_.done && kept) || pass + 1 == passes;
      summed = !last && alone;
      solve(from, y, summed, ++stream);
      from = y;
      if (last) break;
    }
    return true;
  }

  // Per column of the last panel: the norm of its part outside the span of its predecessors (and of
  // `before`) over the norm of the part outside `before`.
  const std::vector<double>& residual() const { return factor_.residual; }

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
    const Sweep sweep{{a.data, dtype_of<T>(), a.rows, a.cols, a.stride, 1}};
    STRUCTMAT_SIMD_CALL(sweep_transposed, context_, sweep, b, Panel<T>{out, a.cols, b.cols, ld});
  }

  // The upper triangle, by columns gram_stride(y.cols) apart, of y^T y; of y - before c where there
  // is a `before`, which takes y's place.
  double* gram(Panel<T> y, Panel<T> before = {}) {
    const std::int64_t stride = gram_stride(y.cols);
    sum_over_rows<double>(y.rows, stride, stride, gram_.get(),
                          [&](std::int64_t first, std::int64_t last, double* out) {
                            std::fill_n(out, stride * stride, 0.0);
                            for (std::int64_t r = first; r < last; r += kTile) {
                              const std::int64_t count = std::min(kTile, last - r);
                              T* tile = y.data + r * y.stride;
                              if (before.cols > 0)
                                blas::gemm('N', 'N', to_int(y.cols), to_int(count),
                                           to_int(before.cols), T{-1}, c_.get(), to_int(y.cols),
                                           before.data + r * before.stride, to_int(before.stride),
                                           T{1}, tile, to_int(y.stride));
                              add_gram(tile, y.stride, count, y.cols, out);
                            }
                          });
    return gram_.get();
  }

 private:
  static int to_int(std::int64_t size) { return static_cast<int>(size); }
  static T power_of_two_inverse(T x) {  // finite for subnormal x too
    return std::ldexp(T{1}, std::min(-std::ilogb(x), std::numeric_limits<T>::max_exponent - 1));
  }
  // Slabs of rows summed on their own, whose results have `cols` columns: no more in all than a
  // panel in float32. Of the sizes alone, so that the bits do not depend on threads.
  static std::int64_t slab_count(std::int64_t rows, std::int64_t cols) {
    return std::clamp<std::int64_t>(std::min(rows / 512, rows / (2 * cols)), 1, 64);
  }

  // y <- `from`, each column scaled by a power of two to a largest entry in [1, 2).
  bool normalize(Panel<T> from, Panel<T> y) {
    const std::int64_t slabs = slab_count(y.rows, 1), slab = ceil_div(y.rows, slabs);
    const auto largest = scratch<T>(slabs * y.cols);
    const auto finite = scratch<bool>(slabs);
    parallel_for(context_, slabs, [&](std::int64_t i) {
      T* out = largest.get() + i * y.cols;
      std::fill_n(out, y.cols, T{0});
      bool in_range = true;
      for (std::int64_t r = i * slab; r < std::min(y.rows, (i + 1) * slab); ++r)
        for (std::int64_t j = 0; j < y.cols; ++j) {
          const T magnitude = std::abs(from.data[r * from.stride + j]);
          out[j] = std::max(out[j], magnitude);
          in_range &= magnitude <= std::numeric_limits<T>::max();
        }
      finite[i] = in_range;
    });
    if (!std::all_of(finite.get(), finite.get() + slabs, [](bool f) { return f; })) return false;
    auto scale = scratch<T>(y.cols);
    for (std::int64_t j = 0; j < y.cols; ++j) {
      T value = 0;
      for (std::int64_t i = 0; i < slabs; ++i) value = std::max(value, largest[i * y.cols + j]);
      scale[j] = value > 0 ? power_of_two_inverse(value) : T{1};
    }
    rows(y.rows, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t r = first; r < last; ++r)
        for (std::int64_t j = 0; j < y.cols; ++j)
          y.data[r * y.stride + j] = from.data[r * from.stride + j] * scale[j];
    });
    return true;
  }
  // Whether no column lost most of its norm with the projection: then one projection suffices
  // (Daniel, Gragg, Kaufman, Stewart, Math. Comp. 30 (1976)).
  bool most_is_left(std::int64_t cols, std::int64_t before) const {
    for (std::int64_t j = 0; j < cols; ++j) {
      double lost = 0;
      for (std::int64_t i = 0; i < before; ++i)
        lost += static_cast<double>(c_[i * cols + j]) * static_cast<double>(c_[i * cols + j]);
      if (!(lost <= 9 * gram_[j * gram_stride(cols) + j])) return false;
    }
    return true;
  }
  // y <- from D R^-1; columns that were found empty become random ones. With `summed` the Gram
  // matrix of the result comes along.
  void solve(Panel<T> from, Panel<T> y, bool summed, std::uint32_t stream) {
    const auto tile = [&](std::int64_t first, std::int64_t count) {
      T* to = y.data + first * y.stride;
      solve_rows(from.data + first * from.stride, from.stride, to, y.stride, count, y.cols,
                 factor_.minus_r.data(), factor_.scale.data(), factor_.inverse.data());
      if (factor_.empty.empty()) return;
      const T scale = 1 / std::sqrt(static_cast<T>(y.rows));
      const auto random = scratch<T>(y.cols);
      for (std::int64_t r = 0; r < count; ++r) {
        fill_gaussian_rows(random.get() - (first + r) * y.cols, y.cols, first + r, first + r + 1,
                           y.cols, seed_, stream);
        for (std::int64_t j : factor_.empty) to[r * y.stride + j] = scale * random[j];
      }
    };
    if (!summed) {
      rows(y.rows, [&](std::int64_t first, std::int64_t last) { tile(first, last - first); });
      return;
    }
    const std::int64_t stride = gram_stride(y.cols);
    sum_over_rows<double>(y.rows, stride, stride, gram_.get(),
                          [&](std::int64_t first, std::int64_t last, double* out) {
                            std::fill_n(out, stride * stride, 0.0);
                            for (std::int64_t r = first; r < last; r += kTile) {
                              const std::int64_t count = std::min(kTile, last - r);
                              tile(r, count);
                              add_gram(y.data + r * y.stride, y.stride, count, y.cols, out);
                            }
                          });
  }

  const Context context_;
  const std::uint64_t seed_;
  const std::unique_ptr<T[]> c_;
  const std::unique_ptr<double[]> gram_;
  OrthFactor factor_;
};

}  // namespace structmat
