// SPDX-License-Identifier: Apache-2.0
// Elementwise and reducing kernels over tall panels and over the matrix itself. Every sum and every
// maximum is taken in an order that sizes alone decide.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "ceil_div.h"
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
  return static_cast<unsigned>(std::clamp<std::int64_t>(ceil_div(count, kThreads), 1, 8192));
}
constexpr unsigned tiles(std::int64_t count, std::int64_t tile) {
  return static_cast<unsigned>(ceil_div(count, tile));
}
constexpr unsigned slab_count(std::int64_t rows) {
  return rows < 64 ? 1u : rows < 64 * kMaxSlabs ? static_cast<unsigned>(rows / 64) : kMaxSlabs;
}
constexpr unsigned measure_count(std::int64_t entries) {
  const std::int64_t blocks = entries / (8 * kThreads);
  return blocks < 1 ? 1u : blocks < kMaxMeasures ? static_cast<unsigned>(blocks) : kMaxMeasures;
}

// The entries of a matrix that fall to a thread of the grid, which has fewer than 2^32 threads,
// without a division for each: 64-bit ones, some 70 instructions, would take 16384 x 4096 entries
// 0.6 ms, which are read in 0.06.
struct Entries {
  std::int64_t row, col, rows, cols, row_step, col_step;

  __device__ Entries(std::int64_t row_count, std::int64_t col_count)
      : row(row_count), col(0), rows(row_count), cols(col_count), row_step(0), col_step(0) {
    if (cols == 0) return;
    const unsigned first = blockIdx.x * kThreads + threadIdx.x, step = gridDim.x * kThreads;
    const unsigned width = cols < 0xffffffff ? static_cast<unsigned>(cols) : 0xffffffffu;
    row = first / width;
    col = first % width;
    row_step = step / width;
    col_step = step % width;
  }
  __device__ bool left() const { return row < rows; }
  __device__ void next() {
    row += row_step;
    col += col_step;
    if (col < cols) return;
    col -= cols;
    ++row;
  }
};
constexpr int kInFlight = 4;  // entries a thread has under way where reading them is what costs

// What the kernels of one decomposition tell each other. Written without atomics: threads that
// write a flag at the same time write the same value.
struct State {
  int done_at;     // the pass that made the panel orthonormal: later ones have nothing to do
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

// partial[block] <- the norm of the block's share of a strided matrix. With a shift one entry is
// under way at a time: four of them would need more registers than there are.
template <class S, bool kShifted = false>
__global__ void __launch_bounds__(kThreads)
    measure_kernel(const S* data, std::int64_t rows, std::int64_t cols, std::int64_t row_stride,
                   std::int64_t col_stride, ScaledNorm* partial,
                   Shift<accumulator_t<S>> shift = {}) {
  const auto value = [&](S entry, std::int64_t row, std::int64_t col) {
    if constexpr (kShifted) return shift.applied(to_float(entry), row, col);
    return to_float(entry);
  };
  constexpr int in_flight = kShifted ? 1 : kInFlight;
  ScaledNorm norm{0, 0};
  for (Entries e(rows, cols); e.left();) {
    double x_of[in_flight];
    SM_UNROLL
    for (int k = 0; k < in_flight; ++k, e.next())
      x_of[k] = e.left() ? static_cast<double>(
                               value(data[e.row * row_stride + e.col * col_stride], e.row, e.col))
                         : 0.0;
    for (const double x : x_of) {
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
  }
  norm = reduce_norm(norm);
  if (threadIdx.x == 0) partial[blockIdx.x] = norm;
}

// out (rows, cols) <- the strided matrix, converted; its rows from `first` on, for the shift
template <class S, class T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const S* data, std::int64_t row_stride, std::int64_t col_stride, Panel<T> out,
                  Shift<T> shift = {}, std::int64_t first = 0) {
  for (Entries e(out.rows, out.cols); e.left();) {
    T value[kInFlight];
    Entries to = e;
    SM_UNROLL
    for (int k = 0; k < kInFlight; ++k, e.next())
      if (e.left())
        value[k] =
            shift.applied(static_cast<T>(to_float(data[e.row * row_stride + e.col * col_stride])),
                          first + e.row, e.col);
    SM_UNROLL
    for (int k = 0; k < kInFlight; ++k, to.next())
      if (to.left()) out.data[to.row * out.stride + to.col] = value[k];
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
  const std::int64_t slab = ceil_div(y.rows, gridDim.y), first = blockIdx.y * slab;
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

// Scales each column by a power of two to a largest entry in [1, 2).
template <class T>
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(Panel<T> y, const T* partial, int slabs) {
  constexpr int kRows = kThreads / 32, kTile = 256;
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

// Flips the columns of U, or the rows of Vh, where U's extreme entry is negative.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sign_kernel(Panel<T> p, bool rows, const T* partial, int slabs) {
  const std::int64_t rank = rows ? p.rows : p.cols;
  for (Entries e(p.rows, p.cols); e.left(); e.next())
    if (extreme(partial, slabs, rank, rows ? e.row : e.col) < 0)
      p.data[e.row * p.stride + e.col] *= -1;
}

}  // namespace svd_cuda
}  // namespace structmat
