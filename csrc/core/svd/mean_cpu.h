// SPDX-License-Identifier: Apache-2.0
// The mean of the rows of a strided matrix, on the CPU.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>

#include "half.h"
#include "parallel.h"
#include "structmat/svd.h"
#include "svd/mean.h"

namespace structmat {

template <class T>
std::unique_ptr<T[]> scratch(std::int64_t count) {  // not set to zero
  return std::unique_ptr<T[]>(new T[static_cast<std::size_t>(count > 0 ? count : 1)]);
}

// As high + low, both of type T. Summed in double and relative to the first row, so that it errs by
// the rounding of what rows differ by; of equal rows it is that row.
template <class T>
struct Mean {
  std::unique_ptr<T[]> high, low;

  void find(const Context& context, const StridedMatrixView& a) {
    high = scratch<T>(a.cols);
    low = scratch<T>(a.cols);
    dispatch_dtype(a.dtype, [&](auto element) { find<decltype(element)>(context, a); });
  }

  // From line `index` of the matrix (or of its transpose, which has one mean a line).
  void subtract(T* line, std::int64_t index, std::int64_t count, bool of_rows) const {
    for (std::int64_t c = 0; c < count; ++c) {
      const std::int64_t i = of_rows ? index : c;
      line[c] = (line[c] - high[i]) - low[i];
    }
  }

 private:
  static constexpr std::int64_t kStripe = 512, kMaxSlabs = 64;

  template <class E>
  void find(const Context& context, const StridedMatrixView& a) {
    const E* const data = static_cast<const E*>(a.data);
    const std::int64_t m = a.rows, n = a.cols, stripes = ceil_div(n, kStripe);
    const std::int64_t slabs = std::clamp<std::int64_t>(m / 512, 1, kMaxSlabs);
    const std::int64_t slab = ceil_div(m, slabs);
    const auto sums = scratch<double>(slabs * n), first = scratch<double>(n);
    for (std::int64_t c = 0; c < n; ++c)
      first[c] = static_cast<double>(to_float(data[c * a.col_stride]));
    parallel_for(context, stripes * slabs, [&](std::int64_t task) {
      const std::int64_t c0 = task % stripes * kStripe, c1 = std::min(n, c0 + kStripe);
      const std::int64_t r0 = task / stripes * slab, r1 = std::min(m, r0 + slab);
      double* const sum = sums.get() + task / stripes * n;
      std::fill(sum + c0, sum + c1, 0.0);
      if (a.col_stride == 1) {
        for (std::int64_t r = r0; r < r1; ++r) {
          const E* const row = data + r * a.row_stride;
          for (std::int64_t c = c0; c < c1; ++c)
            sum[c] += static_cast<double>(to_float(row[c])) - first[c];
        }
      } else {
        for (std::int64_t c = c0; c < c1; ++c) {
          double part[8] = {};
          const E* const column = data + c * a.col_stride;
          for (std::int64_t r = r0; r < r1; ++r)
            part[r % 8] += static_cast<double>(to_float(column[r * a.row_stride])) - first[c];
          for (double p : part) sum[c] += p;
        }
      }
      // Divided before they are added up: what fits its type does not overflow here.
      for (std::int64_t c = c0; c < c1; ++c) sum[c] /= static_cast<double>(m);
    });
    for (std::int64_t c = 0; c < n; ++c) {
      double offset = 0;
      for (std::int64_t i = 0; i < slabs; ++i) offset += sums[i * n + c];
      split_mean(first[c], offset, high[c], low[c]);
    }
  }
};

}  // namespace structmat
