// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/arena.h"
#include "cuda/device.h"
#include "cuda/gemm.h"
#include "linalg/linalg_kernels.h"
#include "linalg/linalg_plan.h"
#include "linalg/moments_cuda.cuh"
#include "structmat/error.h"
#include "svd/orth_cuda.cuh"

namespace structmat {
namespace {

using namespace svd_cuda;

struct OrthBuffers {
  double *y, *extremes;  // (m, l), (kMaxSlabs, l)
  OrthWork work;
  std::size_t bytes;

  OrthBuffers(void* base, std::int64_t m, std::int64_t l) : OrthBuffers(cuda::Arena(base), m, l) {}

 private:
  OrthBuffers(cuda::Arena arena, std::int64_t m, std::int64_t l) : work(arena, l) {
    y = arena.take<double>(m * l);
    extremes = arena.take<double>(kMaxSlabs * l);
    bytes = arena.used();
  }
};

// q <- y, and what is known of the columns; NaN where Y held NaN or Inf.
template <class T>
__global__ void __launch_bounds__(kThreads)
    orth_finish_kernel(Panel<double> y, Panel<T> q, OrthColumns columns, double* residual,
                       const State* state) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const bool finite = state->overflowed == 0;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t id = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t i = id; i < y.rows * y.cols; i += step) {
    const std::int64_t r = i / y.cols, c = i % y.cols;
    q.data[r * q.stride + c] = static_cast<T>(finite ? y.data[r * y.stride + c] : nan);
  }
  for (std::int64_t j = id; j < y.cols; j += step) residual[j] = finite ? columns.residual[j] : nan;
}

template <class T>
void orthonormalize_as(const Context& context, const OrthBuffers& b, const StridedMatrixView& from,
                       std::uint64_t seed, MatrixView q, double* residual) {
  const std::int64_t m = from.rows, l = from.cols;
  const Panel<double> y{b.y, m, l, l};
  void* stream = context.stream;
  SM_LAUNCH(start_kernel, 1, 1, 0, stream, b.work.state);
  dispatch_dtype(from.dtype, [&](auto element) {
    using S = decltype(element);
    SM_LAUNCH((gather_kernel<S, double>), blocks_for(m * l), kThreads, 0, stream,
              static_cast<const S*>(from.data), from.row_stride, from.col_stride, y);
  });
  if (from.dtype == DType::f64) {  // squares of floats neither overflow nor vanish in double
    SM_LAUNCH(extremes_kernel<double>, dim3(tiles(l, 32), slab_count(m)), kThreads, 0, stream, y,
              b.extremes, b.work.state);
    SM_LAUNCH(normalize_kernel<double>, dim3(tiles(m, 256), tiles(l, 32)), kThreads, 0, stream, y,
              b.extremes, static_cast<int>(slab_count(m)));
  }
  const double eps = std::numeric_limits<T>::epsilon();
  const double growth = sizeof(T) == 8 ? 0.0 : eps * 0x1p49;
  const double noise = sizeof(T) == 8 ? 16 * eps : 0x1p-40;
  for (int pass = 0; pass < kMaxOrthPasses; ++pass)
    orth_pass(context, b.work,
              {pass, true, noise, growth, 0.0, seed, static_cast<std::uint32_t>(pass + 1)}, y, y);
  SM_LAUNCH(orth_finish_kernel<T>, blocks_for(m * l), kThreads, 0, stream, y,
            (Panel<T>{static_cast<T*>(q.data), m, l, q.row_stride}), b.work.columns, residual,
            b.work.state);
}

// A as cuBLAS reads it, or how it is converted: rows or columns side by side.
struct Stored {
  bool in_place, transposed;  // A = S^T for the stored S
  explicit Stored(const StridedMatrixView& a) {
    const bool wide = a.dtype == DType::f32 || a.dtype == DType::f64;
    const bool rows = (a.col_stride == 1 || a.cols == 1) && a.row_stride >= a.cols;
    const bool columns = (a.row_stride == 1 || a.rows == 1) && a.col_stride >= a.rows;
    in_place = wide && (rows || columns);
    transposed = in_place && !rows;
  }
};

// Rows of a panel of A that must be converted: never a copy of A as a whole.
template <class T>
std::int64_t converted_rows(const StridedMatrixView& a) {
  const std::int64_t row = std::max<std::int64_t>(a.cols, 1) * static_cast<std::int64_t>(sizeof(T));
  return std::clamp<std::int64_t>(kGramPanelBytes / row, 1, std::max<std::int64_t>(a.rows, 1));
}

template <class T>
struct GramBuffers {
  std::int64_t rows;     // of a panel
  T *p, *x, *z, *panel;  // (rows, l), (n, l) where X and Z are not as cuBLAS reads them, (rows, n)
  double* sums;          // (slabs, n)
  ScaledNorm *norms, *norm;
  void* gemm;
  std::size_t bytes;

  GramBuffers(void* base, const StridedMatrixView& a, const StridedMatrixView& x_view) {
    cuda::Arena arena(base);
    const std::int64_t n = a.cols, l = x_view.cols;
    const bool in_place = Stored(a).in_place;
    rows = in_place ? gram_panel_rows_cuda(a.rows, n, l, a.dtype) : converted_rows<T>(a);
    p = arena.take<T>(rows * l);
    x = arena.take<T>(n * l);
    z = arena.take<T>(a.dtype == dtype_of<T>() ? 0 : n * l);
    panel = arena.take<T>(in_place ? 0 : rows * n);
    sums = arena.take<double>(moment_slabs(rows, n) * n);
    norms = arena.take<ScaledNorm>(kMaxMeasures);
    norm = arena.take<ScaledNorm>(1);
    gemm = arena.take<unsigned char>(cuda::kGemmWorkspace);
    bytes = arena.used();
  }
};

template <class T>
void add_moments(const Context& context, const StridedMatrixView& a, std::int64_t first,
                 std::int64_t rows, const GramBuffers<T>& b, const GramMoments& moments) {
  dispatch_dtype(a.dtype, [&](auto element) {
    using S = decltype(element);
    const S* const data = static_cast<const S*>(a.data) + first * a.row_stride;
    if (moments.column_sums.data != nullptr && a.cols > 0) {
      const unsigned slabs = moment_slabs(b.rows, a.cols);
      const int width = a.col_stride == 1 ? 32 : 1;
      SM_LAUNCH(column_sums_kernel<S>, dim3(tiles(a.cols, width), slabs), kThreads, 0,
                context.stream, data, rows, a.cols, a.row_stride, a.col_stride, width, b.sums);
      SM_LAUNCH(add_sums_kernel, tiles(a.cols, kThreads), kThreads, 0, context.stream, b.sums,
                static_cast<int>(slabs), a.cols, first == 0,
                static_cast<double*>(moments.column_sums.data));
    }
    if (moments.norm != nullptr) {
      const unsigned count = measure_count(rows * a.cols);
      SM_LAUNCH(measure_kernel<S>, count, kThreads, 0, context.stream, data, rows, a.cols,
                a.row_stride, a.col_stride, b.norms);
      SM_LAUNCH(add_norms_kernel, 1, kThreads, 0, context.stream, b.norms, static_cast<int>(count),
                first == 0, b.norm, moments.norm);
    }
  });
}

template <class T>
struct StepBuffers {
  std::int64_t rows;  // of a panel
  T *q, *panel;       // (n, r), (rows, n)
  double* residual;
  void* orth;
  std::size_t bytes;

  StepBuffers(void* base, const RangeStep& s) {
    cuda::Arena arena(base);
    const std::int64_t m = s.a.rows, n = s.a.cols, r = s.q.cols;
    const bool in_place = Stored(s.a).in_place;
    rows = in_place ? std::max<std::int64_t>(m, 1) : converted_rows<T>(s.a);
    q = arena.take<T>(n * r);
    panel = arena.take<T>(in_place ? 0 : rows * n);
    residual = arena.take<double>(r);
    const auto size = static_cast<std::int64_t>(OrthBuffers(nullptr, std::max(m, n), r).bytes);
    orth = arena.take<unsigned char>(size);
    bytes = arena.used();
  }
};

template <class T, class S>
__global__ void __launch_bounds__(kThreads) round_kernel(Panel<T> from, Panel<S> to) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < from.rows * from.cols; i += step) {
    const std::int64_t r = i / from.cols, c = i % from.cols;
    to.data[r * to.stride + c] = from_float<S>(from.data[r * from.stride + c]);
  }
}

template <class T>
void gather(const Context& context, const StridedMatrixView& a, std::int64_t first, Panel<T> out) {
  dispatch_dtype(a.dtype, [&](auto element) {
    using S = decltype(element);
    if constexpr (sizeof(S) <= sizeof(T))
      SM_LAUNCH((gather_kernel<S, T>), blocks_for(out.rows * out.cols), kThreads, 0, context.stream,
                static_cast<const S*>(a.data) + first * a.row_stride, a.row_stride, a.col_stride,
                out);
  });
}

// Rows [first, first + rows) of A as cuBLAS reads them: where they lie, or converted.
template <class T>
class Rows {
 public:
  Rows(const Context& context, const StridedMatrixView& a, std::int64_t first, std::int64_t rows,
       T* converted, void* gemm)
      : context_(context),
        transposed_(Stored(a).transposed),
        rows_(rows),
        cols_(a.cols),
        data_(converted),
        stride_(a.cols),
        gemm_(gemm) {
    if (Stored(a).in_place) {
      stride_ = transposed_ ? a.col_stride : a.row_stride;
      data_ = static_cast<const T*>(a.data) + first * (transposed_ ? 1 : stride_);
    } else if (rows > 0) {
      gather(context, a, first, Panel<T>{converted, rows, a.cols, a.cols});
    }
  }
  // out (rows, l) = A_b x
  void multiply(Panel<T> x, Panel<T> out) const { product(transposed_, rows_, cols_, x, out, 0); }
  // out (n, l) = beta out + A_b^T y
  void multiply_transposed(Panel<T> y, Panel<T> out, double beta) const {
    product(!transposed_, cols_, rows_, y, out, beta);
  }

 private:
  void product(bool transposed, std::int64_t m, std::int64_t k, Panel<T> x, Panel<T> out,
               double beta) const {
    constexpr DType dtype = dtype_of<T>();
    cuda::gemm(context_,
               cuda::Gemm{transposed, false, m, x.cols, k, data_, stride_, x.data, x.stride,
                          out.data, out.stride, dtype, dtype, 1.0, beta},
               gemm_);
  }

  const Context& context_;
  const bool transposed_;
  const std::int64_t rows_, cols_;
  const T* data_;
  std::int64_t stride_;
  void* const gemm_;
};

// X where it lies or, with other strides or types, in `copy`.
template <class T>
Panel<T> thin_operand(const Context& context, const StridedMatrixView& x, T* copy) {
  if (x.dtype == dtype_of<T>() && x.col_stride == 1 && x.row_stride >= x.cols)
    return {const_cast<T*>(static_cast<const T*>(x.data)), x.rows, x.cols, x.row_stride};  // read
  gather(context, x, 0, Panel<T>{copy, x.rows, x.cols, x.cols});
  return {copy, x.rows, x.cols, x.cols};
}

template <class T>
void gram_matmul_as(const Context& context, const StridedMatrixView& a, const StridedMatrixView& x,
                    MatrixView z, GramMoments moments) {
  const std::int64_t m = a.rows, n = a.cols, l = x.cols;
  const GramBuffers<T> b(context.workspace, a, x);
  const bool direct = a.dtype == dtype_of<T>();
  const bool empty = n == 0 || l == 0;
  const Panel<T> right = empty ? Panel<T>{} : thin_operand(context, x, b.x);
  const Panel<T> out =
      direct ? Panel<T>{static_cast<T*>(z.data), n, l, z.row_stride} : Panel<T>{b.z, n, l, l};
  for (std::int64_t first = 0; first == 0 || first < m; first += b.rows) {
    const std::int64_t rows = std::min(b.rows, m - first);
    add_moments(context, a, first, rows, b, moments);
    if (empty) continue;
    const Rows<T> part(context, a, first, rows, b.panel, b.gemm);
    const Panel<T> p{b.p, rows, l, l};
    part.multiply(right, p);
    part.multiply_transposed(p, out, first > 0 ? 1 : 0);
  }
  if (direct || empty) return;
  dispatch_dtype(a.dtype, [&](auto element) {
    using S = decltype(element);
    if constexpr (sizeof(S) == 2 && sizeof(T) == 4)
      SM_LAUNCH((round_kernel<T, S>), blocks_for(n * l), kThreads, 0, context.stream,
                (Panel<T>{b.z, n, l, l}), (Panel<S>{static_cast<S*>(z.data), n, l, z.row_stride}));
  });
}

__global__ void finite_kernel(const State* state, double* finite) {
  *finite = state == nullptr || state->overflowed == 0;
}

template <class T>
void range_step_as(const Context& context, const RangeStep& s, std::uint64_t seed) {
  const std::int64_t m = s.a.rows, n = s.a.cols, r = s.q.cols;
  const StepBuffers<T> b(context.workspace, s);
  const OrthBuffers orth(b.orth, std::max(m, n), r);
  const Panel<T> q = thin_operand(context, s.q, b.q);
  const Panel<T> p{static_cast<T*>(s.p.data), m, r, s.p.row_stride};
  for (std::int64_t first = 0; first < m; first += b.rows) {
    const std::int64_t rows = std::min(b.rows, m - first);
    const Rows<T> part(context, s.a, first, rows, b.panel, orth.work.gemm);
    part.multiply(q, {p.data + first * p.stride, rows, r, p.stride});
  }
  orthonormalize_as<T>(context, orth, ConstMatrixView(s.p), seed, s.p, b.residual);
  for (std::int64_t first = 0; first < m; first += b.rows) {
    const std::int64_t rows = std::min(b.rows, m - first);
    const Rows<T> part(context, s.a, first, rows, b.panel, orth.work.gemm);
    part.multiply_transposed({p.data + first * p.stride, rows, r, p.stride},
                             {static_cast<T*>(s.b.data), n, r, s.b.row_stride}, first > 0 ? 1 : 0);
  }
  orthonormalize_as<T>(context, orth, ConstMatrixView(s.b), seed, s.next, b.residual);
  SM_LAUNCH(finite_kernel, 1, 1, 0, context.stream, orth.work.state, s.finite);
}

}  // namespace

void orthonormalize_cuda(const Context& context, const StridedMatrixView& y, std::uint64_t seed,
                         MatrixView q, VectorView residual) {
  const OrthBuffers b(context.workspace, y.rows, y.cols);
  if (y.dtype == DType::f64)
    orthonormalize_as<double>(context, b, y, seed, q, static_cast<double*>(residual.data));
  else
    orthonormalize_as<float>(context, b, y, seed, q, static_cast<double*>(residual.data));
}

std::size_t orthonormalize_workspace_cuda(const StridedMatrixView& y) {
  return OrthBuffers(nullptr, y.rows, y.cols).bytes;
}

void gram_matmul_cuda(const Context& context, const StridedMatrixView& a,
                      const StridedMatrixView& x, MatrixView z, GramMoments moments) {
  if (a.dtype == DType::f64)
    gram_matmul_as<double>(context, a, x, z, moments);
  else
    gram_matmul_as<float>(context, a, x, z, moments);
}

std::size_t gram_matmul_workspace_cuda(const StridedMatrixView& a, const StridedMatrixView& x) {
  return a.dtype == DType::f64 ? GramBuffers<double>(nullptr, a, x).bytes
                               : GramBuffers<float>(nullptr, a, x).bytes;
}

void range_step_cuda(const Context& context, const RangeStep& step, std::uint64_t seed) {
  if (step.q.cols == 0)
    SM_LAUNCH(finite_kernel, 1, 1, 0, context.stream, nullptr, step.finite);
  else if (step.a.dtype == DType::f64)
    range_step_as<double>(context, step, seed);
  else
    range_step_as<float>(context, step, seed);
}

std::size_t range_step_workspace_cuda(const RangeStep& step) {
  return step.a.dtype == DType::f64 ? StepBuffers<double>(nullptr, step).bytes
                                    : StepBuffers<float>(nullptr, step).bytes;
}

}  // namespace structmat
