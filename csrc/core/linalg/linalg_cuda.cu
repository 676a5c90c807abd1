// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/arena.h"
#include "cuda/device.h"
#include "cuda/gemm.h"
#include "linalg/linalg_kernels.h"
#include "linalg/linalg_plan.h"
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
void orthonormalize_as(const Context& context, const StridedMatrixView& from, std::uint64_t seed,
                       MatrixView q, VectorView residual) {
  const std::int64_t m = from.rows, l = from.cols;
  const OrthBuffers b(context.workspace, m, l);
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
            (Panel<T>{static_cast<T*>(q.data), m, l, q.row_stride}), b.work.columns,
            static_cast<double*>(residual.data), b.work.state);
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

template <class T>
struct GramBuffers {
  std::int64_t rows;     // of a panel
  T *p, *x, *z, *panel;  // (rows, l), (n, l) where X and Z are not as cuBLAS reads them, (rows, n)
  void* gemm;
  std::size_t bytes;

  GramBuffers(void* base, const StridedMatrixView& a, const StridedMatrixView& x_view) {
    cuda::Arena arena(base);
    const std::int64_t n = a.cols, l = x_view.cols;
    rows = gram_panel_rows_cuda(a.rows, n, l, a.dtype);
    const bool in_place = Stored(a).in_place;
    if (!in_place) {  // never a copy of A but of a panel
      const std::int64_t row = std::max<std::int64_t>(n, 1) * static_cast<std::int64_t>(sizeof(T));
      rows = std::clamp<std::int64_t>(kGramPanelBytes / row, 1, std::max<std::int64_t>(a.rows, 1));
    }
    p = arena.take<T>(rows * l);
    x = arena.take<T>(n * l);
    z = arena.take<T>(a.dtype == dtype_of<T>() ? 0 : n * l);
    panel = arena.take<T>(in_place ? 0 : rows * n);
    gemm = arena.take<unsigned char>(cuda::kGemmWorkspace);
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

template <class T>
void gram_matmul_as(const Context& context, const StridedMatrixView& a, const StridedMatrixView& x,
                    MatrixView z) {
  const std::int64_t m = a.rows, n = a.cols, l = x.cols;
  const Stored stored(a);
  const GramBuffers<T> b(context.workspace, a, x);
  constexpr DType dtype = dtype_of<T>();
  const bool direct = a.dtype == dtype;
  const T* right = b.x;
  std::int64_t right_stride = l;
  if (direct && x.col_stride == 1 && x.row_stride >= l) {
    right = static_cast<const T*>(x.data);
    right_stride = x.row_stride;
  } else {
    gather(context, x, 0, Panel<T>{b.x, n, l, l});
  }
  T* out = direct ? static_cast<T*>(z.data) : b.z;
  const std::int64_t out_stride = direct ? z.row_stride : l;
  for (std::int64_t first = 0; first == 0 || first < m; first += b.rows) {
    const std::int64_t rows = std::min(b.rows, m - first);
    const T* s = b.panel;
    std::int64_t stride = n;
    if (stored.in_place) {
      stride = stored.transposed ? a.col_stride : a.row_stride;
      s = static_cast<const T*>(a.data) + first * (stored.transposed ? 1 : stride);
    } else if (rows > 0) {
      gather(context, a, first, Panel<T>{b.panel, rows, n, n});
    }
    cuda::gemm(context,
               cuda::Gemm{stored.transposed, false, rows, l, n, s, stride, right, right_stride, b.p,
                          l, dtype, dtype},
               b.gemm);
    cuda::gemm(context,
               cuda::Gemm{!stored.transposed, false, n, l, rows, s, stride, b.p, l, out, out_stride,
                          dtype, dtype, 1.0, first > 0 ? 1.0 : 0.0},
               b.gemm);
  }
  if (direct) return;
  dispatch_dtype(a.dtype, [&](auto element) {
    using S = decltype(element);
    if constexpr (sizeof(S) == 2 && sizeof(T) == 4)
      SM_LAUNCH((round_kernel<T, S>), blocks_for(n * l), kThreads, 0, context.stream,
                (Panel<T>{b.z, n, l, l}), (Panel<S>{static_cast<S*>(z.data), n, l, z.row_stride}));
  });
}

}  // namespace

void orthonormalize_cuda(const Context& context, const StridedMatrixView& y, std::uint64_t seed,
                         MatrixView q, VectorView residual) {
  if (y.dtype == DType::f64)
    orthonormalize_as<double>(context, y, seed, q, residual);
  else
    orthonormalize_as<float>(context, y, seed, q, residual);
}

std::size_t orthonormalize_workspace_cuda(const StridedMatrixView& y) {
  return OrthBuffers(nullptr, y.rows, y.cols).bytes;
}

void gram_matmul_cuda(const Context& context, const StridedMatrixView& a,
                      const StridedMatrixView& x, MatrixView z) {
  if (a.dtype == DType::f64)
    gram_matmul_as<double>(context, a, x, z);
  else
    gram_matmul_as<float>(context, a, x, z);
}

std::size_t gram_matmul_workspace_cuda(const StridedMatrixView& a, const StridedMatrixView& x) {
  return a.dtype == DType::f64 ? GramBuffers<double>(nullptr, a, x).bytes
                               : GramBuffers<float>(nullptr, a, x).bytes;
}

}  // namespace structmat
