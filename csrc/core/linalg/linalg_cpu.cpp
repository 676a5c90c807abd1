// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "half.h"
#include "linalg/linalg_kernels.h"
#include "linalg/linalg_plan.h"
#include "parallel.h"
#include "structmat/error.h"
#include "svd/operand_cpu.h"
#include "svd/orth_cpu.h"

namespace structmat {
namespace {

// out <- `rows` rows of a strided matrix from r0 on, converted
template <class T>
void gather(const StridedMatrixView& a, std::int64_t r0, std::int64_t rows, T* out,
            std::int64_t stride) {
  dispatch_dtype(a.dtype, [&](auto element) {
    using S = decltype(element);
    const S* in = static_cast<const S*>(a.data) + r0 * a.row_stride;
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < a.cols; ++c)
        out[r * stride + c] = static_cast<T>(to_float(in[r * a.row_stride + c * a.col_stride]));
  });
}

template <class T>
void orthonormalize_as(const Context& context, const StridedMatrixView& y, std::uint64_t seed,
                       MatrixView q, VectorView residual) {
  const Panel<T> out{static_cast<T*>(q.data), q.rows, q.cols, q.row_stride};
  Panel<T> from = out;
  if (y.dtype == dtype_of<T>() && (y.col_stride == 1 || y.cols == 1))
    from = {const_cast<T*>(static_cast<const T*>(y.data)), y.rows, y.cols, y.row_stride};  // read
  else
    parallel_for(context, ceil_div(y.rows, kTile), [&](std::int64_t i) {
      const std::int64_t first = i * kTile, count = std::min(kTile, y.rows - first);
      gather(y, first, count, out.data + first * out.stride, out.stride);
    });
  OrthCpu<T> orth(context, y.cols, seed);
  std::uint32_t stream = 0;
  if (!orth.orthonormalize(from, out, {}, kMaxOrthPasses, stream))
    throw LinAlgError("orthonormalize: Y contains NaN or Inf");
  std::copy_n(orth.residual().begin(), y.cols, static_cast<double*>(residual.data));
}

// X where it lies or, with other strides or types, a copy.
template <class T>
Panel<T> thin_operand(const StridedMatrixView& x, std::unique_ptr<T[]>& copy) {
  if (x.dtype == dtype_of<T>() && x.col_stride == 1)
    return {const_cast<T*>(static_cast<const T*>(x.data)), x.rows, x.cols, x.row_stride};  // read
  copy = scratch<T>(x.rows * x.cols);
  gather(x, 0, x.rows, copy.get(), x.cols);
  return {copy.get(), x.rows, x.cols, x.cols};
}

template <class T>
void fill_nan(const MatrixView& m) {
  for (std::int64_t i = 0; i < m.rows; ++i)
    std::fill_n(static_cast<T*>(m.data) + i * m.row_stride, m.cols,
                std::numeric_limits<T>::quiet_NaN());
}

template <class T>
void range_step_as(const Context& context, const RangeStep& s, std::uint64_t seed) {
  const std::int64_t r = s.q.cols;
  const auto panel = [r](const MatrixView& m) {
    return Panel<T>{static_cast<T*>(m.data), m.rows, r, m.row_stride};
  };
  const Panel<T> p = panel(s.p), next = panel(s.next), b = panel(s.b);
  std::unique_ptr<T[]> copy;
  const Panel<T> q = thin_operand(s.q, copy);
  const Operand<T> a(context, s.a);
  OrthCpu<T> orth(context, r, seed);
  std::uint32_t stream = 0;
  a.multiply(q, p, nullptr);
  bool finite = orth.orthonormalize(p, p, {}, kMaxOrthPasses, stream);
  if (finite) {
    stream = 0;
    a.multiply_transposed(p, b, nullptr);
    finite = orth.orthonormalize(b, next, {}, kMaxOrthPasses, stream);
  }
  *s.finite = finite ? 1 : 0;
  if (!finite)
    for (const MatrixView& part : {s.p, s.next, s.b}) fill_nan<T>(part);
}

template <class T>
void gram_matmul_as(const Context& context, const StridedMatrixView& a, const StridedMatrixView& x,
                    MatrixView z, GramMoments moments) {
  const std::int64_t n = a.cols, l = x.cols;
  std::unique_ptr<T[]> copy, sums;
  const Panel<T> right = thin_operand(x, copy);
  Panel<T> out{static_cast<T*>(z.data), n, l, z.row_stride};
  if (z.dtype != dtype_of<T>()) {
    sums = scratch<T>(n * l);
    out = {sums.get(), n, l, l};
  }
  Norm norm;
  GramSweep sweep{a, a.col_stride != 1 && a.row_stride == 1, gram_slabs_cpu(a.rows, l)};
  if (sweep.columns) sweep.s = {a.data, a.dtype, a.cols, a.rows, a.col_stride, a.row_stride};
  sweep.norm = moments.norm != nullptr ? &norm : nullptr;
  sweep.sums = static_cast<double*>(moments.column_sums.data);
  STRUCTMAT_SIMD_CALL(gram_sweep, context, sweep, right, out);
  if (moments.norm != nullptr) *moments.norm = norm.value();
  if (z.dtype == dtype_of<T>()) return;
  dispatch_dtype(z.dtype, [&](auto element) {
    using E = decltype(element);
    if constexpr (sizeof(E) == 2)
      parallel_for(context, ceil_div(n, kTile), [&](std::int64_t i) {
        for (std::int64_t r = i * kTile; r < std::min(n, (i + 1) * kTile); ++r)
          for (std::int64_t c = 0; c < l; ++c)
            static_cast<E*>(z.data)[r * z.row_stride + c] =
                from_float<E>(static_cast<float>(out.data[r * l + c]));
      });
  });
}

}  // namespace

void orthonormalize_cpu(const Context& context, const StridedMatrixView& y, std::uint64_t seed,
                        MatrixView q, VectorView residual) {
  if (y.dtype == DType::f64)
    orthonormalize_as<double>(context, y, seed, q, residual);
  else
    orthonormalize_as<float>(context, y, seed, q, residual);
}

void gram_matmul_cpu(const Context& context, const StridedMatrixView& a, const StridedMatrixView& x,
                     MatrixView z, GramMoments moments) {
  if (a.dtype == DType::f64)
    gram_matmul_as<double>(context, a, x, z, moments);
  else
    gram_matmul_as<float>(context, a, x, z, moments);
}

void range_step_cpu(const Context& context, const RangeStep& step, std::uint64_t seed) {
  *step.finite = 1;
  if (step.q.cols == 0) return;
  if (step.a.dtype == DType::f64)
    range_step_as<double>(context, step, seed);
  else
    range_step_as<float>(context, step, seed);
}

}  // namespace structmat
