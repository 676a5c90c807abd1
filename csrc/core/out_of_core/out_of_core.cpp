// SPDX-License-Identifier: Apache-2.0
#include "structmat/out_of_core.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "parallel.h"
#include "scratch.h"
#include "simd.h"
#include "structmat/error.h"
#include "svd/norm.h"
#include "svd/orth.h"
#include "svd/sweep_simd.h"

namespace structmat {
namespace {

// The largest magnitude, NaN where there is one.
template <class T>
double largest(Panel<T> y) {
  T found = 0, zero = 0;  // of zeros, unless one is a product of zero and NaN or Inf
  for (std::int64_t i = 0; i < y.rows; ++i)
    for (std::int64_t j = 0; j < y.cols; ++j) {
      const T value = y.data[i * y.stride + j];
      found = std::max(found, std::abs(value));
      zero += T{0} * value;
    }
  return static_cast<double>(found + zero);
}

// What lies between the two products is some hundred thousand operations, less than it takes to
// wait for a thread whose core the reader of the next block has.
template <class T>
void sweep_as(const Context& context, const StridedMatrixView& a, ConstMatrixView x, MatrixView y,
              MatrixView z, bool measure, BlockFacts& facts) {
  const std::int64_t l = z.cols;
  const Panel<T> in{const_cast<T*>(static_cast<const T*>(x.data)), x.rows, x.cols, x.row_stride};
  const Panel<T> out{static_cast<T*>(y.data), y.rows, y.cols, y.row_stride};
  Norm norm;
  Sweep source;
  source.s = a;
  source.norm = measure ? &norm : nullptr;
  STRUCTMAT_SIMD_CALL(sweep, context, source, in, out);
  facts.norm = norm.value();
  const double magnitude = largest(out.columns(0, l));
  facts.finite = std::isfinite(magnitude) ? 1.0 : 0.0;
  if (facts.finite == 0 || magnitude == 0) return;
  Scratch memory;
  T* const scaled = memory.get<T>((y.rows + z.rows) * l);
  const Panel<T> part{scaled + y.rows * l, z.rows, l, l};
  const double scale = Norm::power_below(magnitude);
  for (std::int64_t i = 0; i < y.rows; ++i)
    for (std::int64_t j = 0; j < l; ++j)
      scaled[i * l + j] = static_cast<T>(static_cast<double>(out.data[i * out.stride + j]) / scale);
  source.norm = nullptr;
  STRUCTMAT_SIMD_CALL(sweep_transposed, context, source, Panel<T>{scaled, y.rows, l, l}, part);
  const double unit = std::max(facts.unit, scale), before = facts.unit / unit, now = scale / unit;
  double zero = 0;
  for (std::int64_t i = 0; i < z.rows; ++i) {
    double* const to = static_cast<double*>(z.data) + i * z.row_stride;
    for (std::int64_t j = 0; j < l; ++j) {
      const double value = static_cast<double>(part.data[i * l + j]);
      zero += 0.0 * value;
      to[j] = before * to[j] + now * value;
    }
  }
  facts.unit = unit;
  facts.finite = zero == 0 ? 1.0 : 0.0;
}

}  // namespace

void block_sweep(const Context& context, const StridedMatrixView& a, ConstMatrixView x,
                 MatrixView y, MatrixView z, bool measure, BlockFacts* facts) {
  const auto shape = [](std::int64_t rows, std::int64_t cols) {
    std::string text = std::to_string(rows);
    text += " x ";
    text += std::to_string(cols);
    return text;
  };
  const DType wanted = a.dtype == DType::f64 ? DType::f64 : DType::f32;
  STRUCTMAT_CHECK(context.device == Device::cpu, "block_sweep: wanted the CPU");
  STRUCTMAT_CHECK(x.dtype == wanted && y.dtype == wanted && z.dtype == DType::f64,
                  std::string("block_sweep: x, y and z are ") + name_of(x.dtype) + ", " +
                      name_of(y.dtype) + " and " + name_of(z.dtype) + ", wanted " +
                      name_of(wanted) + " twice and float64 for A of " + name_of(a.dtype));
  STRUCTMAT_CHECK(x.rows == a.cols && y.rows == a.rows && y.cols == x.cols && z.rows == a.cols &&
                      z.cols <= x.cols,
                  "block_sweep: x, y and z are " + shape(x.rows, x.cols) + ", " +
                      shape(y.rows, y.cols) + " and " + shape(z.rows, z.cols) + " for A of " +
                      shape(a.rows, a.cols));
  if (a.rows == 0 || a.cols == 0 || x.cols == 0) return;
  if (wanted == DType::f64)
    sweep_as<double>(context, a, x, y, z, measure, *facts);
  else
    sweep_as<float>(context, a, x, y, z, measure, *facts);
}

}  // namespace structmat
