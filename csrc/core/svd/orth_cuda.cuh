// SPDX-License-Identifier: Apache-2.0
// The small triangular factor of one pass of CholeskyQR (orth.h) on the GPU, and products
// that stand down once a panel is orthonormal: orth_factor.cpp, without the host.
#pragma once
#include "svd/panel_cuda.cuh"

namespace structmat {
namespace svd_cuda {

constexpr int kBlock = 32;

// The diagonal block D = R^T R, upper triangle, in place, and inverse <- R^-T, by one warp. A row
// with a pivot below the threshold becomes one of the identity and is marked: its column is neither
// divided by noise nor subtracted from later ones.
__device__ inline void factor_block(double (&d)[kBlock][kBlock + 1],
                                    double (&inverse)[kBlock][kBlock + 1], int* small, int size) {
  const int lane = threadIdx.x;
  for (int j = 0; j < size; ++j) {
    const double pivot = d[j][j];
    const bool tiny = !(pivot >= kPivotThreshold);
    const double root = tiny ? 1.0 : sqrt(pivot);
    __syncwarp();
    if (lane == j) {
      d[j][j] = root;
      small[j] = tiny;
    } else if (lane > j && lane < size) {
      d[j][lane] = tiny ? 0.0 : d[j][lane] / root;
    }
    __syncwarp();
    if (lane > j && lane < size)
      for (int i = j + 1; i <= lane; ++i) d[i][lane] -= d[j][i] * d[j][lane];
    __syncwarp();
  }
  if (lane < size)
    for (int i = 0; i < size; ++i) {
      double sum = i == lane ? 1.0 : 0.0;
      for (int k = lane; k < i; ++k) sum -= d[k][i] * inverse[k][lane];
      inverse[i][lane] = i < lane ? 0.0 : sum / d[i][i];
    }
  __syncwarp();
}

// a[i, c] -= sum_k r[k, i] v[k, c] for the kBlock rows of r and v, i in [i0, n), c in [c0, c1);
// with `upper` only tiles that reach c >= i. A thread makes tiles of 4 x 4.
__device__ inline void update(double* a, const double* r, const double* v, std::int64_t n,
                              std::int64_t i0, std::int64_t c0, std::int64_t c1, int depth,
                              bool upper) {
  const std::int64_t tall = (n - i0 + 3) / 4, wide = (c1 - c0 + 3) / 4;
  for (std::int64_t tile = threadIdx.x; tile < tall * wide; tile += kThreads) {
    const std::int64_t i = i0 + tile / wide * 4, c = c0 + tile % wide * 4;
    if (upper && c + 3 < i) continue;
    double sum[4][4] = {};
    for (int k = 0; k < depth; ++k) {
      double left[4], right[4];
      for (int s = 0; s < 4; ++s) {
        left[s] = i + s < n ? r[k * n + i + s] : 0.0;
        right[s] = c + s < c1 ? v[k * n + c + s] : 0.0;
      }
      for (int s = 0; s < 4; ++s)
        for (int t = 0; t < 4; ++t) sum[s][t] += left[s] * right[t];
    }
    for (int s = 0; s < 4 && i + s < n; ++s)
      for (int t = 0; t < 4 && c + t < c1; ++t) a[(i + s) * n + c + t] -= sum[s][t];
  }
}

// From G = Y^T Y (n x n): W, upper triangular, such that Y W has orthonormal columns, but for those
// too close to the span of their predecessors, which are made orthogonal to that span as far as
// rounding allows. Elimination on [G | I] gives [R | R^-T]; W = D R^-1 with D the scaling of the
// columns. One block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    factor_kernel(double* gram, double* inverse, double* scale, double* left, T* w, int* empty,
                  std::int64_t n, int pass, State* state) {
  __shared__ double d[kBlock][kBlock + 1], e[kBlock][kBlock + 1];
  __shared__ int small[kBlock], poor;  // poor: another pass is needed
  if (state->done_at < pass) return;
  if (threadIdx.x == 0) poor = pass == 0;
  __syncthreads();
  const double eps = std::numeric_limits<T>::epsilon();
  // After the first pass columns have norm 1, or what is left of 1: below 16 eps, of all passes
  // together, that is rounding (OrthFactor::factor).
  const double noise = 16 * eps;
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads) {
    const double square = gram[j * n + j];
    left[j] = pass > 0 ? left[j] * (square < 1 ? sqrt(square) : 1.0) : 1.0;
    const bool none = (pass > 0 ? !(left[j] > noise) : !(square > 0.0)) || !is_finite(square);
    if (none) left[j] = 1;
    empty[j] = none;
    scale[j] = none ? 0.0 : 1 / sqrt(square);
    if (none) poor = 1;
  }
  __syncthreads();
  for (std::int64_t k = threadIdx.x; k < n * n; k += kThreads) {
    const std::int64_t i = k / n, j = k % n;
    if (!(fabs(gram[k] - (i == j ? 1.0 : 0.0)) <= 0.1)) poor = 1;
    const bool none = empty[i] != 0 || empty[j] != 0;
    gram[k] = i == j ? 1.0 : none ? 0.0 : gram[k] * scale[i] * scale[j];
    inverse[k] = i == j ? 1.0 : 0.0;
  }
  __syncthreads();

  for (std::int64_t b = 0; b < n; b += kBlock) {
    const int size = static_cast<int>(n - b < kBlock ? n - b : kBlock);
    for (int k = threadIdx.x; k < size * size; k += kThreads)
      d[k / size][k % size] = gram[(b + k / size) * n + b + k % size];
    __syncthreads();
    if (threadIdx.x < 32) factor_block(d, e, small, size);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < size && small[threadIdx.x] != 0) poor = 1;
    // The block's rows of R (columns past the block) and of R^-T (columns up to its end), in place:
    // row i needs those before it, so the last comes first.
    double* r = gram + b * n;
    double* v = inverse + b * n;
    for (std::int64_t c = threadIdx.x; c < n; c += kThreads) {
      double* row = c >= b + size ? r : v;
      for (int i = size - 1; i >= 0; --i) {
        double sum = 0;
        for (int k = 0; k <= i; ++k) sum += e[i][k] * row[k * n + c];
        row[i * n + c] = row == r && small[i] != 0 ? 0.0 : sum;
      }
    }
    __syncthreads();
    const std::int64_t next = b + size;
    if (next < n) {
      update(gram, r, r, n, next, next, n, size, true);
      update(inverse, r, v, n, next, 0, next, size, false);
    }
    __syncthreads();
  }
  for (std::int64_t k = threadIdx.x; k < n * n; k += kThreads) {
    const std::int64_t i = k / n, j = k % n;
    w[k] = i <= j ? static_cast<T>(scale[i] * inverse[j * n + i]) : T{0};
  }
  if (threadIdx.x == 0 && poor == 0) state->done_at = pass;
}

// C = alpha op(A) B + beta C, row-major, op(A) m x k; does nothing once the panel is orthonormal.
template <bool kTransA, class In, class Out>
__global__ void __launch_bounds__(kThreads)
    guarded_gemm_kernel(std::int64_t m, std::int64_t n, std::int64_t k, Out alpha, const In* a,
                        std::int64_t lda, const In* b, std::int64_t ldb, Out beta, Out* c,
                        std::int64_t ldc, const State* state, int pass) {
  constexpr int kTile = 32, kRows = kThreads / kTile;
  __shared__ Out left[kTile][kTile + 1], right[kTile][kTile + 1];  // op(A) and B, by [k]
  if (state->done_at < pass) return;
  const int column = threadIdx.x % kTile, row = threadIdx.x / kTile;
  const std::int64_t i0 = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const std::int64_t j0 = static_cast<std::int64_t>(blockIdx.y) * kTile;
  Out sum[kTile / kRows] = {};
  for (std::int64_t k0 = 0; k0 < k; k0 += kTile) {
    for (int s = row; s < kTile; s += kRows) {
      const bool in_b = k0 + s < k && j0 + column < n;
      right[s][column] = in_b ? static_cast<Out>(b[(k0 + s) * ldb + j0 + column]) : Out{0};
      if constexpr (kTransA) {
        const bool in_a = k0 + s < k && i0 + column < m;
        left[s][column] = in_a ? static_cast<Out>(a[(k0 + s) * lda + i0 + column]) : Out{0};
      } else {
        const bool in_a = k0 + column < k && i0 + s < m;
        left[column][s] = in_a ? static_cast<Out>(a[(i0 + s) * lda + k0 + column]) : Out{0};
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
    Out value = alpha * sum[t];
    if (beta != Out{0}) value += beta * c[i * ldc + j];
    c[i * ldc + j] = value;
  }
}

}  // namespace svd_cuda
}  // namespace structmat
