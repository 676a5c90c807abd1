// SPDX-License-Identifier: Apache-2.0
// The smallest singular triplets of B (tall x small), on the CPU: B = Q R by reflections (a basis
// of orthonormalize, whose R may be far from triangular where B is singular without a small pivot,
// would not do), then inverse subspace
// iteration W = orth(R^-T X), X = orth(R^-1 W) in double until the residuals are rounding; where
// they would not get there soon, all of R is decomposed. Golub and Van Loan, Matrix Computations,
// 4th ed., 8.2.3; the residual test of Parlett, The Symmetric Eigenvalue Problem, 4.5.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "blas.h"
#include "linalg/linalg_kernels.h"
#include "random/random_kernels.h"
#include "structmat/error.h"
#include "svd/operand_cpu.h"
#include "svd/orth_cpu.h"

namespace structmat {
namespace {

constexpr std::int64_t kSteps = 40;  // at most; else the whole R is decomposed
constexpr std::int64_t kCheck = 4;   // steps from one look at the residuals to the next

int to_int(std::int64_t size) {
  return static_cast<int>(size);
}
template <class T>
Panel<T> panel(const std::unique_ptr<T[]>& data, std::int64_t rows, std::int64_t cols) {
  return {data.get(), rows, cols, cols};
}
template <class T>
Operand<T> operand(const Context& context, const T* data, std::int64_t rows, std::int64_t cols) {
  return {context, {data, dtype_of<T>(), rows, cols, cols, 1}};
}
// The largest norm of a column.
double largest_column(const double* a, std::int64_t rows, std::int64_t cols) {
  std::vector<double> squares(static_cast<std::size_t>(cols));
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < cols; ++j)
      squares[static_cast<std::size_t>(j)] += a[i * cols + j] * a[i * cols + j];
  return std::sqrt(*std::max_element(squares.begin(), squares.end()));
}

// How many more steps, at the rate of those since the last look.
double steps_left(double before, double now, double tolerance, std::int64_t step) {
  if (!(now < before)) return std::numeric_limits<double>::infinity();
  const auto since = static_cast<double>(step > kCheck ? kCheck : kCheck - 2);
  return since * std::log(now / tolerance) / std::log(before / now);
}

// The triplets of the `rank` smallest singular values of R (n, n), upper triangular, in double.
template <class T>
class Triangle {
 public:
  // rt (n, n): R^T by rows, that is R by columns.
  Triangle(const Context& context, const T* rt, std::int64_t n, std::int64_t rank)
      : context_(context),
        n_(n),
        k_(rank),
        rt_(scratch<double>(n * n)),
        safe_(scratch<double>(n * n)),
        narrow_(rt),
        u(scratch<double>(n * rank)),
        v(scratch<double>(n * rank)),
        s(scratch<double>(rank)) {
    for (std::int64_t j = 0; j < n; ++j) {
      double square = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        const double value = i <= j ? static_cast<double>(rt[j * n + i]) : 0.0;
        rt_[j * n + i] = value;
        square += value * value;
      }
      scale = std::max(scale, std::sqrt(square));
      norm += square;
    }
    norm = std::sqrt(norm);
  }

  void find(std::int64_t width, std::uint64_t seed) {
    // A zero on the diagonal moves by rounding: no singular value moves by more.
    const double floor = std::numeric_limits<double>::epsilon() * scale;
    std::copy_n(rt_.get(), n_ * n_, safe_.get());
    for (std::int64_t j = 0; j < n_; ++j)
      if (std::abs(safe_[j * n_ + j]) < floor) safe_[j * n_ + j] = floor;
    if (2 * width < n_ && scale > 0 && iterate(width, seed)) return;
    steps = 0;
    decompose(false);
    // OpenBLAS's divide and conquer can leave 30 eps ||R|| in a last triplet far below the others.
    if (residual > tolerance_ * scale) decompose(true);
  }

 private:
  bool iterate(std::int64_t l, std::uint64_t seed) {
    const auto x_data = scratch<double>(n_ * l), w_data = scratch<double>(n_ * l);
    const Panel<double> x = panel(x_data, n_, l), w = panel(w_data, n_, l);
    fill_gaussian_cpu(context_, {x.data, DType::f64, n_, l, l}, seed, 0);
    OrthCpu<double> orth(context_, l, seed);
    const std::int64_t budget = std::min(kSteps, 2 * n_ / l);
    double before = std::numeric_limits<double>::infinity();
    for (std::int64_t done = 1; done <= budget; ++done) {
      if (!step(w, x, orth)) return false;
      if (done != 2 && done % kCheck != 0) continue;
      rotate(w, x, orth);
      const double now = residual / scale;
      steps = done;
      if (now <= tolerance_) return true;
      const auto left = static_cast<double>(budget - done);
      if (done >= kCheck && steps_left(before, now, tolerance_, done) > left) return false;
      before = now;
    }
    return false;
  }

  // w <- orth(R^-T x), x <- orth(R^-1 w); false where a solution leaves the range of double.
  bool step(Panel<double> w, Panel<double> x, OrthCpu<double>& orth) const {
    for (const bool plain : {false, true}) {
      const Panel<double> from = plain ? w : x, to = plain ? x : w;
      std::copy_n(from.data, n_ * x.cols, to.data);
      solve(safe_.get(), to, plain);
      std::uint32_t stream = 0;
      if (!orth.orthonormalize(to, to, {}, kMaxOrthPasses, stream)) return false;
    }
    return true;
  }

  // y <- R^-T y, or R^-1 y; columns of y on their own, a few at a time.
  void solve(const double* r, Panel<double> y, bool plain) const {
    constexpr std::int64_t kColumns = 16;
    parallel_for(context_, ceil_div(y.cols, kColumns), [&](std::int64_t i) {
      const std::int64_t first = i * kColumns, count = std::min(kColumns, y.cols - first);
      blas::trsm(plain ? 'T' : 'N', to_int(count), to_int(n_), r, to_int(n_), y.data + first,
                 to_int(y.stride));
    });
  }

  // u, s, v from W^T R X = P S Q^T: both bases, as left vectors from R X alone would be off by
  // eps ||R|| / s.
  void rotate(Panel<double> w, Panel<double> x, OrthCpu<double>& orth) {
    const std::int64_t l = x.cols;
    const auto product = scratch<double>(n_ * l), small = scratch<double>(l * l);
    operand_r().multiply(x, panel(product, n_, l), nullptr);
    orth.inner(w, panel(product, n_, l), small.get(), l);
    const auto q = scratch<double>(l * l), p = scratch<double>(l * l), sigma = scratch<double>(l);
    // BLAS sees the transpose, Q S P^T, by columns: q holds Q by columns, p holds P by rows.
    if (!blas::gesdd(to_int(l), small.get(), to_int(l), sigma.get(), q.get(), to_int(l), p.get(),
                     to_int(l)))
      throw LinAlgError("svd_tail: the SVD of the projected matrix did not converge");
    const auto last = scratch<double>(l * k_);
    const auto turn = [&](Panel<double> basis, auto&& entry, double* to) {
      for (std::int64_t i = 0; i < l; ++i)
        for (std::int64_t j = 0; j < k_; ++j) last[i * k_ + j] = entry(i, l - k_ + j);
      operand(context_, basis.data, n_, l).multiply(panel(last, l, k_), {to, n_, k_, k_}, nullptr);
    };
    turn(w, [&](std::int64_t i, std::int64_t j) { return p[i * l + j]; }, u.get());
    turn(x, [&](std::int64_t i, std::int64_t j) { return q[j * l + i]; }, v.get());
    std::copy_n(sigma.get() + l - k_, k_, s.get());
    measure();
  }

  Operand<double> operand_r() const { return {context_, {rt_.get(), DType::f64, n_, n_, 1, n_}}; }
  void measure() {
    const Operand<double> r = operand_r();
    double worst = 0;
    const auto image = scratch<double>(n_ * k_);
    for (const bool left : {true, false}) {
      if (left)
        r.multiply_transposed(panel(u, n_, k_), panel(image, n_, k_), nullptr);
      else
        r.multiply(panel(v, n_, k_), panel(image, n_, k_), nullptr);
      const double* other = left ? v.get() : u.get();
      for (std::int64_t i = 0; i < n_; ++i)
        for (std::int64_t j = 0; j < k_; ++j) image[i * k_ + j] -= other[i * k_ + j] * s[j];
      worst = std::max(worst, largest_column(image.get(), n_, k_));
    }
    residual = worst;
  }

  void decompose(bool thorough) {
    const auto r = scratch<T>(n_ * n_), left = scratch<T>(n_ * n_), right = scratch<T>(n_ * n_);
    const auto sigma = scratch<T>(n_);
    for (std::int64_t j = 0; j < n_; ++j)
      for (std::int64_t i = 0; i < n_; ++i) r[j * n_ + i] = i <= j ? narrow_[j * n_ + i] : T{0};
    const int n = to_int(n_);
    const bool done = thorough
                          ? blas::gesvd(n, r.get(), n, sigma.get(), left.get(), n, right.get(), n)
                          : blas::gesdd(n, r.get(), n, sigma.get(), left.get(), n, right.get(), n);
    if (!done) throw LinAlgError("svd_tail: the SVD of the triangular factor did not converge");
    for (std::int64_t j = 0; j < k_; ++j) {
      const std::int64_t from = n_ - k_ + j;
      s[j] = static_cast<double>(sigma[from]);
      for (std::int64_t i = 0; i < n_; ++i) {
        u[i * k_ + j] = static_cast<double>(left[from * n_ + i]);
        v[i * k_ + j] = static_cast<double>(right[i * n_ + from]);
      }
    }
    measure();
  }

  const Context& context_;
  const std::int64_t n_, k_;
  // Of residuals, over the largest norm of a column.
  const double tolerance_ = (16 + std::sqrt(static_cast<double>(n_))) *
                            static_cast<double>(std::numeric_limits<T>::epsilon());
  const std::unique_ptr<double[]> rt_, safe_;  // R by columns; the same without small pivots
  const T* const narrow_;

 public:
  const std::unique_ptr<double[]> u, v, s;  // (n, rank), (n, rank), (rank)
  double scale = 0, norm = 0;               // the largest norm of a column; ||R||_F
  double residual = 0;
  std::int64_t steps = 0;
};

// y <- B by a power of two 2^-power, so that neither products nor norms leave the range of the
// type.
template <class T>
int load_scaled(const Context& context, const StridedMatrixView& b, Panel<T> y) {
  Norm norm;
  Operand<T>(context, b).load(y, &norm);
  if (!std::isfinite(norm.sum)) throw LinAlgError("svd_tail: A contains NaN or Inf");
  const std::int64_t tiles = ceil_div(y.rows, kTile);
  const auto largest = scratch<T>(tiles);
  const auto tile = [&](std::int64_t i, auto&& body) {
    for (std::int64_t r = i * kTile; r < std::min(y.rows, (i + 1) * kTile); ++r)
      for (std::int64_t c = 0; c < y.cols; ++c) body(y.data[r * y.stride + c]);
  };
  parallel_for(context, tiles, [&](std::int64_t i) {
    largest[i] = 0;
    tile(i, [&](T& value) { largest[i] = std::max(largest[i], std::abs(value)); });
  });
  const T most = *std::max_element(largest.get(), largest.get() + tiles);
  const int power = most > 0 ? std::ilogb(most) + 1 : 0;
  // In two steps: that of a subnormal number has no inverse.
  const T first = std::ldexp(T{1}, -(power / 2)), second = std::ldexp(T{1}, power / 2 - power);
  if (power != 0)
    parallel_for(context, tiles, [&](std::int64_t i) {
      tile(i, [&](T& value) { value = value * first * second; });
    });
  return power;
}

// out <- the columns of `from` times sign, or as rows
template <class T>
void write(const T* from, std::int64_t rows, std::int64_t k, const std::vector<T>& sign,
           MatrixView out, bool transposed) {
  T* const to = static_cast<T*>(out.data);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < k; ++j)
      to[transposed ? j * out.row_stride + i : i * out.row_stride + j] =
          from[i * k + j] * sign[static_cast<std::size_t>(j)];
}

template <class T>
void svd_tail_as(const Context& context, const StridedMatrixView& a, const SvdTailOptions& options,
                 MatrixView u, VectorView s, MatrixView vh, SvdInfo* info) {
  const bool swapped = a.rows < a.cols;
  const StridedMatrixView b =
      swapped ? StridedMatrixView{a.data, a.dtype, a.cols, a.rows, a.col_stride, a.row_stride} : a;
  const std::int64_t m = b.rows, n = b.cols, k = options.rank;
  // B by columns, as LAPACK wants it.
  const auto y = scratch<T>(m * n), tau = scratch<T>(n), rt = scratch<T>(n * n);
  const int power =
      load_scaled(context, {b.data, b.dtype, n, m, b.col_stride, b.row_stride}, panel(y, n, m));
  blas::geqrf(to_int(m), to_int(n), y.get(), to_int(m), tau.get());
  for (std::int64_t j = 0; j < n; ++j) std::copy_n(y.get() + j * m, n, rt.get() + j * n);
  Triangle<T> triangle(context, rt.get(), n, k);
  const std::int64_t oversample = options.oversample.value_or(std::max<std::int64_t>(8, k));
  triangle.find(k + std::min(oversample, n - k), options.seed);

  const auto left = scratch<T>(m * k), right = scratch<T>(n * k), turned = scratch<T>(m * k);
  std::fill_n(turned.get(), m * k, T{0});
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < k; ++j) {
      turned[j * m + i] = static_cast<T>(triangle.u[i * k + j]);
      right[i * k + j] = static_cast<T>(triangle.v[i * k + j]);
    }
  blas::ormqr(to_int(m), to_int(k), to_int(n), y.get(), to_int(m), tau.get(), turned.get(),
              to_int(m));
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < k; ++j) left[i * k + j] = turned[j * m + i];
  const T* const columns = swapped ? right.get() : left.get();
  std::vector<T> sign(static_cast<std::size_t>(k), T{0});
  for (std::int64_t i = 0; i < u.rows; ++i)
    for (std::int64_t j = 0; j < k; ++j)
      if (std::abs(columns[i * k + j]) > std::abs(sign[static_cast<std::size_t>(j)]))
        sign[static_cast<std::size_t>(j)] = columns[i * k + j];
  for (T& value : sign) value = value < 0 ? T{-1} : T{1};
  write(columns, u.rows, k, sign, u, false);
  write(swapped ? left.get() : right.get(), vh.cols, k, sign, vh, true);
  const double bound = static_cast<double>(m) *
                       static_cast<double>(std::numeric_limits<T>::epsilon()) * triangle.scale;
  *info = SvdInfo{};
  for (std::int64_t j = 0; j < k; ++j) {
    static_cast<T*>(s.data)[j] = static_cast<T>(std::ldexp(triangle.s[j], power));
    info->rank += triangle.s[j] > bound;
  }
  info->error = triangle.norm > 0 ? triangle.residual / triangle.norm : 0;
  info->norm = std::ldexp(triangle.norm, power);
  info->sweeps = static_cast<double>(triangle.steps);
  info->finite = 1;
}

}  // namespace

void svd_tail_cpu(const Context& context, const StridedMatrixView& a, const SvdTailOptions& options,
                  MatrixView u, VectorView s, MatrixView vh, SvdInfo* info) {
  if (a.dtype == DType::f64)
    svd_tail_as<double>(context, a, options, u, s, vh, info);
  else
    svd_tail_as<float>(context, a, options, u, s, vh, info);
}

}  // namespace structmat
