// SPDX-License-Identifier: Apache-2.0
// A block's right vectors are the eigenvectors of its Gram matrix, A = U S Vh from A V = U S. All
// of it is done in double, one block a thread. For blocks of up to fp32 nothing is lost by
// squaring: a value is off by eps64 S[0]^2 / S[i] at most, below fp32's rounding of S[0] down to
// S[i] = 1e-8 S[0], and what is smaller than that is itself below it. Blocks of double take
// LAPACK's SVD where S[rank - 1] < S[0] / 32.
#include <algorithm>
#include <cmath>
#include <limits>

#include "blas.h"
#include "block_svd/block_svd_kernels.h"
#include "block_svd/top_eigenpairs.h"
#include "half.h"
#include "parallel.h"
#include "scratch.h"

namespace structmat {

namespace {

constexpr double kCancelled = 1e-4;  // of the energy: less is measured, not subtracted

struct Block {
  std::int64_t m, n;  // m >= n: the longer side lies along the rows of `a`
  bool transposed;    // A^T was taken
  int exponent;       // A was divided by 2^exponent
  double* a;          // (m, padded(n))
};

// Of one thread, for blocks of one size.
struct Memory {
  double *a, *gram, *vectors, *b, *u, *values, *d, *tau, *work;

  Memory(std::int64_t m, std::int64_t n, std::int64_t rank, bool whole) {
    static thread_local Scratch scratch;
    const std::int64_t row = padded(n), column = padded(m), kept = whole ? n : rank;
    const std::int64_t numbers =
        row * (m + n + kept + 2 + top_eigenpairs_work) + column * 2 * kept + padded(kept) * 2;
    double* next = (numbers > (std::int64_t{4} << 20) ? large_ : scratch).get<double>(numbers);
    const auto take = [&next](std::int64_t count) {
      double* taken = next;
      next += count;
      return taken;
    };
    a = take(m * row), gram = take(n * row), vectors = take(kept * row);
    b = take(kept * column), u = take(kept * column);
    values = take(padded(kept)), tau = take(row), d = take(row);
    work = take(top_eigenpairs_work * row);
  }

 private:
  Scratch large_;  // goes when the call ends
};

// A block into `block.a`, divided by a power of two if `scale`. False if it is not finite.
template <class T>
bool pack(const T* from, std::int64_t p, std::int64_t q, std::int64_t row_stride,
          std::int64_t col_stride, Block& block) {
  const std::int64_t stride = padded(block.n);
  if (block.transposed) {
    std::swap(p, q);
    std::swap(row_stride, col_stride);
  }
  block.exponent = 0;
  double factor = 1;
  if constexpr (std::is_same_v<T, double>) {  // whose squares could overflow
    double largest = 0;
    bool finite = true;
    for (std::int64_t i = 0; i < p; ++i)
      for (std::int64_t j = 0; j < q; ++j) {
        const double x = std::abs(from[i * row_stride + j * col_stride]);
        finite &= x <= std::numeric_limits<double>::max();
        largest = std::max(largest, x);
      }
    if (!finite) return false;
    block.exponent = largest > 0 ? std::max(std::ilogb(largest), -1022) : 0;
    factor = std::ldexp(1.0, -block.exponent);
  }
  const auto place = [&](std::int64_t i, std::int64_t j) {
    const T x = from[i * row_stride + j * col_stride];
    if constexpr (std::is_same_v<T, double>)
      block.a[i * stride + j] = x * factor;
    else
      block.a[i * stride + j] = static_cast<double>(to_float(x));
  };
  if (row_stride == 1) {
    for (std::int64_t j = 0; j < q; ++j)
      for (std::int64_t i = 0; i < p; ++i) place(i, j);
  } else if (col_stride == 1) {
    for (std::int64_t i = 0; i < p; ++i) {
      const T* row = from + i * row_stride;
      double* to = block.a + i * stride;
      for (std::int64_t j = 0; j < q; ++j) {
        if constexpr (std::is_same_v<T, double>)
          to[j] = row[j] * factor;
        else
          to[j] = static_cast<double>(to_float(row[j]));
      }
    }
  } else {
    for (std::int64_t i = 0; i < p; ++i)
      for (std::int64_t j = 0; j < q; ++j) place(i, j);
  }
  return true;
}

// The lower triangle of A^T A, and its trace.
double gram(const Block& block, double* g) {
  const std::int64_t stride = padded(block.n);
  blas::syrk(static_cast<int>(block.n), static_cast<int>(block.m), 1.0, block.a,
             static_cast<int>(stride), 0.0, g, static_cast<int>(stride));
  double trace = 0;
  for (std::int64_t i = 0; i < block.n; ++i) trace += g[i * stride + i];
  return trace;
}

// memory.vectors <- the top `rank` eigenvectors of memory.gram, which is destroyed.
bool top_vectors(const Block& block, std::int64_t rank, const Memory& memory) {
  const std::int64_t n = block.n, stride = padded(n);
  const int size = static_cast<int>(n), leading = static_cast<int>(stride);
  double* g = memory.gram;
  if (3 * rank <= 2 * n || n <= 2) {
    if (top_eigenpairs(g, n, rank, memory.values, rank, memory.vectors, memory.work)) return true;
    gram(block, g);
  }
  if (!blas::syevd(size, g, leading, memory.d)) return false;
  for (std::int64_t r = 0; r < rank; ++r)
    std::copy_n(g + (n - 1 - r) * stride, stride, memory.vectors + r * stride);
  return true;
}

// A V = U S by QR, whose R is diagonal to rounding: U is orthonormal where S vanishes, too.
void left_vectors(const Block& block, std::int64_t rank, const Memory& memory) {
  const std::int64_t m = block.m, column = padded(m);
  const int rows = static_cast<int>(m), count = static_cast<int>(rank),
            leading = static_cast<int>(column), stride = static_cast<int>(padded(block.n));
  double *b = memory.b, *u = memory.u;
  blas::gemm('T', 'N', rows, count, static_cast<int>(block.n), 1.0, block.a, stride, memory.vectors,
             stride, 0.0, b, leading);
  if (rank == 1) {
    double sum = 0;
    for (std::int64_t i = 0; i < m; ++i) sum += b[i] * b[i];
    const double length = std::sqrt(sum);
    memory.values[0] = length;
    for (std::int64_t i = 0; i < m; ++i) u[i] = length > 0 ? b[i] / length : (i == 0 ? 1.0 : 0.0);
    return;
  }
  blas::geqrf(rows, count, b, leading, memory.tau);
  std::fill_n(u, rank * column, 0.0);
  for (std::int64_t r = 0; r < rank; ++r) {
    const double x = b[r * column + r];
    memory.values[r] = std::abs(x);
    u[r * column + r] = x < 0 ? -1 : 1;
  }
  blas::ormqr(rows, count, count, b, leading, memory.tau, u, leading);
  for (std::int64_t r = 1; r < rank; ++r)  // in order but for rounding
    for (std::int64_t k = r; k > 0 && memory.values[k] > memory.values[k - 1]; --k) {
      std::swap(memory.values[k], memory.values[k - 1]);
      std::swap_ranges(u + k * column, u + (k + 1) * column, u + (k - 1) * column);
      std::swap_ranges(memory.vectors + k * stride, memory.vectors + (k + 1) * stride,
                       memory.vectors + (k - 1) * stride);
    }
}

// All triplets by LAPACK, with errors of eps64 S[0]: A = Q R, R = U S Vh.
bool whole_svd(const Block& block, const Memory& memory) {
  const std::int64_t m = block.m, n = block.n, stride = padded(n), column = padded(m);
  const int rows = static_cast<int>(m), size = static_cast<int>(n),
            leading = static_cast<int>(column), small = static_cast<int>(stride);
  double *q = memory.b, *r = memory.gram, *vt = memory.vectors;
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) q[j * column + i] = block.a[i * stride + j];
  blas::geqrf(rows, size, q, leading, memory.tau);
  const auto upper = [&] {
    for (std::int64_t j = 0; j < n; ++j)
      for (std::int64_t i = 0; i < n; ++i) r[j * stride + i] = i <= j ? q[j * column + i] : 0.0;
  };
  std::fill_n(memory.u, n * column, 0.0);
  upper();
  if (!blas::gesdd(size, r, small, memory.values, memory.u, leading, vt, small)) {
    upper();
    if (!blas::gesvd(size, r, small, memory.values, memory.u, leading, vt, small)) return false;
  }
  blas::ormqr(rows, size, size, q, leading, memory.tau, memory.u, leading);
  for (std::int64_t i = 0; i < n; ++i)  // rows of V^T by columns -> vectors by rows
    for (std::int64_t j = 0; j < i; ++j) std::swap(vt[i * stride + j], vt[j * stride + i]);
  return true;
}

// ||A - U S Vh||^2; destroys the block.
double residual(const Block& block, std::int64_t rank, const Memory& memory) {
  const std::int64_t m = block.m, n = block.n, stride = padded(n), column = padded(m);
  for (std::int64_t r = 0; r < rank; ++r)
    for (std::int64_t i = 0; i < m; ++i)
      memory.b[r * column + i] = memory.values[r] * memory.u[r * column + i];
  blas::gemm('N', 'T', static_cast<int>(n), static_cast<int>(m), static_cast<int>(rank), -1.0,
             memory.vectors, static_cast<int>(stride), memory.b, static_cast<int>(column), 1.0,
             block.a, static_cast<int>(stride));
  double sum = 0;
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) sum += block.a[i * stride + j] * block.a[i * stride + j];
  return sum;
}

// to[i * row + r * col] = from[r * stride + i]
template <class S>
void write(const double* from, std::int64_t stride, std::int64_t size, std::int64_t rank, S* to,
           std::int64_t row, std::int64_t col) {
  for (std::int64_t r = 0; r < rank; ++r)
    for (std::int64_t i = 0; i < size; ++i)
      to[i * row + r * col] = static_cast<S>(from[r * stride + i]);
}

template <class T>
void decompose(const T* a, const ConstArrayView& blocks, std::int64_t rank, accumulator_t<T>* u,
               accumulator_t<T>* s, accumulator_t<T>* vh, double* norms) {
  using S = accumulator_t<T>;
  const std::int64_t p = blocks.sizes[2], q = blocks.sizes[3];
  const std::int64_t m = std::max(p, q), n = std::min(p, q);
  constexpr bool wide = std::is_same_v<T, double>;
  const Memory memory(m, n, rank, wide);
  Block block{m, n, p < q, 0, memory.a};
  bool fine = pack(a, p, q, blocks.strides[2], blocks.strides[3], block);
  const double energy = fine ? gram(block, memory.gram) : 0;
  fine = fine && std::isfinite(energy);
  double left = 0;
  if (fine && energy > 0) {
    fine = top_vectors(block, rank, memory);
    if (fine) left_vectors(block, rank, memory);
    if (wide && fine && memory.values[rank - 1] < memory.values[0] / 32)
      fine = whole_svd(block, memory);
    left = energy;
    for (std::int64_t r = 0; r < rank; ++r) left -= memory.values[r] * memory.values[r];
    if (rank == n)
      left = 0;
    else if (fine && left < kCancelled * energy)
      left = residual(block, rank, memory);
  } else if (fine) {
    std::fill_n(memory.values, rank, 0.0);
    std::fill_n(memory.vectors, rank * padded(n), 0.0);
    std::fill_n(memory.u, rank * padded(m), 0.0);
    for (std::int64_t r = 0; r < rank; ++r)
      memory.vectors[r * padded(n) + r] = memory.u[r * padded(m) + r] = 1;
  }
  const double norm = std::ldexp(std::sqrt(energy), block.exponent);
  fine = fine && std::isfinite(norm) &&
         std::isfinite(static_cast<S>(std::ldexp(memory.values[0], block.exponent)));
  if (!fine) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    std::fill_n(u, p * rank, static_cast<S>(nan));
    std::fill_n(s, rank, static_cast<S>(nan));
    std::fill_n(vh, rank * q, static_cast<S>(nan));
    norms[0] = norms[1] = nan;
    return;
  }
  const double *long_side = memory.u, *short_side = memory.vectors;
  if (block.transposed) {
    write(short_side, padded(n), n, rank, u, rank, 1);
    write(long_side, padded(m), m, rank, vh, 1, m);
  } else {
    write(long_side, padded(m), m, rank, u, rank, 1);
    write(short_side, padded(n), n, rank, vh, 1, n);
  }
  for (std::int64_t r = 0; r < rank; ++r)
    s[r] = static_cast<S>(std::ldexp(memory.values[r], block.exponent));
  norms[0] = norm;
  norms[1] = std::ldexp(std::sqrt(std::max(left, 0.0)), block.exponent);
}

}  // namespace

void block_svd_cpu(const Context& context, const ConstArrayView& blocks, std::int64_t rank,
                   const BlockSvd& result) {
  const std::int64_t p = blocks.sizes[2], q = blocks.sizes[3];
  const std::int64_t count = blocks.sizes[0] * blocks.sizes[1];
  const std::int64_t tile = std::max<std::int64_t>(1, 2048 / (p * q));  // some 20 us
  dispatch_dtype(blocks.dtype, [&](auto element) {
    using T = decltype(element);
    using S = accumulator_t<T>;
    parallel_for(context, ceil_div(count, tile), [&](std::int64_t t) {
      for (std::int64_t i = t * tile; i < std::min(count, (t + 1) * tile); ++i) {
        const T* block = static_cast<const T*>(blocks.data) +
                         i / blocks.sizes[1] * blocks.strides[0] +
                         i % blocks.sizes[1] * blocks.strides[1];
        decompose(block, blocks, rank, static_cast<S*>(result.u) + i * p * rank,
                  static_cast<S*>(result.s) + i * rank, static_cast<S*>(result.vh) + i * rank * q,
                  result.norms + 2 * i);
      }
    });
  });
}

}  // namespace structmat
