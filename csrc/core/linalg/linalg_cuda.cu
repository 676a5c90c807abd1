// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cuda/arena.h"
#include "cuda/device.h"
#include "cuda/gemm.h"
#include "linalg/linalg_kernels.h"
#include "linalg/linalg_plan.h"
#include "structmat/error.h"
#include "svd/orth_solve_cuda.cuh"

namespace structmat {
namespace {

using namespace svd_cuda;

// Passes whose Gram matrix is made by cuBLAS whatever comes; later ones may stand down.
constexpr int kFastPasses = 2;

struct OrthBuffers {
  double *y, *gram, *inverse;  // (m, l), (l, l), (l, l)
  double* extremes;            // (kMaxSlabs, l)
  OrthColumns columns;
  State* state;
  void* gemm;
  std::size_t bytes;

  OrthBuffers(void* base, std::int64_t m, std::int64_t l) {
    cuda::Arena arena(base);
    y = arena.take<double>(m * l);
    gram = arena.take<double>(l * l);
    inverse = arena.take<double>(l * l);
    extremes = arena.take<double>(kMaxSlabs * l);
    for (double** column :
         {&columns.scale, &columns.pivot, &columns.size, &columns.left, &columns.residual})
      *column = arena.take<double>(l);
    columns.empty = arena.take<int>(l);
    columns.settled = arena.take<int>(l);
    state = arena.take<State>(1);
    gemm = arena.take<unsigned char>(cuda::kGemmWorkspace);
    bytes = arena.used();
  }
};

template <class T>
void orthonormalize_as(const Context& context, const StridedMatrixView& from, std::uint64_t seed,
                       MatrixView q, VectorView residual) {
  const std::int64_t m = from.rows, l = from.cols;
  const OrthBuffers b(context.workspace, m, l);
  const Panel<double> y{b.y, m, l, l};
  void* stream = context.stream;
  SM_LAUNCH(orth_start_kernel, 1, kThreads, 0, stream, b.columns, l, b.state);
  dispatch_dtype(from.dtype, [&](auto element) {
    using S = decltype(element);
    SM_LAUNCH((gather_kernel<S, double>), blocks_for(m * l), kThreads, 0, stream,
              static_cast<const S*>(from.data), from.row_stride, from.col_stride, y);
  });
  if (from.dtype == DType::f64) {  // squares of floats neither overflow nor vanish in double
    SM_LAUNCH(extremes_kernel<double>, dim3(tiles(l, 32), slab_count(m)), kThreads, 0, stream, y,
              b.extremes, b.state);
    SM_LAUNCH(normalize_kernel<double>, dim3(tiles(m, 256), tiles(l, 32)), kThreads, 0, stream, y,
              b.extremes, static_cast<int>(slab_count(m)), b.state);
  }
  const double eps = std::numeric_limits<T>::epsilon();
  const double growth = sizeof(T) == 8 ? 0.0 : eps * 0x1p49;
  const double noise = sizeof(T) == 8 ? 16 * eps : 0x1p-40;
  for (int pass = 0; pass < kMaxOrthPasses; ++pass) {
    if (pass < kFastPasses)
      cuda::gemm(
          context,
          cuda::Gemm{true, false, l, l, m, b.y, l, b.y, l, b.gram, l, DType::f64, DType::f64},
          b.gemm);
    else
      SM_LAUNCH((guarded_gemm_kernel<true, double, double>), dim3(tiles(l, 32), tiles(l, 32)),
                kThreads, 0, stream, l, l, m, 1.0, b.y, l, b.y, l, 0.0, b.gram, l, b.state, pass);
    SM_LAUNCH(orth_factor_kernel, 1, kThreads, 0, stream, b.gram, b.inverse, b.columns, l, pass,
              noise, growth, b.state);
    SM_LAUNCH(orth_solve_kernel, tiles(m, 64), kThreads, 0, stream, y, b.gram, b.columns, seed,
              static_cast<std::uint32_t>(pass + 1), b.state, pass);
  }
  SM_LAUNCH(orth_finish_kernel<T>, blocks_for(m * l), kThreads, 0, stream, y,
            (Panel<T>{static_cast<T*>(q.data), m, l, q.row_stride}), b.columns,
            static_cast<double*>(residual.data), b.state);
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
