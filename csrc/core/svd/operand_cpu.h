// SPDX-License-Identifier: Apache-2.0
// Products of a strided matrix B with tall panels: Y = B X and Z = B^T Y.
#pragma once
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "half.h"
#include "parallel.h"
#include "simd.h"
#include "structmat/svd.h"
#include "svd/mean_cpu.h"
#include "svd/norm.h"
#include "svd/orth.h"
#include "svd/svd_plan.h"
#include "svd/sweep_simd.h"

namespace structmat {

// B (tall x small) as it is stored: itself or its transpose. Centred, less the means of its columns
// or, where B is A^T, of its rows: subtracted as numbers are read, since what they take from a
// product would leave it the rounding of their own size.
template <class T>
class Operand {
 public:
  Operand(const Context& context, const StridedMatrixView& b, const SvdPlan& plan = {})
      : context_(context), transposed_(b.col_stride != 1 && b.row_stride == 1), stored_{b} {
    if (plan.center) {
      mean_.find(context, plan.swapped ? transpose(b) : b);
      stored_.high = mean_.high.get();
      stored_.low = mean_.low.get();
      stored_.of_rows = plan.swapped != transposed_;
    }
    if (transposed_) stored_.s = transpose(b);
  }

  // y = B x; with `norm` also B's.
  void multiply(Panel<T> x, Panel<T> y, Norm* norm) const { product(transposed_, x, y, norm); }
  // y = B^T x
  void multiply_transposed(Panel<T> x, Panel<T> y, Norm* norm) const {
    product(!transposed_, x, y, norm);
  }
  // y = B R or y = B^T R for a sparse random R (sketch_simd.cpp)
  void sketch(std::uint64_t seed, Panel<T> y, Norm* norm) const {
    random_product(transposed_, seed, y, norm);
  }
  void sketch_transposed(std::uint64_t seed, Panel<T> y, Norm* norm) const {
    random_product(!transposed_, seed, y, norm);
  }
  // y = B
  void load(Panel<T> y, Norm* norm) const {
    const StridedMatrixView& s = stored_.s;
    const std::int64_t row_stride = transposed_ ? s.col_stride : s.row_stride;
    const std::int64_t col_stride = transposed_ ? s.row_stride : s.col_stride;
    const std::int64_t tile = 64;
    std::vector<Norm> norms(static_cast<std::size_t>(ceil_div(y.rows, tile)));
    dispatch_dtype(s.dtype, [&](auto element) {
      using E = decltype(element);
      const E* const in = static_cast<const E*>(s.data);
      parallel_for(context_, static_cast<std::int64_t>(norms.size()), [&](std::int64_t i) {
        for (std::int64_t r = i * tile; r < std::min(y.rows, (i + 1) * tile); ++r) {
          T* row = y.data + r * y.stride;
          for (std::int64_t c = 0; c < y.cols; ++c)
            row[c] = static_cast<T>(to_float(in[r * row_stride + c * col_stride]));
          if (stored_.high != nullptr)
            mean_.subtract(row, r, y.cols, stored_.of_rows != transposed_);
          norms[static_cast<std::size_t>(i)].add(row, y.cols);
        }
      });
    });
    if (norm == nullptr) return;
    for (const Norm& n : norms) norm->add(n);
  }

 private:
  void product(bool transposed, Panel<T> x, Panel<T> y, Norm* norm) const {
    if (transposed)
      STRUCTMAT_SIMD_CALL(sweep_transposed, context_, measuring(norm), x, y);
    else
      STRUCTMAT_SIMD_CALL(sweep, context_, measuring(norm), x, y);
  }
  void random_product(bool transposed, std::uint64_t seed, Panel<T> y, Norm* norm) const {
    if (transposed)
      STRUCTMAT_SIMD_CALL(sweep_sketch_transposed, context_, measuring(norm), seed, y);
    else
      STRUCTMAT_SIMD_CALL(sweep_sketch, context_, measuring(norm), seed, y);
  }
  Sweep measuring(Norm* norm) const {
    Sweep sweep = stored_;
    sweep.norm = norm;
    return sweep;
  }

  static StridedMatrixView transpose(const StridedMatrixView& b) {
    return {b.data, b.dtype, b.cols, b.rows, b.col_stride, b.row_stride};
  }

  const Context context_;
  const bool transposed_;
  Mean<T> mean_;
  Sweep stored_;
};

}  // namespace structmat
