// SPDX-License-Identifier: Apache-2.0
// One pass over a strided matrix S: Y = S X or Z = S^T Y for thin X and Y, given or random and
// sparse. Compiled once per instruction set (sweep_simd.cpp, sketch_simd.cpp).
#pragma once
#include "structmat/svd.h"
#include "svd/norm.h"
#include "svd/orth.h"

namespace structmat {

struct Sweep {
  StridedMatrixView s;
  Norm* norm = nullptr;  // where wanted, grows by the norm of what was read
  // Subtracted from S as it is read, where not null: one number per column, or per row of S. High
  // part first, of the products' type: what is left has the rounding of its own size.
  const void *high = nullptr, *low = nullptr;
  bool of_rows = false;
};

// Z = S^T (S X), or S (S^T X) with `columns`, from one read of S, and the sums of its columns, with
// `columns` of its rows, where wanted.
struct GramSweep {
  StridedMatrixView s;
  bool columns = false;
  std::int64_t slabs = 1;  // parts summed on their own, added in order
  Norm* norm = nullptr;
  double* sums = nullptr;
};

#define STRUCTMAT_DECLARE(level)                                                                   \
  namespace level {                                                                                \
  void sweep(const Context& context, const Sweep& a, Panel<float> x, Panel<float> y);              \
  void sweep(const Context& context, const Sweep& a, Panel<double> x, Panel<double> y);            \
  void sweep_transposed(const Context& context, const Sweep& a, Panel<float> y, Panel<float> z);   \
  void sweep_transposed(const Context& context, const Sweep& a, Panel<double> y, Panel<double> z); \
  void gram_sweep(const Context& context, const GramSweep& a, Panel<float> x, Panel<float> z);     \
  void gram_sweep(const Context& context, const GramSweep& a, Panel<double> x, Panel<double> z);   \
  void sweep_sketch(const Context& context, const Sweep& a, std::uint64_t seed, Panel<float> y);   \
  void sweep_sketch(const Context& context, const Sweep& a, std::uint64_t seed, Panel<double> y);  \
  void sweep_sketch_transposed(const Context& context, const Sweep& a, std::uint64_t seed,         \
                               Panel<float> z);                                                    \
  void sweep_sketch_transposed(const Context& context, const Sweep& a, std::uint64_t seed,         \
                               Panel<double> z);                                                   \
  }
STRUCTMAT_DECLARE(baseline)
STRUCTMAT_DECLARE(avx2)
STRUCTMAT_DECLARE(avx512)
#undef STRUCTMAT_DECLARE

}  // namespace structmat
