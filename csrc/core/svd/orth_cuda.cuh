// SPDX-License-Identifier: Apache-2.0
// Orthonormalisation (orth.h) of a tall panel on the GPU, in double and without the host: R from
// the Gram matrix by one block, its application by substitution. A product with R^-1 would lose
// what later columns have in common with a nearly dependent one. Passes after the one that made the
// panel orthonormal stand down.
//
// Double is as fast as float where this is meant to run (67 TFLOP/s both by cuBLAS, 34 without
// tensor cores, on an H100 or H200), and makes one pass of it suffice for float panels of a
// condition up to 8,000. A pass over 4096, 16384 and 50000 rows on an H200 of 4.8 TB/s and 132 SMs
// of 64 double FMAs a clock at 1.8 GHz takes at least, in microseconds (none of it is measured):
//
//   columns              64           144            288
//   Gram matrix       1, 2, 6      3, 10, 31    10, 41, 124   cuBLAS: 2 m n^2 FLOPs
//   R                   10            46            170       one SM, half of it waiting for pivots
//   ... without R^-T     9            32            115
//   substitution      2, 2, 7     14, 14, 43    46, 46, 139   m n^2 / 2 FMAs, a warp a scheduler
//
// A product with an explicit R^-1 would take what the Gram matrix does: at best 11 us less for up
// to 144 columns, of the 400 us of a power step with a 16384 x 4096 matrix.
#pragma once
#include <type_traits>

#include "cuda/arena.h"
#include "cuda/gemm.h"
#include "svd/panel_cuda.cuh"

namespace structmat {
namespace svd_cuda {

constexpr int kBlock = 32;
// Passes whose Gram matrix is made by cuBLAS whatever comes; kernels of later ones may stand down.
constexpr int kFastPasses = 2;

// Where the passes over one panel stand; one array of the panel's columns each.
struct OrthColumns {
  double *scale, *pivot, *size, *left, *residual;
  int *empty, *settled;
};

// x <- x - sum_k value(k) r[k]: of x a thread's own kBlock numbers, r in shared memory. For 32 FMAs
// of a warp (16 clocks of an SM) 16 words of r are broadcast and one value is read.
template <class Value>
__device__ inline void eliminate(double (&x)[kBlock], const double (&r)[kBlock][kBlock],
                                 const Value& value) {
  for (int k = 0; k < kBlock; ++k) {
    const double factor = value(k);
    SM_UNROLL
    for (int i = 0; i < kBlock; ++i) x[i] -= factor * r[k][i];
  }
}

// x <- x R^-1, R upper triangular with the given inverse pivots.
__device__ inline void substitute(double (&x)[kBlock], const double (&r)[kBlock][kBlock],
                                  const double (&inverse)[kBlock]) {
  SM_UNROLL
  for (int i = 0; i < kBlock; ++i) {
    x[i] *= inverse[i];
    SM_UNROLL
    for (int j = i + 1; j < kBlock; ++j) x[j] -= x[i] * r[i][j];
  }
}

// The block D = R^T R becomes R, its first `size` columns, by all threads: each keeps 4 entries of
// a column, and a step waits for one barrier. A row with a pivot below the threshold becomes one of
// the identity and is marked: its column is neither divided by noise nor subtracted from later
// ones.
__device__ inline void factor_block(double (&d)[kBlock][kBlock], double (&inverse)[kBlock],
                                    int (&small)[kBlock], int size) {
  constexpr int kWarps = kThreads / 32, kEach = kBlock / kWarps;
  __shared__ double rows[2][kBlock];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double own[kEach];
  SM_UNROLL
  for (int k = 0; k < kEach; ++k) own[k] = d[warp + k * kWarps][lane];
  SM_ROLLED
  for (int j = 0; j < size; ++j) {
    double* row = rows[j % 2];
    SM_UNROLL
    for (int k = 0; k < kEach; ++k)
      if (warp + k * kWarps == j) row[lane] = own[k];
    __syncthreads();
    const double pivot = row[j], mine = row[lane];
    const bool tiny = !(pivot >= kPivotThreshold);
    const double share = tiny ? 0.0 : mine / pivot;
    SM_UNROLL
    for (int k = 0; k < kEach; ++k) own[k] -= row[warp + k * kWarps] * share;
    if (warp != j % kWarps) continue;
    const double root = tiny ? 1.0 : sqrt(pivot);
    d[j][lane] = lane == j ? root : lane < j || tiny ? 0.0 : mine / root;
    if (lane != j) continue;
    inverse[j] = 1 / root;
    small[j] = tiny;
  }
  __syncthreads();
}

namespace {  // a kernel that is no template cannot be inline: each file has its own

__global__ void start_kernel(State* state) {
  *state = {kMaxOrthPasses, 0};
}

// G = Y^T Y (n x n, whole) becomes R, upper triangle, of Y D = Q R; OrthFactor::factor without the
// host. A row with a small pivot becomes one of the identity: pivot 0 marks it. R^-T, in `inverse`,
// tells whether this pass is the last; without `settles` it is not looked at. One block: a thread
// has a column of G or of R^-T, and a block of its rows at a time.
__global__ void __launch_bounds__(kThreads, 2)
    orth_factor_kernel(double* gram, double* inverse, OrthColumns columns, std::int64_t n, int pass,
                       bool settles, double noise, double growth, double kept, State* state) {
  alignas(16) __shared__ double d[kBlock][kBlock], above[kBlock][kBlock];
  __shared__ double pivots[kBlock], sums[kThreads];
  __shared__ int small[kBlock], poor;  // poor: another pass is needed
  if (pass > 0 && state->done_at < pass) return;
  if (threadIdx.x == 0) poor = settles ? 0 : 1;
  __syncthreads();
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads) {
    if (pass == 0) {
      columns.size[j] = columns.left[j] = 1;
      columns.residual[j] = 0;
      columns.settled[j] = 0;
    }
    const double square = gram[j * n + j];
    if (!is_finite(square)) state->overflowed = 1;
    if (pass > 0) columns.left[j] *= square < 1 ? sqrt(square) : 1.0;
    const bool none =
        (pass > 0 ? !(columns.left[j] > noise) : !(square > 0.0)) || !is_finite(square);
    if (none) columns.left[j] = 1;
    columns.empty[j] = none;
    columns.scale[j] = none ? 0.0 : 1 / sqrt(square);
    if (none) {
      columns.settled[j] = 1;
      columns.residual[j] = 0;
      poor = 1;
    } else if (pass > 0) {
      if (columns.settled[j] == 0) columns.size[j] *= sqrt(square);
      if (square < kept) poor = 1;
    }
  }
  __syncthreads();

  sums[threadIdx.x] = 0;  // this thread's share of ||R^-1||_F^2
  for (std::int64_t b = 0; b < n; b += kBlock) {
    const int size = static_cast<int>(n - b < kBlock ? n - b : kBlock);
    // Columns of G from the block on, then those of R^-T up to its end: those before are zero.
    const std::int64_t ahead = n - b, count = ahead + (settles ? b + size : 0);
    for (std::int64_t first = 0; first < count; first += kThreads) {
      const std::int64_t which = first + threadIdx.x;
      const bool of_gram = which < ahead, used = which < count;
      const std::int64_t c = of_gram ? b + which : which - ahead;
      double* matrix = of_gram ? gram : inverse;
      double x[kBlock];
      SM_UNROLL
      for (int i = 0; i < kBlock; ++i) {
        x[i] = b + i == c ? 1.0 : 0.0;
        if (!of_gram || i >= size || b + i == c) continue;
        const double left = columns.scale[b + i], right = columns.scale[c];
        if (left != 0 && right != 0) x[i] = gram[(b + i) * n + c] * left * right;
      }
      for (std::int64_t k0 = 0; k0 < b; k0 += kBlock) {
        __syncthreads();
        for (int k = threadIdx.x; k < kBlock * kBlock; k += kThreads)
          above[k / kBlock][k % kBlock] =
              k % kBlock < size ? gram[(k0 + k / kBlock) * n + b + k % kBlock] : 0.0;
        __syncthreads();
        if (used && (of_gram || k0 + kBlock > c))
          eliminate(x, above, [&](int k) { return matrix[(k0 + k) * n + c]; });
      }
      if (first == 0) {
        __syncthreads();
        if (which < kBlock) {
          SM_UNROLL
          for (int i = 0; i < kBlock; ++i)
            d[i][which] = i < size && which < size ? x[i] : i == which ? 1.0 : 0.0;
          pivots[which] = 1;
          small[which] = 0;
        }
        __syncthreads();
        factor_block(d, pivots, small, size);
        if (which < size) {
          columns.pivot[c] = small[which] != 0 ? 0.0 : d[which][which];
          if (small[which] != 0) poor = 1;
        }
      }
      if (!used) continue;
      substitute(x, d, pivots);
      double sum = 0;
      SM_UNROLL
      for (int i = 0; i < kBlock; ++i) {
        if (i >= size) continue;
        if (which < size)
          x[i] = d[i][which];
        else if (of_gram && small[i] != 0)
          x[i] = 0;
        else if (!of_gram)
          sum += x[i] * x[i];
        matrix[(b + i) * n + c] = x[i];
      }
      sums[threadIdx.x] += sum;
    }
  }
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads)
    if (columns.settled[j] == 0 && columns.pivot[j] > 0) {
      columns.settled[j] = 1;
      columns.residual[j] = columns.size[j] * columns.pivot[j];
    }
  if (threadIdx.x != 0) return;
  const double steady = static_cast<double>(n + (n < 64 ? n : 64));
  const bool done = poor == 0 && sums[0] <= (steady > growth ? steady : growth);
  if (pass == 0 || done) state->done_at = done ? pass : kMaxOrthPasses;
}

}  // namespace

constexpr int kSolveRows = 64;

// y <- y D R^-1, and `to`, where there is one, the same rounded. A thread has a row, 32 columns of
// it at a time in registers: those before as products with the solved ones, then the triangle on
// the diagonal. Empty columns become random. 25 KB of shared memory and 64 threads a block: 8 of
// them on an SM, and 4096 rows are 64 blocks of two warps, one a scheduler.
template <class T>
__global__ void __launch_bounds__(kSolveRows, 8)
    orth_solve_kernel(Panel<double> y, Panel<T> to, const double* r, OrthColumns columns,
                      std::uint64_t seed, std::uint32_t stream, const State* state, int pass) {
  constexpr int kWarps = kSolveRows / 32;
  alignas(16) __shared__ double factor[kBlock][kBlock];
  __shared__ double tile[kBlock][kSolveRows + 1], inverse[kBlock];  // tile: by columns
  if (state->done_at < pass) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t n = y.cols, first = static_cast<std::int64_t>(blockIdx.x) * kSolveRows;
  const auto load = [&](std::int64_t c, double scale) {
    for (int k = warp; k < kSolveRows; k += kWarps) {
      const bool inside = first + k < y.rows && c + lane < n && scale != 0;
      tile[lane][k] = inside ? y.data[(first + k) * y.stride + c + lane] * scale : 0.0;
    }
  };
  for (std::int64_t b = 0; b < n; b += kBlock) {
    const std::int64_t j = b + lane;
    double x[kBlock];
    __syncthreads();
    load(b, j < n ? columns.scale[j] : 0.0);
    __syncthreads();
    SM_UNROLL
    for (int i = 0; i < kBlock; ++i) x[i] = tile[i][threadIdx.x];
    for (std::int64_t c = 0; c < b; c += kBlock) {
      __syncthreads();
      load(c, 1.0);
      for (int i = warp; i < kBlock; i += kWarps)
        factor[i][lane] = j < n ? r[(c + i) * n + j] : 0.0;
      __syncthreads();
      eliminate(x, factor, [&](int k) { return tile[k][threadIdx.x]; });
    }
    __syncthreads();
    for (int i = warp; i < kBlock; i += kWarps) {
      const double value = b + i < n && j < n && i <= lane ? r[(b + i) * n + j] : 1.0;
      factor[i][lane] = value;
      if (i == lane) inverse[i] = 1 / value;
    }
    __syncthreads();
    substitute(x, factor, inverse);
    SM_UNROLL
    for (int i = 0; i < kBlock; ++i) tile[i][threadIdx.x] = x[i];
    __syncthreads();
    if (j >= n) continue;
    const bool none = columns.empty[j] != 0;
    const double scale = 1 / sqrt(static_cast<double>(y.rows));
    for (int k = warp; k < kSolveRows && first + k < y.rows; k += kWarps) {
      const std::int64_t row = first + k;
      double value = tile[lane][k];
      if (none) {
        const Philox drawn = random_words(row, j / 4, seed, stream);
        const std::uint32_t* word = drawn.word;  // no indexing: that would need local memory
        const int which = static_cast<int>(j % 4);
        value = scale * gaussian_from_word(which < 2 ? (which == 0 ? word[0] : word[1])
                                                     : (which == 2 ? word[2] : word[3]));
      }
      y.data[row * y.stride + j] = value;
      if constexpr (!std::is_same_v<T, double>)
        to.data[row * to.stride + j] = static_cast<T>(value);
    }
  }
}

// C = alpha op(A) B + beta C, row-major, op(A) m x k; does nothing once the panel is orthonormal.
template <bool kTransA, class T>
__global__ void __launch_bounds__(kThreads)
    guarded_gemm_kernel(std::int64_t m, std::int64_t n, std::int64_t k, T alpha, const T* a,
                        std::int64_t lda, const T* b, std::int64_t ldb, T beta, T* c,
                        std::int64_t ldc, const State* state, int pass) {
  constexpr int kTile = 32, kRows = kThreads / kTile;
  __shared__ T left[kTile][kTile + 1], right[kTile][kTile + 1];  // op(A) and B, by [k]
  if (state->done_at < pass) return;
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile;
  const std::int64_t i0 = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const std::int64_t j0 = static_cast<std::int64_t>(blockIdx.y) * kTile;
  T sum[kTile / kRows] = {};
  for (std::int64_t k0 = 0; k0 < k; k0 += kTile) {
    for (int s = row; s < kTile; s += kRows) {
      const bool in_b = k0 + s < k && j0 + column < n;
      right[s][column] = in_b ? b[(k0 + s) * ldb + j0 + column] : T{0};
      if constexpr (kTransA) {
        const bool in_a = k0 + s < k && i0 + column < m;
        left[s][column] = in_a ? a[(k0 + s) * lda + i0 + column] : T{0};
      } else {
        const bool in_a = k0 + column < k && i0 + s < m;
        left[column][s] = in_a ? a[(i0 + s) * lda + k0 + column] : T{0};
      }
    }
    __syncthreads();
    for (int s = 0; s < kTile; ++s)
      for (int t = 0; t < kTile / kRows; ++t) sum[t] += left[s][row + t * kRows] * right[s][column];
    __syncthreads();
  }
  for (int t = 0; t < kTile / kRows; ++t) {
    const std::int64_t i = i0 + row + t * kRows, j = j0 + column;
    if (i >= m || j >= n) continue;
    T value = alpha * sum[t];
    if (beta != T{0}) value += beta * c[i * ldc + j];
    c[i * ldc + j] = value;
  }
}

// Device memory and constants of the passes over panels of at most `cols` columns.
struct OrthWork {
  double *gram, *inverse;  // (cols, cols)
  OrthColumns columns;
  State* state;
  void* gemm;

  OrthWork(cuda::Arena& arena, std::int64_t cols) {
    gram = arena.take<double>(cols * cols);
    inverse = arena.take<double>(cols * cols);
    for (double** column :
         {&columns.scale, &columns.pivot, &columns.size, &columns.left, &columns.residual})
      *column = arena.take<double>(cols);
    columns.empty = arena.take<int>(cols);
    columns.settled = arena.take<int>(cols);
    state = arena.take<State>(1);
    gemm = arena.take<unsigned char>(cuda::kGemmWorkspace);
  }
};

// C = alpha op(A) B + beta C of a pass.
template <bool kTransA, class T>
void pass_gemm(const Context& context, const OrthWork& work, int pass, std::int64_t m,
               std::int64_t n, std::int64_t k, T alpha, const T* a, std::int64_t lda, const T* b,
               std::int64_t ldb, T beta, T* c, std::int64_t ldc) {
  constexpr DType dtype = dtype_of<T>();
  if (pass < kFastPasses)
    cuda::gemm(
        context,
        cuda::Gemm{kTransA, false, m, n, k, a, lda, b, ldb, c, ldc, dtype, dtype, alpha, beta},
        work.gemm);
  else
    SM_LAUNCH((guarded_gemm_kernel<kTransA, T>), dim3(tiles(m, 32), tiles(n, 32)), kThreads, 0,
              context.stream, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc, work.state, pass);
}

struct OrthPass {
  int number;
  bool settles;          // may be the last one
  double noise, growth;  // as OrthFactor::factor takes them
  double kept;           // no column's square may be less: projection left too little of it
  std::uint64_t seed;
  std::uint32_t stream;
};

// One pass over y; `to`, of another type than double, gets the result too.
template <class T>
void orth_pass(const Context& context, const OrthWork& work, const OrthPass& pass, Panel<double> y,
               Panel<T> to) {
  const std::int64_t n = y.cols;
  pass_gemm<true, double>(context, work, pass.number, n, n, y.rows, 1, y.data, y.stride, y.data,
                          y.stride, 0, work.gram, n);
  SM_LAUNCH(orth_factor_kernel, 1, kThreads, 0, context.stream, work.gram, work.inverse,
            work.columns, n, pass.number, pass.settles, pass.noise, pass.growth, pass.kept,
            work.state);
  SM_LAUNCH(orth_solve_kernel<T>, tiles(y.rows, kSolveRows), kSolveRows, 0, context.stream, y, to,
            work.gram, work.columns, pass.seed, pass.stream, work.state, pass.number);
}

}  // namespace svd_cuda
}  // namespace structmat
