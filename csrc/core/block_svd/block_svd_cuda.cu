// SPDX-License-Identifier: Apache-2.0
// One-sided Jacobi, one block of the matrix a thread block: rotations from the left make the rows
// of the block (or of its transpose, the shorter side along rows) orthogonal, J A = S W^T (Hestenes
// 1958). In double, whatever the type: rows and J lie side by side in shared memory where they fit,
// up to 119 x 119 on an H100, else in the workspace.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "block_svd/block_svd_kernels.h"
#include "cuda/device.h"
#include "half.h"

namespace structmat {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kMaxSweeps = 30;                              // 4 to 8 are made
constexpr std::int64_t kMostBytes = std::int64_t{1} << 28;  // of blocks at work at once

// What a thread block works on: n rows [A | J] of m + n numbers, n norms, n places.
constexpr std::int64_t slot_bytes(std::int64_t m, std::int64_t n) {
  return n * (m + n + 2) * static_cast<std::int64_t>(sizeof(double));
}

struct Arguments {
  const void* a;
  std::int64_t count, inner;  // blocks; those of one index of the first dimension
  std::int64_t outer_stride, inner_stride;
  int n, m, rank;                       // n <= m
  std::int64_t row_stride, col_stride;  // of the block with n rows
  bool transposed;                      // that is A^T
  void *u, *s, *vh;
  double* norms;
  double* workspace;  // null: shared memory
};

__device__ double warp_sum(double value) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

// f(i, k) for i < outer and k < inner: a warp takes an i, its lanes the k.
template <class F>
__device__ void each(int outer, int inner, F&& f) {
  for (int i = threadIdx.x / 32; i < outer; i += blockDim.x / 32)
    for (int k = threadIdx.x % 32; k < inner; k += 32) f(i, k);
}

// One warp makes the first m numbers of rows p and q orthogonal; true if they were not.
__device__ bool rotate(double* p, double* q, int m, int width, double tolerance, double least) {
  const int lane = threadIdx.x % 32;
  double pp = 0, qq = 0, pq = 0;
  for (int i = lane; i < m; i += 32) {
    pp += p[i] * p[i];
    qq += q[i] * q[i];
    pq += p[i] * q[i];
  }
  pp = warp_sum(pp), qq = warp_sum(qq), pq = warp_sum(pq);
  if (pp <= least || qq <= least) return false;
  if (!(fabs(pq) > tolerance * sqrt(pp) * sqrt(qq))) return false;
  // The smaller root of t^2 + 2 zeta t - 1, whose square could overflow.
  const double zeta = (qq - pp) / (2 * pq);
  const double t = fabs(zeta) > 1e9
                       ? 1 / (2 * zeta)
                       : (zeta < 0 ? -1.0 : 1.0) / (fabs(zeta) + sqrt(1 + zeta * zeta));
  const double c = 1 / sqrt(1 + t * t), s = c * t, h = s / (1 + c);
  for (int i = lane; i < width; i += 32) {  // as Rutishauser writes c x - s y
    const double x = p[i], y = q[i];
    p[i] = x - s * (y + h * x);
    q[i] = y + s * (x - h * y);
  }
  return true;
}

// One warp: w, of m numbers, becomes a unit vector orthogonal to the `count` rows order[0], ... of
// `rows`, which are orthonormal. It starts from the unit vector nearest to their complement.
__device__ void complete(double* w, const double* rows, const double* order, std::int64_t width,
                         int count, int m) {
  const int lane = threadIdx.x % 32;
  const auto row = [&](int r) { return rows + static_cast<std::int64_t>(order[r]) * width; };
  double least = 2;
  int best = 0;
  for (int c = lane; c < m; c += 32) {
    double covered = 0;
    for (int r = 0; r < count; ++r) covered += row(r)[c] * row(r)[c];
    if (covered < least) least = covered, best = c;
  }
  for (int bits = 16; bits > 0; bits /= 2) {
    const double theirs = __shfl_xor_sync(~0u, least, bits);
    const int place = __shfl_xor_sync(~0u, best, bits);
    if (theirs < least || (theirs == least && place < best)) least = theirs, best = place;
  }
  for (int c = lane; c < m; c += 32) w[c] = c == best ? 1 : 0;
  for (int round = 0; round < 2; ++round)
    for (int r = 0; r < count; ++r) {
      double sum = 0;
      for (int c = lane; c < m; c += 32) sum += w[c] * row(r)[c];
      sum = warp_sum(sum);
      for (int c = lane; c < m; c += 32) w[c] -= sum * row(r)[c];
    }
  double square = 0;
  for (int c = lane; c < m; c += 32) square += w[c] * w[c];
  const double inverse = 1 / sqrt(warp_sum(square));
  for (int c = lane; c < m; c += 32) w[c] *= inverse;
}

template <class T>
__global__ void __launch_bounds__(kMaxWarps * 32, 2) block_svd_kernel(Arguments a) {
  using S = accumulator_t<T>;
  constexpr bool wide = std::is_same_v<T, double>;
  SM_DYNAMIC_SHARED(double, shared);
  __shared__ double partial[kMaxWarps];
  __shared__ int finite, rotated;
  const int n = a.n, m = a.m, rank = a.rank;
  const std::int64_t width = m + n;
  const int tid = threadIdx.x, threads = blockDim.x;
  const int lane = tid % 32, warp = tid / 32, warps = threads / 32;
  double* rows = a.workspace != nullptr ? a.workspace + blockIdx.x * (n * (width + 2)) : shared;
  double *lengths = rows + n * width, *order = lengths + n;

  for (std::int64_t block = blockIdx.x; block < a.count; block += gridDim.x) {
    const T* from = static_cast<const T*>(a.a) + block / a.inner * a.outer_stride +
                    block % a.inner * a.inner_stride;
    __syncthreads();
    if (tid == 0) finite = 1;
    __syncthreads();
    double largest = 0;
    const auto read = [&](int i, int k) {
      const double x = static_cast<double>(to_float(from[i * a.row_stride + k * a.col_stride]));
      rows[i * width + k] = x;
      if (!(fabs(x) <= std::numeric_limits<double>::max())) finite = 0;
      largest = fabs(x) > largest ? fabs(x) : largest;
    };
    if (a.col_stride <= a.row_stride)  // along what is contiguous
      each(n, m, read);
    else
      each(m, n, [&](int k, int i) { read(i, k); });
    each(n, n, [&](int i, int k) { rows[i * width + m + k] = i == k ? 1 : 0; });
    for (int bits = 16; bits > 0; bits /= 2) {
      const double theirs = __shfl_xor_sync(~0u, largest, bits);
      largest = theirs > largest ? theirs : largest;
    }
    if (lane == 0) partial[warp] = largest;
    __syncthreads();
    for (int w = 0; w < warps; ++w) largest = partial[w] > largest ? partial[w] : largest;
    bool fine = finite != 0;
    int exponent = 0;  // a power of two is taken out: no square overflows
    if (fine && largest > 0) exponent = ilogb(largest);
    exponent = exponent < -1022 ? -1022 : exponent;
    const double factor = ldexp(1.0, -exponent);
    double square = 0;
    each(n, m, [&](int i, int k) {
      const double x = rows[i * width + k] * factor;
      rows[i * width + k] = x;
      square += x * x;
    });
    square = warp_sum(square);
    __syncthreads();
    if (lane == 0) partial[warp] = square;
    __syncthreads();
    double energy = 0;
    for (int w = 0; w < warps; ++w) energy += partial[w];

    // Results of float need no more than 1e-9. What is below `least` is rounding of A.
    const double tolerance = wide ? 2.5e-16 * sqrt(static_cast<double>(m)) : 1e-9;
    const double least = energy * (wide ? 0x1p-120 : 0x1p-80);
    const int players = n + n % 2;  // of a round-robin tournament
    bool more = fine && energy > 0 && n > 1;
    for (int sweep = 0; more && sweep < kMaxSweeps; ++sweep) {
      __syncthreads();
      if (tid == 0) rotated = 0;
      __syncthreads();
      for (int round = 0; round < players - 1; ++round) {
        for (int pair = warp; pair < players / 2; pair += warps) {
          const int p = pair == 0 ? players - 1 : (round + pair) % (players - 1);
          const int q = (round + players - 1 - pair) % (players - 1);
          if (p >= n || q >= n) continue;
          if (rotate(rows + p * width, rows + q * width, m, width, tolerance, least) && lane == 0)
            rotated = 1;
        }
        __syncthreads();
      }
      more = rotated != 0;
    }
    fine = fine && !more;

    for (int i = warp; i < n; i += warps) {
      double sum = 0;
      for (int k = lane; k < m; k += 32) sum += rows[i * width + k] * rows[i * width + k];
      sum = warp_sum(sum);
      if (lane == 0) lengths[i] = sum > least ? sqrt(sum) : 0;
    }
    __syncthreads();
    for (int i = tid; i < n; i += threads) {  // in descending order
      const double own = lengths[i];
      int before = 0;
      for (int k = 0; k < n; ++k)
        before += lengths[k] > own || (lengths[k] == own && k < i) ? 1 : 0;
      order[fine ? before : i] = static_cast<double>(i);
    }
    __syncthreads();
    for (int r = warp; r < rank; r += warps) {
      const int i = static_cast<int>(order[r]);
      const double inverse = lengths[i] > 0 ? 1 / lengths[i] : 0;
      for (int k = lane; k < m; k += 32) rows[i * width + k] *= inverse;
    }
    __syncthreads();
    if (warp == 0 && fine)
      for (int r = 0; r < rank; ++r) {
        const int i = static_cast<int>(order[r]);
        if (lengths[i] == 0) complete(rows + i * width, rows, order, width, r, m);
      }
    __syncthreads();

    const double scale = fine ? ldexp(1.0, exponent) : std::numeric_limits<double>::quiet_NaN();
    const double one = fine ? 1 : std::numeric_limits<double>::quiet_NaN();
    S* s = static_cast<S*>(a.s) + block * rank;
    S* short_side = static_cast<S*>(a.transposed ? a.vh : a.u) + block * rank * n;
    S* long_side = static_cast<S*>(a.transposed ? a.u : a.vh) + block * rank * m;
    for (int r = tid; r < rank; r += threads)
      s[r] = static_cast<S>(lengths[static_cast<int>(order[r])] * scale);
    // U (., rank) takes vectors by columns, Vh (rank, .) by rows.
    each(rank, static_cast<int>(width), [&](int r, int k) {
      const double x = rows[static_cast<int>(order[r]) * width + k] * one;
      if (k < m)
        long_side[a.transposed ? std::int64_t{k} * rank + r : std::int64_t{r} * m + k] =
            static_cast<S>(x);
      else
        short_side[a.transposed ? r * n + k - m : (k - m) * rank + r] = static_cast<S>(x);
    });
    if (tid == 0) {
      double left = 0;
      for (int r = n - 1; r >= rank; --r) {
        const double length = lengths[static_cast<int>(order[r])];
        left += length * length;
      }
      a.norms[2 * block] = sqrt(energy) * scale;
      a.norms[2 * block + 1] = sqrt(left) * scale;
    }
  }
}

struct Launch {
  unsigned grid, threads;
  int shared_bytes;
  std::size_t workspace;
};

Launch plan(const ConstArrayView& blocks) {
  const std::int64_t n = std::min(blocks.sizes[2], blocks.sizes[3]);
  const std::int64_t m = std::max(blocks.sizes[2], blocks.sizes[3]);
  const std::int64_t count = blocks.sizes[0] * blocks.sizes[1], bytes = slot_bytes(m, n);
  const bool staged = bytes <= cuda::max_shared_bytes() - 1024;
  const std::int64_t most = staged ? 1 << 16 : std::max<std::int64_t>(1, kMostBytes / bytes);
  Launch launch{};
  launch.grid = static_cast<unsigned>(std::min(count, most));
  launch.threads = static_cast<unsigned>(std::clamp<std::int64_t>((n + 1) / 2, 1, kMaxWarps) * 32);
  launch.shared_bytes = staged ? static_cast<int>(bytes) : 0;
  launch.workspace = staged ? 0 : static_cast<std::size_t>(launch.grid) * bytes;
  return launch;
}

}  // namespace

std::size_t block_svd_workspace_cuda(const ConstArrayView& blocks, std::int64_t) {
  return plan(blocks).workspace;
}

void block_svd_cuda(const Context& context, const ConstArrayView& blocks, std::int64_t rank,
                    const BlockSvd& result) {
  const Launch launch = plan(blocks);
  Arguments a{};
  a.a = blocks.data;
  a.count = blocks.sizes[0] * blocks.sizes[1], a.inner = blocks.sizes[1];
  a.outer_stride = blocks.strides[0], a.inner_stride = blocks.strides[1];
  a.transposed = blocks.sizes[2] > blocks.sizes[3];
  const int rows = a.transposed ? 3 : 2, cols = a.transposed ? 2 : 3;
  a.n = static_cast<int>(blocks.sizes[rows]), a.row_stride = blocks.strides[rows];
  a.m = static_cast<int>(blocks.sizes[cols]), a.col_stride = blocks.strides[cols];
  a.rank = static_cast<int>(rank);
  a.u = result.u, a.s = result.s, a.vh = result.vh, a.norms = result.norms;
  a.workspace = launch.workspace > 0 ? static_cast<double*>(context.workspace) : nullptr;
  dispatch_dtype(blocks.dtype, [&](auto element) {
    using T = decltype(element);
    // Always: its static shared memory too counts to the 48 KB that a kernel may have untold.
    SM_ALLOW_SHARED(block_svd_kernel<T>);
    SM_LAUNCH(block_svd_kernel<T>, launch.grid, launch.threads, launch.shared_bytes, context.stream,
              a);
  });
}

}  // namespace structmat
