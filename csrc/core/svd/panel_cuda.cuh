// SPDX-License-Identifier: Apache-2.0
// Elementwise and reducing kernels over tall panels and over the matrix itself. Every sum and every
// maximum is taken in an order that sizes alone decide.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/device.h"
#include "half.h"
#include "random/philox.h"
#include "structmat/svd.h"
#include "svd/svd_algorithm.h"

namespace structmat {
namespace svd_cuda {

constexpr int kThreads = 256;
constexpr int kMaxSlabs = 64;       // partial results of a reduction over rows
constexpr int kMaxMeasures = 1024;  // partial norms

constexpr unsigned blocks_for(std::int64_t count) {
  return static_cast<unsigned>(
      std::clamp<std::int64_t>((count + kThreads - 1) / kThreads, 1, 8192));
}
constexpr unsigned tiles(std::int64_t count, std::int64_t tile) {
  return static_cast<unsigned>((count + tile - 1) / tile);
}
constexpr unsigned slab_count(std::int64_t rows) {
  return rows < 64 ? 1u : rows < 64 * kMaxSlabs ? static_cast<unsigned>(rows / 64) : kMaxSlabs;
}
constexpr unsigned measure_count(std::int64_t entries) {
  const std::int64_t blocks = entries / (8 * kThreads);
  return blocks < 1 ? 1u : blocks < kMaxMeasures ? static_cast<unsigned>(blocks) : kMaxMeasures;
}

// What the kernels of one decomposition tell each other. Written without atomics: threads that
// write a flag at the same time write the same value.
struct State {
  int done_at;     // the pass that makes the panel orthonormal: later ones have nothing to do
  int overflowed;  // a product left the range of its type
};

// A Euclidean norm as scale * sqrt(sum): squares neither overflow nor vanish.
struct ScaledNorm {
  double scale, sum;
};

__device__ inline bool is_finite(double x) {
  return fabs(x) <= std::numeric_limits<double>::max();
}

__device__ inline ScaledNorm combine(ScaledNorm a, ScaledNorm b) {
  if (b.scale > a.scale) {
    const ScaledNorm swap = a;
    a = b;
    b = swap;
  }
  if (b.scale > 0) {
    const double ratio = b.scale / a.scale;
    a.sum += b.sum * ratio * ratio;
  }
  return a;
}

// The sum over the block's threads, at thread 0.
__device__ inline ScaledNorm reduce_norm(ScaledNorm mine) {
  __shared__ ScaledNorm all[kThreads];
  all[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half)
      all[threadIdx.x] = combine(all[threadIdx.x], all[threadIdx.x + half]);
  }
  __syncthreads();
  return all[0];
}

// What is subtracted from a matrix as it is read, if anything: a number per column or per row.
template <class T>
struct Shift {
  const T *high = nullptr, *low = nullptr;
  bool of_rows = false;

  __device__ T applied(T x, std::int64_t row, std::int64_t col) const {
    if (high == nullptr) return x;
    const std::int64_t i = of_rows ? row : col;
    return (x - high[i]) - low[i];
  }
};

// partial[block] <- the norm of the block's share of a strided matrix
template <class S>
__global__ void __launch_bounds__(kThreads)
    measure_kernel(const S* data, std::int64_t rows, std::int64_t cols, std::int64_t row_stride,
                   std::int64_t col_stride, ScaledNorm* partial,
                   Shift<accumulator_t<S>> shift = {}) {
  ScaledNorm norm{0, 0};
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads, count = rows * cols;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    const std::int64_t r = i / cols, c = i % cols;
    const double x =
        static_cast<double>(shift.applied(to_float(data[r * row_stride + c * col_stride]), r, c));
    if constexpr (sizeof(S) < 8) {  // squares of a float fit a double
      norm.scale = 1;
      norm.sum += x * x;
    } else if (!is_finite(x)) {
      norm = {1, x - x};
    } else if (x != 0) {
      if (fabs(x) > norm.scale * 0x1p100 || norm.scale == 0)
        norm = combine(norm, {ldexp(1.0, ilogb(x)), 0});
      const double y = x / norm.scale;
      norm.sum += y * y;
    }
  }
  norm = reduce_norm(norm);
  if (threadIdx.x == 0) partial[blockIdx.x] = norm;
}

// out (rows, cols) <- the strided matrix, converted; its rows from `first` on, for the shift
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const S* data, std::int64_t row_stride, std::int64_t col_stride, Panel<T> out,
                  Shift<T> shift = {}, std::int64_t first = 0) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < out.rows * out.cols; i += step) {
    const std::int64_t r = i / out.cols, c = i % out.cols;
    const T x = static_cast<T>(to_float(data[r * row_stride + c * col_stride]));
    out.data[r * out.stride + c] = shift.applied(x, first + r, c);
  }
}

// partial[slab, j] <- the entry of largest magnitude (the first of equals) of column j in a slab of
// rows. A block looks at 32 columns of a slab. An entry out of range is told to `state`.
template <class T>
__global__ void __launch_bounds__(kThreads) extremes_kernel(Panel<T> y, T* partial, State* state) {
  constexpr int kRows = kThreads / 32;
  __shared__ T best[kRows][32];
  __shared__ std::int64_t where[kRows][32];
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * 32 + lane;
  const std::int64_t slab = (y.rows + gridDim.y - 1) / gridDim.y, first = blockIdx.y * slab;
  const std::int64_t last = first + slab < y.rows ? first + slab : y.rows;
  T value = 0;
  std::int64_t at = y.rows;
  if (j < y.cols)
    for (std::int64_t r = first + row; r < last; r += kRows) {
      const T x = y.data[r * y.stride + j];
      if (!is_finite(static_cast<double>(x))) state->overflowed = 1;
      if (fabs(x) > fabs(value)) {
        value = x;
        at = r;
      }
    }
  best[row][lane] = value;
  where[row][lane] = at;
  __syncthreads();
  if (row > 0 || j >= y.cols) return;
  for (int k = 1; k < kRows; ++k) {
    const T x = best[k][lane];
    if (fabs(x) > fabs(value) || (fabs(x) == fabs(value) && where[k][lane] < at)) {
      value = x;
      at = where[k][lane];
    }
  }
  partial[blockIdx.y * y.cols + j] = value;
}

// The entry of largest magnitude of column j, from its partial results.
template <class T>
__device__ T extreme(const T* partial, int slabs, std::int64_t cols, std::int64_t j) {
  T value = 0;
  for (int slab = 0; slab < slabs; ++slab) {
    const T x = partial[slab * cols + j];
    if (fabs(x) > fabs(value)) value = x;
  }
  return value;
}

// Scales each column by a power of two to a largest entry in [1, 2). Starts an orthonormalisation.
template <class T>
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(Panel<T> y, const T* partial, int slabs, State* state) {
  constexpr int kRows = kThreads / 32, kTile = 256;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) state->done_at = kMaxOrthPasses;
  const std::int64_t j = static_cast<std::int64_t>(blockIdx.y) * 32 + threadIdx.x % 32;
  if (j >= y.cols) return;
  const T value = extreme(partial, slabs, y.cols, j);
  if (value == 0 || !is_finite(static_cast<double>(value))) return;
  const int exponent = -ilogb(value);
  const int limit = std::numeric_limits<T>::max_exponent - 1;
  const T scale = static_cast<T>(ldexp(1.0, exponent < limit ? exponent : limit));
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const std::int64_t last = first + kTile < y.rows ? first + kTile : y.rows;
  for (std::int64_t r = first + threadIdx.x / 32; r < last; r += kRows)
    y.data[r * y.stride + j] *= scale;
}

// y <- product, but for empty columns, which become random.
template <class T>
__global__ void __launch_bounds__(kThreads)
    refill_kernel(Panel<T> y, const T* product, const int* empty, std::uint64_t seed,
                  std::uint32_t stream, const State* state, int pass) {
  if (state->done_at < pass) return;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const T scale = static_cast<T>(1 / sqrt(static_cast<double>(y.rows)));
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < y.rows * y.cols; i += step) {
    const std::int64_t r = i / y.cols, j = i % y.cols;
    T value = product[i];
    if (empty[j] != 0) {
      const Philox drawn = random_words(r, j / 4, seed, stream);
      const int k = static_cast<int>(j % 4);
      const std::uint32_t* word = drawn.word;  // no indexing by k: that would need local memory
      value = scale * gaussian_from_word(k < 2 ? (k == 0 ? word[0] : word[1])
                                               : (k == 2 ? word[2] : word[3]));
    }
    y.data[r * y.stride + j] = value;
  }
}

// Flips the columns of U, or the rows of Vh, where U's extreme entry is negative.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sign_kernel(Panel<T> p, bool rows, const T* partial, int slabs) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t rank = rows ? p.rows : p.cols;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
       i < p.rows * p.cols; i += step) {
    const std::int64_t r = i / p.cols, c = i % p.cols;
    if (extreme(partial, slabs, rank, rows ? r : c) < 0) p.data[r * p.stride + c] *= -1;
  }
}

}  // namespace svd_cuda
}  // namespace structmat
