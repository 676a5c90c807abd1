// SPDX-License-Identifier: Apache-2.0
// Chunks of rows become float64 rows that are weighted, centred about their own mean and followed
// by one row for the distance of the means (Chan, Golub, LeVeque 1979; Ross et al., IJCV 2008).
// These join the factor, either as second moments or by an eigenvalue problem of its rows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "blas.h"
#include "half.h"
#include "parallel.h"
#include "scratch.h"
#include "streaming_svd/streaming_svd_info.h"
#include "streaming_svd/streaming_svd_kernels.h"
#include "structmat/error.h"

namespace structmat {
namespace {

constexpr std::int64_t kStrip = 64;   // columns of a chunk prepared at a time
constexpr std::int64_t kPanel = 256;  // columns of the factor made at a time

int to_int(std::int64_t size) {
  STRUCTMAT_CHECK(size <= std::numeric_limits<int>::max(),
                  "streaming_svd: " + std::to_string(size) + " columns, wanted fewer than 2^31");
  return static_cast<int>(size);
}

// body(first, last) for tiles of [0, size)
template <class Body>
void tiles(const Context& context, std::int64_t size, std::int64_t tile, Body&& body) {
  parallel_for(context, ceil_div(size, tile),
               [&](std::int64_t i) { body(i * tile, std::min(size, (i + 1) * tile)); });
}

// The upper triangle (as BLAS sees it) of a Gram matrix by blocks, one task each. The products are
// BLAS's, not those of svd/sweep_simd.h: both operands are the chunk, so that half of them suffice,
// and nothing here is a thin panel. A chunk of 128 x 256 takes a core 0.41 ms, a sweep 0.71.
template <class Block>
void upper_blocks(const Context& context, std::int64_t size, Block&& block) {
  const std::int64_t side = size >= 256 ? 128 : 64, count = ceil_div(size, side);
  parallel_for(context, count * (count + 1) / 2, [&](std::int64_t task) {
    std::int64_t j = 0;
    for (; task > j; ++j) task -= j + 1;
    const std::int64_t i0 = task * side, j0 = j * side;
    block(i0, std::min(side, size - i0), j0, std::min(side, size - j0));
  });
}

struct State {
  std::int64_t n, keep, chunk;
  bool exact;
  double *factor, *mean, *facts;

  explicit State(const StreamingSvdState& s)
      : n(s.buffer.cols),
        keep(s.factor.rows),
        chunk(s.buffer.rows),
        exact(keep == n),
        factor(static_cast<double*>(s.factor.data)),
        mean(static_cast<double*>(s.mean.data)),
        facts(static_cast<double*>(s.facts.data)) {}

  // Scratch: the factor, where it is one, the rows that join it, and the new mean. The state takes
  // it over when nothing can fail any more.
  double* rows(double* stack) const { return exact ? stack : stack + keep * n; }
  double* new_mean(double* stack) const { return stack + depth() * n; }
  double* stack() const {
    static thread_local Scratch scratch;
    return scratch.get<double>((depth() + 1) * n);
  }
  void commit(const double* stack, double largest) const {
    std::copy_n(stack + depth() * n, n, mean);
    facts[1] = largest;
  }

 private:
  std::int64_t depth() const { return (exact ? chunk : 2 * keep) + 1; }
};

// The largest magnitude in float64 rows, weighted by decay^(count - 1 - i).
double largest(const Context& context, const StridedMatrixView& rows, double decay) {
  std::vector<double> found(static_cast<std::size_t>(rows.rows), 0.0);
  parallel_for(context, rows.rows, [&](std::int64_t i) {
    const double* row = static_cast<const double*>(rows.data) + i * rows.row_stride;
    double value = 0;
    for (std::int64_t j = 0; j < rows.cols; ++j)
      value = std::max(value, std::abs(row[j * rows.col_stride]));
    found[static_cast<std::size_t>(i)] =
        value * streaming_svd_faded(decayed(decay, rows.rows - 1 - i));
  });
  return *std::max_element(found.begin(), found.end());
}

// out = the chunk in units of `unit`, weighted by decay^(count - 1 - i) and, with `center`, about
// its mean, then the row of the join; new_mean = that of all.
template <class T, class Stride>
void prepare(const Context& context, const StreamingSvdState& s, const StridedMatrixView& rows,
             const StreamingJoin& join, double unit, Stride stride, double* out, double* new_mean) {
  const State state(s);
  const std::int64_t n = state.n, count = rows.rows;
  const double inverse = 1 / unit, total = 1 / decayed_count(s.decay, count);
  std::vector<double> root(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i)
    root[static_cast<std::size_t>(i)] = decayed(s.decay, count - 1 - i);
  tiles(context, n, kStrip, [&](std::int64_t first, std::int64_t last) {
    const auto width = last - first;
    const auto row = [&](std::int64_t i) {
      return static_cast<const T*>(rows.data) + i * rows.row_stride + first * stride;
    };
    double mean[kStrip] = {};
    for (std::int64_t i = 0; i < count; ++i) {
      const T* x = row(i);
      const double weight =
          inverse * root[static_cast<std::size_t>(i)] * root[static_cast<std::size_t>(i)];
      for (std::int64_t j = 0; j < width; ++j)
        mean[j] += weight * static_cast<double>(to_float(x[j * stride]));
    }
    for (std::int64_t j = 0; j < width; ++j) mean[j] *= total;
    double distance[kStrip];
    for (std::int64_t j = 0; j < width; ++j) {
      const double earlier = state.mean[first + j] * inverse;
      distance[j] = mean[j] - earlier;
      new_mean[first + j] = (earlier + join.share * distance[j]) * unit;
      if (!s.center) mean[j] = 0;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const T* x = row(i);
      const double weight = root[static_cast<std::size_t>(i)];
      double* to = out + i * n + first;
      for (std::int64_t j = 0; j < width; ++j)
        to[j] = weight * (inverse * static_cast<double>(to_float(x[j * stride])) - mean[j]);
    }
    if (s.center)
      for (std::int64_t j = 0; j < width; ++j)
        out[count * n + first + j] = join.between * distance[j];
  });
}

// Eigenvectors by columns and eigenvalues, ascending, of a positive semidefinite matrix. Entries
// far below rounding become zero: of those near 1e-160 the squares in LAPACK's norms lose their
// digits, and with them eigenvectors were up to 20 % too long.
void eigen(std::int64_t size, double* matrix, double* energies) {
  double largest = 0;
  for (std::int64_t i = 0; i < size; ++i) largest = std::max(largest, matrix[i * (size + 1)]);
  const double least = largest * 0x1p-80;
  for (std::int64_t j = 0; j < size; ++j)
    for (std::int64_t i = 0; i <= j; ++i)
      if (std::abs(matrix[i + j * size]) < least) matrix[i + j * size] = 0;
  STRUCTMAT_CHECK(size <= kLargestProblem, "streaming_svd: an eigenvalue problem of " +
                                               std::to_string(size) + " rows, wanted at most " +
                                               std::to_string(kLargestProblem));
  if (!blas::syevd(to_int(size), matrix, to_int(size), energies))
    throw LinAlgError("streaming_svd: an eigenvalue problem did not converge");
}

// The factor of `scale` F and `count` rows of `stack` behind it.
void absorb(const Context& context, const State& s, double* stack, std::int64_t count,
            double scale) {
  const int n = to_int(s.n), depth = to_int(count);
  if (s.exact) {
    upper_blocks(context, s.n,
                 [&](std::int64_t i, std::int64_t tall, std::int64_t j, std::int64_t wide) {
                   double* to = s.factor + i + j * s.n;
                   if (i == j)
                     blas::syrk(to_int(tall), depth, 1, stack + i, n, scale * scale, to, n);
                   else
                     blas::gemm('N', 'T', to_int(tall), to_int(wide), depth, 1.0, stack + i, n,
                                stack + j, n, scale * scale, to, n);
                 });
    return;
  }
  parallel_for(context, s.keep, [&](std::int64_t i) {
    for (std::int64_t j = 0; j < s.n; ++j) stack[i * s.n + j] = scale * s.factor[i * s.n + j];
  });
  const std::int64_t size = s.keep + count;
  static thread_local Scratch scratch;
  double* gram = scratch.get<double>(size * (size + 1));
  double* energies = gram + size * size;
  const int k = to_int(size);
  upper_blocks(context, size,
               [&](std::int64_t i, std::int64_t tall, std::int64_t j, std::int64_t wide) {
                 blas::gemm('T', 'N', to_int(tall), to_int(wide), n, 1.0, stack + i * s.n, n,
                            stack + j * s.n, n, 0.0, gram + i + j * size, k);
               });
  eigen(size, gram, energies);
  double lost = 0;
  const double noise = streaming_svd_noise(size, energies[size - 1]);
  for (std::int64_t i = 0; i < count; ++i) lost += energies[i] > noise ? energies[i] : 0.0;
  s.facts[0] = scale * scale * s.facts[0] + lost;
  tiles(context, s.n, kPanel, [&](std::int64_t first, std::int64_t last) {
    blas::gemm('N', 'N', to_int(last - first), to_int(s.keep), k, 1.0, stack + first, n,
               gram + count * size, k, 0.0, s.factor + first, n);
  });
}

// One row of Vh, its entry of largest magnitude made positive, and its singular value; false where
// that is out of T's range.
template <class T>
bool write_row(const double* from, std::int64_t n, double sigma, T* to, T* s) {
  double extreme = 0;
  for (std::int64_t j = 0; j < n; ++j)
    if (std::abs(from[j]) > std::abs(extreme)) extreme = from[j];
  const double sign = extreme < 0 ? -1.0 : 1.0;
  for (std::int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(sign * from[j]);
  *s = static_cast<T>(sigma);
  return std::isfinite(*s);
}

template <class T>
void result(const Context& context, const StreamingSvdState& s, std::uint64_t seed, VectorView out,
            MatrixView vh, SvdInfo* info) {
  const State state(s);
  const std::int64_t n = state.n, k = s.rank;
  const double unit = streaming_svd_unit(state.facts[1]);
  static thread_local Scratch scratch;
  double *sigma, *rows, kept = 0, lost = state.facts[0];
  std::int64_t step;
  if (state.exact) {
    double* vectors = scratch.get<double>(n * (n + 1));
    sigma = vectors + n * n;
    std::copy_n(state.factor, n * n, vectors);
    eigen(n, vectors, sigma);
    std::reverse(sigma, sigma + n);
    for (std::int64_t i = 0; i < n; ++i) {
      const double energy = std::max(sigma[i], 0.0);
      (i < k ? kept : lost) += energy;
      sigma[i] = std::sqrt(energy);
    }
    rows = vectors + (n - 1) * n;
    step = -n;
  } else {
    rows = scratch.get<double>(k * n + state.keep * k + k);
    double* u = rows + k * n;
    sigma = u + state.keep * k;
    SvdOptions options;
    options.rank = k;
    options.oversample = state.keep - k;  // a complete basis: the decomposition is exact
    options.seed = seed;
    SvdInfo facts{};
    randomized_svd(context, ConstMatrixView(state.factor, state.keep, n), options,
                   {u, state.keep, k}, {sigma, k}, {rows, k, n}, &facts);
    for (std::int64_t i = 0; i < k; ++i) kept += sigma[i] * sigma[i];
    const double tail = facts.error * facts.norm;
    lost += tail * tail;
    step = n;
  }
  std::vector<char> in_range(static_cast<std::size_t>(k));
  parallel_for(context, k, [&](std::int64_t i) {
    in_range[static_cast<std::size_t>(i)] =
        write_row(rows + i * step, n, sigma[i] * unit, static_cast<T*>(vh.data) + i * vh.row_stride,
                  static_cast<T*>(out.data) + i);
  });
  if (!std::all_of(in_range.begin(), in_range.end(), [](char ok) { return ok != 0; }))
    throw LinAlgError("streaming_svd: a singular value exceeds the range of its type");
  const double floor =
      sigma[0] * streaming_svd_resolution(n, state.exact, std::numeric_limits<T>::epsilon());
  const auto rank = std::count_if(sigma, sigma + k, [&](double value) {
    return value > floor && static_cast<T>(value * unit) > 0;
  });
  *info = streaming_svd_info(kept, lost, static_cast<double>(rank), k == n, unit);
}

template <class T>
bool all_finite(const Context& context, const StridedMatrixView& values) {
  using S = accumulator_t<T>;
  const std::int64_t count = ceil_div(values.rows, kStrip);
  std::vector<char> finite(static_cast<std::size_t>(count));
  parallel_for(context, count, [&](std::int64_t tile) {
    constexpr int kLanes = 16;
    S sums[kLanes] = {};  // of zeros, unless a product of zero and NaN or Inf is among them
    for (std::int64_t i = tile * kStrip; i < std::min(values.rows, (tile + 1) * kStrip); ++i) {
      const T* row = static_cast<const T*>(values.data) + i * values.row_stride;
      std::int64_t j = 0;
      if (values.col_stride == 1)
        for (; j + kLanes <= values.cols; j += kLanes)
          for (int k = 0; k < kLanes; ++k) sums[k] += S{0} * to_float(row[j + k]);
      for (; j < values.cols; ++j) sums[0] += S{0} * to_float(row[j * values.col_stride]);
    }
    finite[static_cast<std::size_t>(tile)] =
        std::all_of(sums, sums + kLanes, [](S sum) { return sum == 0; });
  });
  return std::all_of(finite.begin(), finite.end(), [](char fine) { return fine != 0; });
}

}  // namespace

void streaming_svd_store_cpu(const Context& context, const StridedMatrixView& rows, MatrixView to) {
  dispatch_dtype(to.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(context, rows.rows, [&](std::int64_t i) {
      const T* from = static_cast<const T*>(rows.data) + i * rows.row_stride;
      T* out = static_cast<T*>(to.data) + i * to.row_stride;
      for (std::int64_t j = 0; j < rows.cols; ++j) out[j] = from[j * rows.col_stride];
    });
  });
}
void streaming_svd_store_cpu(const Context& context, const CsrView& rows, MatrixView to) {
  dispatch_dtype(to.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(context, rows.rows, [&](std::int64_t i) {
      T* out = static_cast<T*>(to.data) + i * to.row_stride;
      std::fill_n(out, to.cols, T{});
      for (std::int64_t k = rows.starts[i]; k < rows.starts[i + 1]; ++k)
        out[rows.columns[k]] = static_cast<const T*>(rows.values)[k];
    });
  });
}

void streaming_svd_fold_cpu(const Context& context, const StreamingSvdState& s,
                            const StridedMatrixView& rows) {
  const State state(s);
  double* stack = state.stack();
  const StreamingJoin join(s, rows.rows);
  const double now = s.buffer.dtype == DType::f64
                         ? std::max(largest(context, rows, s.decay),
                                    state.facts[1] * streaming_svd_faded(join.factor))
                         : 0.0;
  const double unit = streaming_svd_unit(now);
  dispatch_dtype(s.buffer.dtype, [&](auto element) {
    using T = decltype(element);
    if (rows.col_stride == 1)
      prepare<T>(context, s, rows, join, unit, std::integral_constant<std::int64_t, 1>{},
                 state.rows(stack), state.new_mean(stack));
    else
      prepare<T>(context, s, rows, join, unit, rows.col_stride, state.rows(stack),
                 state.new_mean(stack));
  });
  absorb(context, state, stack, rows.rows + (s.center ? 1 : 0),
         join.factor * streaming_svd_ratio(state.facts[1], now));
  state.commit(stack, now);
}

void streaming_svd_merge_cpu(const Context& context, const StreamingSvdState& s,
                             const StreamingSvdState& other) {
  const State state(s), later(other);
  const StreamingJoin join(s, other.rows - other.buffered);
  const double now = std::max(state.facts[1] * streaming_svd_faded(join.factor), later.facts[1]);
  const double unit = streaming_svd_unit(now);
  const double later_ratio = streaming_svd_ratio(later.facts[1], now);
  const std::int64_t n = state.n;
  double* stack = state.stack();
  double* rows = state.rows(stack);
  double scale = join.factor * streaming_svd_ratio(state.facts[1], now);
  if (state.exact) {
    parallel_for(context, n, [&](std::int64_t i) {
      for (std::int64_t j = i * n; j <= i * n + i; ++j)
        state.factor[j] =
            scale * scale * state.factor[j] + later_ratio * later_ratio * later.factor[j];
    });
    scale = 1;
  } else {
    parallel_for(context, later.keep, [&](std::int64_t i) {
      for (std::int64_t j = i * n; j < (i + 1) * n; ++j) rows[j] = later_ratio * later.factor[j];
    });
    rows += later.keep * n;
  }
  for (std::int64_t j = 0; j < n; ++j) {
    const double distance = later.mean[j] / unit - state.mean[j] / unit;
    rows[j] = join.between * distance;
    state.new_mean(stack)[j] = (state.mean[j] / unit + join.share * distance) * unit;
  }
  const std::int64_t center = s.center ? 1 : 0;
  absorb(context, state, stack, (state.exact ? 0 : later.keep) + center, scale);
  state.facts[0] += later_ratio * later_ratio * later.facts[0];
  state.commit(stack, now);
}

void streaming_svd_result_cpu(const Context& context, const StreamingSvdState& s,
                              std::uint64_t seed, VectorView sigma, MatrixView vh, SvdInfo* info) {
  if (sigma.dtype == DType::f64)
    result<double>(context, s, seed, sigma, vh, info);
  else
    result<float>(context, s, seed, sigma, vh, info);
}

void streaming_svd_check_cpu(const Context& context, const StridedMatrixView& values,
                             double* finite) {
  dispatch_dtype(values.dtype, [&](auto element) {
    *finite = all_finite<decltype(element)>(context, values) ? 1.0 : 0.0;
  });
}

}  // namespace structmat
