// SPDX-License-Identifier: Apache-2.0
// The SVD of a small square matrix R (n x n) by one-sided block Jacobi (Demmel, Veselic, SIAM J.
// Matrix Anal. Appl. 13, 1992): rotations from the left make R's rows orthogonal, J R = S W^T, R =
// J^T S W^T. Rows are cut into groups; every launch pairs all groups, one pair a block, and each
// warp rotates two rows at a time. A sweep that rotates nothing ends the work: launches after it
// return at once.
#pragma once
#include "svd/panel_cuda.cuh"

namespace structmat {
namespace svd_cuda {

constexpr int kMaxGroup = 16;      // rows of a group: 16 warps rotate the 32 rows of a pair
constexpr int kJacobiSweeps = 16;  // 5 to 10 are made

struct JacobiPlan {
  int group, groups;  // rows in a group; groups, an even number
  bool staged;        // a pair's rows fit into shared memory
  int shared_bytes;
};

template <class T>
JacobiPlan plan_jacobi(std::int64_t n, int max_shared) {
  JacobiPlan plan{};
  plan.group = kMaxGroup;
  if (n <= 2 * kMaxGroup) plan.group = static_cast<int>((n + 1) / 2);
  const auto bytes = [&](int group) {
    return 4 * group * n * static_cast<std::int64_t>(sizeof(T));
  };
  while (plan.group > 4 && bytes(plan.group) > max_shared) plan.group /= 2;
  plan.staged = bytes(plan.group) <= max_shared;
  if (!plan.staged) plan.group = kMaxGroup;
  const std::int64_t groups = ceil_div(n, plan.group);
  plan.groups = static_cast<int>(groups + groups % 2);
  plan.shared_bytes = plan.staged ? static_cast<int>(bytes(plan.group)) : 0;
  return plan;
}

// R <- R 2^-e with a largest entry in [1, 2), so that no square overflows; J <- I, no sweep has
// rotated. One block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    jacobi_start_kernel(T* r, T* j, std::int64_t n, T* scale, int* rotated, State* state) {
  __shared__ T largest[kThreads];
  T mine = 0;
  for (std::int64_t i = threadIdx.x; i < n * n; i += kThreads) {
    const T x = fabs(r[i]);
    if (!is_finite(static_cast<double>(x))) state->overflowed = 1;
    mine = x > mine ? x : mine;
    j[i] = i / n == i % n ? T{1} : T{0};
  }
  if (threadIdx.x < kJacobiSweeps) rotated[threadIdx.x] = 0;
  largest[threadIdx.x] = mine;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half && largest[threadIdx.x + half] > largest[threadIdx.x])
      largest[threadIdx.x] = largest[threadIdx.x + half];
  }
  __syncthreads();
  const T top = largest[0];
  int exponent = top > 0 && is_finite(static_cast<double>(top)) ? ilogb(top) : 0;
  const int limit = std::numeric_limits<T>::max_exponent - 1;
  exponent = exponent < -limit ? -limit : exponent;
  const T factor = static_cast<T>(ldexp(1.0, -exponent));
  for (std::int64_t i = threadIdx.x; i < n * n; i += kThreads) r[i] *= factor;
  if (threadIdx.x == 0) *scale = static_cast<T>(ldexp(1.0, exponent));
}

// R's largest entry is one or two: a row whose square is below this is zero next to it, and the
// square loses digits, so that a pair would be rotated for ever.
template <class T>
constexpr T least_square() {
  return std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
}

template <class T>
__device__ T warp_sum(T value) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(~0u, value, bits);
  return value;
}

// One warp makes rows p and q of R orthogonal and turns those of J along; true if it had to.
template <class T>
__device__ bool rotate(T* rp, T* rq, T* jp, T* jq, std::int64_t n, T tolerance, T least) {
  const int lane = threadIdx.x % 32;
  T pp = 0, qq = 0, pq = 0;
  for (std::int64_t i = lane; i < n; i += 32) {
    const T x = rp[i], y = rq[i];
    pp += x * x;
    qq += y * y;
    pq += x * y;
  }
  pp = warp_sum(pp);
  qq = warp_sum(qq);
  pq = warp_sum(pq);
  if (pp < least || qq < least) return false;
  if (!(fabs(pq) > tolerance * sqrt(pp) * sqrt(qq))) return false;
  // The smaller root of t^2 + 2 zeta t - 1.
  const T zeta = (qq - pp) / (2 * pq);
  const T t = fabs(zeta) > T(1e9)
                  ? 1 / (2 * zeta)  // its square could overflow
                  : (zeta < 0 ? T{-1} : T{1}) / (fabs(zeta) + sqrt(1 + zeta * zeta));
  const T c = 1 / sqrt(1 + t * t), s = c * t, h = s / (1 + c);
  // x - s (y + h x) for c x - s y: the rounding of a small rotation is small (Rutishauser), so that
  // thousands of them leave lengths as they were.
  for (std::int64_t i = lane; i < n; i += 32) {
    const T x = rp[i], y = rq[i], u = jp[i], v = jq[i];
    rp[i] = x - s * (y + h * x);
    rq[i] = y + s * (x - h * y);
    jp[i] = u - s * (v + h * u);
    jq[i] = v + s * (u - h * v);
  }
  return true;
}

// Round `round` of a sweep: blocks take the pairs of groups of a round-robin tournament. In the
// first round all pairs of rows are rotated, in the others those with one row in each group.
template <class T>
__global__ void __launch_bounds__(kMaxGroup * 32)
    jacobi_kernel(T* r, T* j, std::int64_t n, int group, int groups, int round, int sweep,
                  bool staged, T least, int* rotated) {
  SM_DYNAMIC_SHARED(T, shared);
  if (sweep > 0 && rotated[sweep - 1] == 0) return;
  const int players = groups - 1, block = static_cast<int>(blockIdx.x);
  const int a = block == 0 ? players : (round + block) % players;
  const int b = (round + players - block) % players;
  const int count = 2 * group, warps = blockDim.x / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Row k of the pair, or one past the end.
  const auto row = [&](int k) {
    return static_cast<std::int64_t>(k < group ? a : b) * group + k % group;
  };
  if (staged) {
    for (int k = warp; k < count; k += warps)
      if (row(k) < n)
        for (std::int64_t i = lane; i < n; i += 32) {
          shared[2 * k * n + i] = r[row(k) * n + i];
          shared[(2 * k + 1) * n + i] = j[row(k) * n + i];
        }
    __syncthreads();
  }
  const T tolerance = std::numeric_limits<T>::epsilon() * sqrt(static_cast<T>(n));
  bool any = false;
  const int steps = round == 0 ? count - 1 : group;
  for (int step = 0; step < steps; ++step) {
    for (int pair = warp; pair < group; pair += warps) {
      int p = pair, q = group + (pair + step) % group;
      if (round == 0) {
        p = pair == 0 ? count - 1 : (step + pair) % (count - 1);
        q = (step + count - 1 - pair) % (count - 1);
      }
      if (row(p) >= n || row(q) >= n) continue;
      if (staged)
        any |= rotate(shared + 2 * p * n, shared + 2 * q * n, shared + (2 * p + 1) * n,
                      shared + (2 * q + 1) * n, n, tolerance, least);
      else
        any |= rotate(r + row(p) * n, r + row(q) * n, j + row(p) * n, j + row(q) * n, n, tolerance,
                      least);
    }
    __syncthreads();
  }
  if (any && lane == 0) rotated[sweep] = 1;
  if (staged)
    for (int k = warp; k < count; k += warps)
      if (row(k) < n)
        for (std::int64_t i = lane; i < n; i += 32) {
          r[row(k) * n + i] = shared[2 * k * n + i];
          j[row(k) * n + i] = shared[(2 * k + 1) * n + i];
        }
}

// norms[i] <- the length of row i of R = S W^T; R <- W^T, zero where S is. One warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads) row_norms_kernel(T* r, std::int64_t n, T* norms) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (i >= n) return;
  T sum = 0;
  for (std::int64_t k = threadIdx.x % 32; k < n; k += 32) sum += r[i * n + k] * r[i * n + k];
  const T norm = sqrt(warp_sum(sum));
  const T inverse = norm > std::numeric_limits<T>::min() ? 1 / norm : T{0};
  for (std::int64_t k = threadIdx.x % 32; k < n; k += 32) r[i * n + k] *= inverse;
  if (threadIdx.x % 32 == 0) norms[i] = norm;
}

// place[i] <- where singular value i comes in descending order, and it goes there. One warp a
// value.
template <class T>
__global__ void __launch_bounds__(kThreads)
    place_kernel(const T* norms, const T* scale, int n, int* place, T* sigma) {
  const int i = static_cast<int>(blockIdx.x) * (kThreads / 32) + static_cast<int>(threadIdx.x) / 32;
  if (i >= n) return;
  const T own = norms[i];
  int before = 0;
  for (int other = threadIdx.x % 32; other < n; other += 32) {
    const T theirs = norms[other];
    before += theirs > own || (theirs == own && other < i) ? 1 : 0;
  }
  before = warp_sum(before);
  if (threadIdx.x % 32 != 0) return;
  place[i] = before;
  sigma[before] = own * *scale;
}

// The vectors of the first k singular values into the columns of w and p (n x k): rows of R = W^T
// and of J. One block a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sort_kernel(const T* r, const T* j, const int* place, std::int64_t n, std::int64_t k, T* w,
                T* p) {
  const std::int64_t i = blockIdx.x, column = place[i];
  if (column >= k) return;
  for (std::int64_t c = threadIdx.x; c < n; c += kThreads) {
    w[c * k + column] = r[i * n + c];
    p[c * k + column] = j[i * n + c];
  }
}

// Device memory of one decomposition. r is destroyed; left and right are (n, k).
template <class T>
struct Jacobi {
  T *r, *j, *norms, *sigma, *unit, *left, *right;  // (n, n), (n, n), (n), (n), (1)
  int *place, *rotated;                            // (n), (kJacobiSweeps)
  State* state;
};

// R = P diag(sigma) W^T: sigma descending, left <- W_k, right <- P_k. Rows of R, its largest entry
// one or two, whose square is below `least` are left alone.
template <class T>
void jacobi_svd(void* stream, const Jacobi<T>& b, std::int64_t n, std::int64_t k, T least) {
  SM_LAUNCH(jacobi_start_kernel<T>, 1, kThreads, 0, stream, b.r, b.j, n, b.unit, b.rotated,
            b.state);
  const JacobiPlan plan = plan_jacobi<T>(n, cuda::max_shared_bytes());
  SM_ALLOW_SHARED(jacobi_kernel<T>);
  for (int sweep = 0; sweep < kJacobiSweeps; ++sweep)
    for (int round = 0; round < plan.groups - 1; ++round)
      SM_LAUNCH(jacobi_kernel<T>, static_cast<unsigned>(plan.groups / 2),
                static_cast<unsigned>(32 * plan.group), plan.shared_bytes, stream, b.r, b.j, n,
                plan.group, plan.groups, round, sweep, plan.staged, least, b.rotated);
  SM_LAUNCH(row_norms_kernel<T>, tiles(n, kThreads / 32), kThreads, 0, stream, b.r, n, b.norms);
  SM_LAUNCH(place_kernel<T>, tiles(n, kThreads / 32), kThreads, 0, stream, b.norms, b.unit,
            static_cast<int>(n), b.place, b.sigma);
  SM_LAUNCH(sort_kernel<T>, static_cast<unsigned>(n), kThreads, 0, stream, b.r, b.j, b.place, n, k,
            b.left, b.right);
}

}  // namespace svd_cuda
}  // namespace structmat
