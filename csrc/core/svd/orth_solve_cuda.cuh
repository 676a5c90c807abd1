// SPDX-License-Identifier: Apache-2.0
// Orthonormalisation (orth.h) of a panel in double on the GPU, without the host: R from the Gram
// matrix by one block, and its application by substitution. A product with R^-1 would lose what
// later columns have in common with a nearly dependent one. Double is as fast as float on the GPUs
// this is for (A100, H100: 19.5 and 67 TFLOP/s both), and makes one pass of it suffice for float
// panels of a condition up to 8,000.
#pragma once
#include "svd/orth_cuda.cuh"

namespace structmat {
namespace svd_cuda {

// Where the passes over one panel stand; one array of the panel's columns each.
struct OrthColumns {
  double *scale, *pivot, *size, *left, *residual;
  int *empty, *settled;
};

__global__ void __launch_bounds__(kThreads)
    orth_start_kernel(OrthColumns columns, std::int64_t n, State* state) {
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads) {
    columns.size[j] = 1;
    columns.left[j] = 1;
    columns.residual[j] = 0;
    columns.settled[j] = 0;
  }
  if (threadIdx.x == 0) *state = {kMaxOrthPasses, 0};
}

// G = Y^T Y (n x n, whole) becomes R, upper triangle, of Y D = Q R; OrthFactor::factor without the
// host. A row with a small pivot becomes one of the identity: pivot 0 marks it. `inverse` is work
// space. One block.
__global__ void __launch_bounds__(kThreads)
    orth_factor_kernel(double* gram, double* inverse, OrthColumns columns, std::int64_t n, int pass,
                       double noise, double growth, State* state) {
  __shared__ double d[kBlock][kBlock + 1], e[kBlock][kBlock + 1];
  __shared__ int small[kBlock], poor;  // poor: another pass is needed
  __shared__ double sums[kThreads];
  if (state->done_at < pass) return;
  if (threadIdx.x == 0) poor = 0;
  __syncthreads();
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads) {
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
    } else if (pass > 0 && columns.settled[j] == 0) {
      columns.size[j] *= sqrt(square);
    }
  }
  __syncthreads();
  for (std::int64_t k = threadIdx.x; k < n * n; k += kThreads) {
    const std::int64_t i = k / n, j = k % n;
    const bool none = columns.empty[i] != 0 || columns.empty[j] != 0;
    gram[k] = i == j ? 1.0 : none ? 0.0 : gram[k] * columns.scale[i] * columns.scale[j];
    inverse[k] = i == j ? 1.0 : 0.0;
  }
  __syncthreads();

  double mine = 0;  // this thread's share of ||R^-1||_F^2
  for (std::int64_t b = 0; b < n; b += kBlock) {
    const int size = static_cast<int>(n - b < kBlock ? n - b : kBlock);
    for (int k = threadIdx.x; k < size * size; k += kThreads)
      d[k / size][k % size] = gram[(b + k / size) * n + b + k % size];
    __syncthreads();
    if (threadIdx.x < 32) factor_block(d, e, small, size);
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < size) {
      const int i = static_cast<int>(threadIdx.x);
      columns.pivot[b + i] = small[i] != 0 ? 0.0 : d[i][i];
      if (small[i] != 0) poor = 1;
    }
    for (int k = threadIdx.x; k < size * size; k += kThreads)
      gram[(b + k / size) * n + b + k % size] = d[k / size][k % size];
    // The block's rows of R (columns past the block) and of R^-T (columns up to its end), in place:
    // row i needs those before it, so the last comes first.
    double* r = gram + b * n;
    double* v = inverse + b * n;
    for (std::int64_t c = threadIdx.x; c < n; c += kThreads) {
      const bool past = c >= b + size;
      if (!past && c >= b) {
        for (int i = 0; i < size; ++i) v[i * n + c] = e[i][c - b];
      } else {
        double* row = past ? r : v;
        for (int i = size - 1; i >= 0; --i) {
          double sum = 0;
          for (int k = 0; k <= i; ++k) sum += e[i][k] * row[k * n + c];
          row[i * n + c] = past && small[i] != 0 ? 0.0 : sum;
        }
      }
      for (int i = 0; i < size; ++i) mine += past ? 0.0 : v[i * n + c] * v[i * n + c];
    }
    __syncthreads();
    const std::int64_t next = b + size;
    if (next < n) {
      update(gram, r, r, n, next, next, n, size, true);
      update(inverse, r, v, n, next, 0, next, size, false);
    }
    __syncthreads();
  }
  sums[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  for (std::int64_t j = threadIdx.x; j < n; j += kThreads)
    if (columns.settled[j] == 0 && columns.pivot[j] > 0) {
      columns.settled[j] = 1;
      columns.residual[j] = columns.size[j] * columns.pivot[j];
    }
  const double steady = static_cast<double>(n + (n < 64 ? n : 64));
  if (threadIdx.x == 0 && poor == 0 && sums[0] <= (steady > growth ? steady : growth))
    state->done_at = pass;
}

// y <- y D R^-1, rows on their own: a block takes 64 of them, 32 columns at a time, those before
// as products with the solved ones, the triangle on the diagonal by substitution across a warp.
// Empty columns become random.
__global__ void __launch_bounds__(kThreads)
    orth_solve_kernel(Panel<double> y, const double* r, OrthColumns columns, std::uint64_t seed,
                      std::uint32_t stream, const State* state, int pass) {
  constexpr int kRowsOfBlock = 64, kWarps = kThreads / 32, kEach = kRowsOfBlock / kWarps;
  __shared__ double solved[kRowsOfBlock][33], factor[kBlock][kBlock + 1];
  if (state->done_at < pass) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t n = y.cols, first = static_cast<std::int64_t>(blockIdx.x) * kRowsOfBlock;
  for (std::int64_t b = 0; b < n; b += kBlock) {
    const std::int64_t j = b + lane;
    double sum[kEach];
    SM_UNROLL
    for (int k = 0; k < kEach; ++k) {
      const std::int64_t row = first + warp + k * kWarps;
      sum[k] = row < y.rows && j < n ? y.data[row * y.stride + j] * columns.scale[j] : 0.0;
    }
    for (std::int64_t c = 0; c < b; c += kBlock) {
      __syncthreads();
      SM_UNROLL
      for (int k = 0; k < kEach; ++k) {
        const std::int64_t row = first + warp + k * kWarps;
        solved[warp + k * kWarps][lane] = row < y.rows ? y.data[row * y.stride + c + lane] : 0.0;
      }
      for (int i = warp; i < kBlock; i += kWarps)
        factor[i][lane] = j < n ? r[(c + i) * n + j] : 0.0;
      __syncthreads();
      for (int i = 0; i < kBlock; ++i) {
        const double value = factor[i][lane];
        SM_UNROLL
        for (int k = 0; k < kEach; ++k) sum[k] -= solved[warp + k * kWarps][i] * value;
      }
    }
    __syncthreads();
    for (int i = warp; i < kBlock; i += kWarps)
      factor[i][lane] = b + i < n && j < n && i <= lane ? r[(b + i) * n + j] : (i == lane ? 1 : 0);
    __syncthreads();
    const double inverse = 1 / factor[lane][lane];
    for (int i = 0; i < kBlock && b + i < n; ++i) {
      const double value = lane > i ? factor[i][lane] : 0.0;
      SM_UNROLL
      for (int k = 0; k < kEach; ++k) {
        if (lane == i) sum[k] *= inverse;
        sum[k] -= __shfl_sync(~0u, sum[k], i) * value;
      }
    }
    const bool none = j < n && columns.empty[j] != 0;
    const double scale = 1 / sqrt(static_cast<double>(y.rows));
    SM_UNROLL
    for (int k = 0; k < kEach; ++k) {
      const std::int64_t row = first + warp + k * kWarps;
      if (row >= y.rows || j >= n) continue;
      double value = sum[k];
      if (none) {
        const Philox drawn = random_words(row, j / 4, seed, stream);
        const std::uint32_t* word = drawn.word;  // no indexing: that would need local memory
        const int which = static_cast<int>(j % 4);
        value = scale * gaussian_from_word(which < 2 ? (which == 0 ? word[0] : word[1])
                                                     : (which == 2 ? word[2] : word[3]));
      }
      y.data[row * y.stride + j] = value;
    }
  }
}

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

}  // namespace svd_cuda
}  // namespace structmat
