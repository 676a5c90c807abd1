// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <limits>

#include "blas.h"
#include "half.h"
#include "linalg/linalg_kernels.h"
#include "linalg/linalg_plan.h"
#include "parallel.h"
#include "structmat/error.h"
#include "svd/operand_cpu.h"
#include "svd/orth_cpu.h"

namespace structmat {
namespace {

// out (rows, cols) <- part of a strided matrix from (r0, c0) on, converted
template <class T>
void gather(const StridedMatrixView& a, std::int64_t r0, std::int64_t c0, std::int64_t rows,
            std::int64_t cols, T* out, std::int64_t stride) {
  dispatch_dtype(a.dtype, [&](auto element) {
    using S = decltype(element);
    const S* in = static_cast<const S*>(a.data) + r0 * a.row_stride + c0 * a.col_stride;
    if (a.row_stride == 1 && a.col_stride != 1) {  // by columns: read them as they lie
      for (std::int64_t c = 0; c < cols; ++c)
        for (std::int64_t r = 0; r < rows; ++r)
          out[r * stride + c] = static_cast<T>(to_float(in[r + c * a.col_stride]));
      return;
    }
    for (std::int64_t r = 0; r < rows; ++r) {
      const S* row = in + r * a.row_stride;
      T* to = out + r * stride;
      if (a.col_stride == 1)
        for (std::int64_t c = 0; c < cols; ++c) to[c] = static_cast<T>(to_float(row[c]));
      else
        for (std::int64_t c = 0; c < cols; ++c)
          to[c] = static_cast<T>(to_float(row[c * a.col_stride]));
    }
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
      gather(y, first, 0, count, y.cols, out.data + first * out.stride, out.stride);
    });
  OrthCpu<T> orth(context, y.cols, seed);
  std::uint32_t stream = 0;
  if (!orth.orthonormalize(from, out, {}, kMaxOrthPasses, stream))
    throw LinAlgError("orthonormalize: Y contains NaN or Inf");
  std::copy_n(orth.residual().begin(), y.cols, static_cast<double*>(residual.data));
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
  Panel<T> q{const_cast<T*>(static_cast<const T*>(s.q.data)), s.q.rows, r, s.q.row_stride};  // read
  std::unique_ptr<T[]> copy;
  if (s.q.col_stride != 1) {
    copy = scratch<T>(q.rows * r);
    gather(s.q, 0, 0, q.rows, r, copy.get(), r);
    q = {copy.get(), q.rows, r, r};
  }
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

int to_int(std::int64_t size) {
  return static_cast<int>(size);
}

// Panels of rows of A, multiplied twice while they lie in cache.
template <class T>
class GramProduct {
 public:
  GramProduct(const Context& context, const StridedMatrixView& a, const StridedMatrixView& x)
      : context_(context), a_(a), l_(x.cols), plan_(plan_gram_cpu(a.rows, a.cols, x.cols)) {
    constexpr std::int64_t limit = std::numeric_limits<int>::max();
    const bool typed = a.dtype == dtype_of<T>();
    by_rows_ = typed && (a.col_stride == 1 || a.cols == 1) && a.row_stride >= a.cols &&
               a.row_stride <= limit;
    by_columns_ = typed && !by_rows_ && (a.row_stride == 1 || a.rows == 1) &&
                  a.col_stride >= a.rows && a.col_stride <= limit;
    depth_ = std::min(a.cols, by_rows_ || by_columns_ ? std::int64_t{1} << 28 : kDepth);
    if (x.dtype == dtype_of<T>() && x.col_stride == 1 && x.row_stride >= x.cols &&
        x.row_stride <= limit) {
      x_ = static_cast<const T*>(x.data);
      x_stride_ = x.row_stride;
    } else {
      copy_ = scratch<T>(x.rows * x.cols);
      gather(x, 0, 0, x.rows, x.cols, copy_.get(), x.cols);
      x_ = copy_.get();
      x_stride_ = x.cols;
    }
  }

  void run(MatrixView z) {
    const std::int64_t n = a_.cols, size = n * l_, slab = ceil_div(a_.rows, plan_.slabs);
    const bool in_place = z.dtype == dtype_of<T>() && z.row_stride == l_;
    const auto sums = scratch<T>((plan_.slabs - (in_place ? 1 : 0)) * size);
    const auto part = [&](std::int64_t i) {
      return in_place && i == 0 ? static_cast<T*>(z.data)
                                : sums.get() + (i - (in_place ? 1 : 0)) * size;
    };
    parallel_for(context_, plan_.slabs, [&](std::int64_t i) {
      accumulate(i * slab, std::min(a_.rows, (i + 1) * slab), part(i));
    });
    T* total = part(0);
    parallel_for(context_, ceil_div(n, 256), [&](std::int64_t block) {
      const std::int64_t first = block * 256, last = std::min(n, first + 256);
      for (std::int64_t i = 1; i < plan_.slabs; ++i) {
        const T* more = part(i);
        for (std::int64_t k = first * l_; k < last * l_; ++k) total[k] += more[k];
      }
      if (!in_place) write(total, first, last, z);
    });
  }

 private:
  static constexpr std::int64_t kDepth = std::int64_t{1} << 16;  // columns converted at a time

  void accumulate(std::int64_t first, std::int64_t last, T* z) const {
    if (first >= last) std::fill_n(z, a_.cols * l_, T{0});
    const auto p = scratch<T>(plan_.rows * l_);
    const auto tile =
        scratch<T>(by_rows_ || by_columns_ ? 0 : std::min(plan_.rows, last - first) * depth_);
    const bool kept = a_.cols <= depth_;  // the converted panel serves both products
    for (std::int64_t r = first; r < last; r += plan_.rows) {
      const std::int64_t rows = std::min(plan_.rows, last - r);
      for (std::int64_t c = 0; c < a_.cols; c += depth_) {
        const std::int64_t cols = std::min(depth_, a_.cols - c);
        const Part s = part(r, c, rows, cols, tile.get(), true);
        blas::gemm('N', s.transposed ? 'T' : 'N', to_int(l_), to_int(rows), to_int(cols), T{1},
                   x_ + c * x_stride_, to_int(x_stride_), s.data, s.ld, c > 0 ? T{1} : T{0},
                   p.get(), to_int(l_));
      }
      for (std::int64_t c = 0; c < a_.cols; c += depth_) {
        const std::int64_t cols = std::min(depth_, a_.cols - c);
        const Part s = part(r, c, rows, cols, tile.get(), !kept);
        blas::gemm('N', s.transposed ? 'N' : 'T', to_int(l_), to_int(cols), to_int(rows), T{1},
                   p.get(), to_int(l_), s.data, s.ld, r > first ? T{1} : T{0}, z + c * l_,
                   to_int(l_));
      }
    }
  }

  struct Part {
    const T* data;
    int ld;
    bool transposed;
  };
  Part part(std::int64_t r, std::int64_t c, std::int64_t rows, std::int64_t cols, T* tile,
            bool fresh) const {
    const T* at = static_cast<const T*>(a_.data);
    if (by_rows_) return {at + r * a_.row_stride + c, to_int(a_.row_stride), false};
    if (by_columns_) return {at + c * a_.col_stride + r, to_int(a_.col_stride), true};
    if (fresh) gather(a_, r, c, rows, cols, tile, cols);
    return {tile, to_int(cols), false};
  }

  void write(const T* from, std::int64_t first, std::int64_t last, MatrixView z) const {
    dispatch_dtype(z.dtype, [&](auto element) {
      using S = decltype(element);
      for (std::int64_t j = first; j < last; ++j) {
        S* to = static_cast<S*>(z.data) + j * z.row_stride;
        for (std::int64_t k = 0; k < l_; ++k) {
          if constexpr (std::is_same_v<S, double>)
            to[k] = static_cast<S>(from[j * l_ + k]);
          else
            to[k] = from_float<S>(static_cast<float>(from[j * l_ + k]));
        }
      }
    });
  }

  const Context context_;
  const StridedMatrixView a_;
  const std::int64_t l_;
  const GramCpuPlan plan_;
  bool by_rows_ = false, by_columns_ = false;
  std::int64_t depth_ = 0, x_stride_ = 0;
  const T* x_ = nullptr;
  std::unique_ptr<T[]> copy_;
};

}  // namespace

void orthonormalize_cpu(const Context& context, const StridedMatrixView& y, std::uint64_t seed,
                        MatrixView q, VectorView residual) {
  if (y.dtype == DType::f64)
    orthonormalize_as<double>(context, y, seed, q, residual);
  else
    orthonormalize_as<float>(context, y, seed, q, residual);
}

void gram_matmul_cpu(const Context& context, const StridedMatrixView& a, const StridedMatrixView& x,
                     MatrixView z) {
  if (a.dtype == DType::f64)
    GramProduct<double>(context, a, x).run(z);
  else
    GramProduct<float>(context, a, x).run(z);
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
