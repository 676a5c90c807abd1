// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "block_svd/top_eigenpairs.h"
#include "random/random_kernels.h"
#include "structmat/error.h"
#include "structmat/random.h"
#include "svd/operand_cpu.h"
#include "svd/orth_cpu.h"
#include "svd/svd_algorithm.h"
#include "svd/svd_info.h"
#include "svd/svd_kernels.h"
#include "svd/svd_tolerance.h"

namespace structmat {
namespace {

template <class T>
class CpuEngine {
 public:
  using Scalar = T;

  CpuEngine(const Context& context, const StridedMatrixView& b, const SvdPlan& plan,
            std::uint64_t seed, MatrixView u, VectorView s, MatrixView vh, SvdInfo* info)
      : context_(context),
        plan_(plan),
        b_(context, b, plan),
        seed_(seed),
        u_(u),
        s_(s),
        vh_(vh),
        info_(info),
        basis_(plan.basis()),
        q_(scratch<T>(plan.tall * plan.stored())),
        x_(scratch<T>(plan.small * plan.stored())),
        t_(scratch<T>(plan.small * basis_)) {
    orth_.emplace(context, basis_, seed);
  }

  Panel<T> q() { return {q_.get(), plan_.tall, basis_, plan_.stored()}; }
  Panel<T> x() { return {x_.get(), plan_.small, basis_, plan_.stored()}; }
  Panel<T> t() { return {t_.get(), plan_.small, basis_, basis_}; }

  void sketch(Panel<T> y, std::uint32_t stream) {
    fill_gaussian_cpu(context_, {y.data, dtype_of<T>(), y.rows, y.cols, y.stride}, seed_, stream);
  }
  void multiply(Panel<T> x, Panel<T> y) {
    b_.multiply(x, y, unmeasured());
    check_finite();
  }
  void multiply_transposed(Panel<T> x, Panel<T> y) {
    b_.multiply_transposed(x, y, unmeasured());
    check_finite();
  }
  // y = B X for a random X, which need not be left in its panel.
  void multiply_random(Panel<T> x, Panel<T> y) {
    if (!sparse(x)) {
      sketch(x, 0);
      return multiply(x, y);
    }
    b_.sketch(seed_, y, unmeasured());
    check_finite();
  }
  void multiply_random_transposed(Panel<T> y, Panel<T> x) {
    if (!sparse(y)) {
      sketch(y, 0);
      return multiply_transposed(y, x);
    }
    b_.sketch_transposed(seed_, x, unmeasured());
    check_finite();
  }
  void load(Panel<T> y) {
    b_.load(y, unmeasured());
    check_finite();
  }
  void copy(Panel<T> from, Panel<T> to) {
    rows(from.rows, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first; i < last; ++i)
        std::copy_n(from.data + i * from.stride, from.cols, to.data + i * to.stride);
    });
  }

  void orthonormalize(Panel<T> y, Panel<T> before, int passes, std::uint32_t& stream) {
    check_in_range(orth_->orthonormalize(y, y, before, passes > 1 ? kMaxOrthPasses : 1, stream));
  }

  // Whether the energy does not tell what the basis misses.
  bool asks_outside() const {
    return !(missed<T>(plan_.tall, captured_.value() / norm_.value()) >= 0);
  }
  // The root mean square over columns of y = B G of || (I - Q Q^T) y ||.
  void measure_outside(Panel<T> y, Panel<T> q) {
    const auto c = scratch<T>(q.cols * y.cols);
    orth_->inner(q, y, c.get(), y.cols);
    std::vector<Norm> norms(static_cast<std::size_t>(ceil_div(y.rows, kTile)));
    rows(y.rows, [&](std::int64_t first, std::int64_t last) {
      blas::gemm('N', 'N', to_int(y.cols), to_int(last - first), to_int(q.cols), T{-1}, c.get(),
                 to_int(y.cols), q.data + first * q.stride, to_int(q.stride), T{1},
                 y.data + first * y.stride, to_int(y.stride));
      for (std::int64_t i = first; i < last; ++i)
        norms[static_cast<std::size_t>(first / kTile)].add(y.data + i * y.stride, y.cols);
    });
    outside_ = {};
    for (const Norm& n : norms) outside_.add(n);
    outside_.sum /= static_cast<double>(y.cols);
    check_in_range(std::isfinite(outside_.sum));
  }
  bool hides_copies() const { return structmat::hides_copies(plan_, sigma_.get()); }

  // R = x^T t = P diag(S) W^T; p_ <- P, w_ <- W.
  void small_svd(Panel<T> x, Panel<T> t, std::int64_t) {
    const std::int64_t l = t.cols;
    captured_ = measured(t);
    check_in_range(std::isfinite(captured_.sum));
    const auto r = scratch<T>(l * l);
    orth_->inner(x, t, r.get(), l);
    check_in_range(std::all_of(r.get(), r.get() + l * l, [](T v) { return std::isfinite(v); }));
    if (!(keeps_digits_ ? decompose<double>(r.get(), l) : decompose<T>(r.get(), l)) ||
        (sees_rounding() && !decompose<double>(r.get(), l)))
      throw LinAlgError("randomized_svd: the SVD of the projected matrix did not converge");
    check_in_range(std::isfinite(sigma_[0]) && std::isfinite(norm_.value()));
  }

  // T = P S W^T from T^T T = W S^2 W^T in double, which saves a basis of T and half the time of
  // gesdd: 5 % of a decomposition of rank 128 of 4096 x 4096, 12 % of rank 64 of 384 x 384. P = T W
  // / S is orthogonal to 1e-15 (S_1 / S_k)^2, and the values left out are known to 3e-8 S_1, both
  // enough for float; false where they are not.
  bool svd_by_gram(Panel<T> t) {
    if (sizeof(T) == 8) return false;
    const std::int64_t l = t.cols, k = plan_.rank;
    captured_ = measured(t);
    check_in_range(std::isfinite(captured_.sum));
    double* const g = orth_->gram(t);
    for (std::int64_t i = 1; i < l; ++i)
      std::copy_n(g + i * gram_stride(l), i + 1, g + i * padded(l));  // to where none is read yet
    const auto square = scratch<double>(l), vectors = scratch<double>(k * padded(l));
    const auto work = scratch<double>(top_eigenpairs_work * padded(l));
    if (!top_eigenpairs(g, l, l, square.get(), k, vectors.get(), work.get())) return false;
    if (!(square[k - 1] > 1e-8 * square[0])) return false;
    sigma_ = scratch<T>(l);
    for (std::int64_t j = 0; j < l; ++j)
      sigma_[j] = static_cast<T>(std::sqrt(std::max(square[j], 0.0)));
    w_ = scratch<T>(k * l);
    lift_ = scratch<double>(l * k);
    for (std::int64_t j = 0; j < k; ++j) {
      const double* vector = vectors.get() + j * padded(l);
      const double inverse = 1 / std::sqrt(square[j]);
      for (std::int64_t i = 0; i < l; ++i) {
        w_[j * l + i] = static_cast<T>(vector[i]);
        lift_[i * k + j] = vector[i] * inverse;
      }
    }
    lifts_in_double_ = !(square[k - 1] > 1e-3 * square[0]);
    check_in_range(std::isfinite(sigma_[0]) && std::isfinite(norm_.value()));
    return true;
  }
  std::array<Panel<T>, 0> rough_vectors() { return {}; }
  void factors(Panel<T> q, Panel<T> x) {
    const std::int64_t k = plan_.rank, l = q.cols;
    std::copy_n(sigma_.get(), k, static_cast<T*>(s_.data));
    const auto w = scratch<T>(l * k), p = scratch<T>(l * k);
    for (std::int64_t i = 0; i < l; ++i)
      for (std::int64_t j = 0; j < k; ++j) {
        w[i * k + j] = w_[j * l + i];
        p[i * k + j] = lift_ ? static_cast<T>(lift_[i * k + j]) : p_[i * l + j];
      }
    const auto right = [&](MatrixView out, bool transposed) {
      if (lift_ && lifts_in_double_)
        rotate(x, lift_.get(), out, transposed);
      else
        rotate(x, p.get(), out, transposed);
    };
    if (plan_.swapped) {
      right(u_, false);
      rotate(q, w.get(), vh_, true);
    } else {
      rotate(q, w.get(), u_, false);
      right(vh_, true);
    }
    fix_signs();
    *info_ = svd_info(plan_, sigma_.get(), norm_.value(), captured_.value(), outside_.value());
  }

  // ---- of a basis that grows (svd_tolerance.h) ----
  void keep_digits() { keeps_digits_ = true; }
  struct Owned {
    std::unique_ptr<T[]> memory;
    Panel<T> panel;
  };
  Owned allocate(std::int64_t rows, std::int64_t cols) const {
    Owned out{scratch<T>(rows * cols), {}};
    out.panel = {out.memory.get(), rows, cols, cols};
    return out;
  }
  // Buffers for another plan, with the first `used` columns of the basis.
  void resize(const SvdPlan& plan, std::int64_t used) {
    check_basis(plan);
    const Panel<T> old[] = {q(), x(), t()};
    const std::unique_ptr<T[]> kept[] = {std::move(q_), std::move(x_), std::move(t_)};
    plan_ = plan;
    basis_ = plan.basis();
    q_ = scratch<T>(plan.tall * plan.stored());
    x_ = scratch<T>(plan.small * plan.stored());
    t_ = scratch<T>(plan.small * basis_);
    orth_.emplace(context_, basis_, seed_);
    const Panel<T> now[] = {q(), x(), t()};
    for (int i = 0; i < 3; ++i) copy(old[i].columns(0, used), now[i].columns(0, used));
  }
  double norm() const {
    check_in_range(std::isfinite(norm_.value()));
    return norm_.value();
  }
  double norm_of(Panel<T> y) { return measured(y).value(); }
  // out <- Y^T Y / unit^2
  void gram_of(Panel<T> y, double unit, double* out) const {
    std::fill_n(out, y.cols * y.cols, 0.0);
    std::vector<double> row(static_cast<std::size_t>(y.cols));
    for (std::int64_t r = 0; r < y.rows; ++r) {
      for (std::int64_t j = 0; j < y.cols; ++j)
        row[static_cast<std::size_t>(j)] = static_cast<double>(y.data[r * y.stride + j]) / unit;
      for (std::int64_t i = 0; i < y.cols; ++i)
        for (std::int64_t j = 0; j < y.cols; ++j)
          out[i * y.cols + j] +=
              row[static_cast<std::size_t>(i)] * row[static_cast<std::size_t>(j)];
    }
  }
  std::vector<double> singular_values(std::int64_t count) const {
    return {sigma_.get(), sigma_.get() + count};
  }
  void finish(const SvdPlan& plan, MatrixView u, VectorView s, MatrixView vh, SvdInfo* info) {
    plan_ = plan;
    u_ = u;
    s_ = s;
    vh_ = vh;
    info_ = info;
  }
  void report(bool converged) { info_->converged = converged ? 1 : 0; }

  static void check_basis(const SvdPlan& plan) {
    STRUCTMAT_CHECK(plan.basis() <= 20000,
                    "randomized_svd: a basis of " + std::to_string(plan.basis()) +
                        " columns, wanted at most 20000 (LAPACK counts in 32 bits)");
  }

 private:
  static int to_int(std::int64_t size) { return static_cast<int>(size); }
  template <class S>
  bool decompose(const T* r, std::int64_t l) {
    const auto a = scratch<S>(l * l), s = scratch<S>(l), w = scratch<S>(l * l),
               p = scratch<S>(l * l);
    std::copy_n(r, l * l, a.get());
    const int n = to_int(l);
    // BLAS sees R^T = W S P^T by columns: w holds W by columns, p holds P by rows.
    const bool done = blas::gesdd(n, a.get(), n, s.get(), w.get(), n, p.get(), n);
    const auto converted = [](const S* from, std::int64_t count) {
      auto to = scratch<T>(count);
      std::transform(from, from + count, to.get(), [](S x) { return static_cast<T>(x); });
      return to;
    };
    sigma_ = converted(s.get(), l);
    w_ = converted(w.get(), l * l);
    p_ = converted(p.get(), l * l);
    return done;
  }
  Norm measured(Panel<T> y) {
    std::vector<Norm> norms(static_cast<std::size_t>(ceil_div(y.rows, kTile)));
    rows(y.rows, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first; i < last; ++i)
        norms[static_cast<std::size_t>(first / kTile)].add(y.data + i * y.stride, y.cols);
    });
    Norm out;
    for (const Norm& n : norms) out.add(n);
    return out;
  }
  template <class Body>  // body(first, last) over tiles of rows
  void rows(std::int64_t count, Body&& body) {
    orth_->rows(count, body);
  }
  // out = basis c, or its transpose, in the arithmetic of c (basis, rank), row-major
  template <class S>
  void rotate(Panel<T> basis, const S* c, MatrixView out, bool transposed) {
    const std::int64_t k = plan_.rank;
    T* to = static_cast<T*>(out.data);
    rows(basis.rows, [&](std::int64_t first, std::int64_t last) {
      const std::int64_t count = last - first;
      const T* rows_of_basis = basis.data + first * basis.stride;
      std::int64_t stride = basis.stride;
      const S* from;
      std::unique_ptr<S[]> widened;
      if constexpr (std::is_same_v<S, T>) {
        from = rows_of_basis;
      } else {
        widened = scratch<S>(count * basis.cols);
        for (std::int64_t i = 0; i < count; ++i)
          std::copy_n(rows_of_basis + i * stride, basis.cols, widened.get() + i * basis.cols);
        from = widened.get();
        stride = basis.cols;
      }
      const auto tile = scratch<S>(count * k);
      if (!transposed) {
        blas::gemm('N', 'N', to_int(k), to_int(count), to_int(basis.cols), S{1}, c, to_int(k), from,
                   to_int(stride), S{0}, tile.get(), to_int(k));
        for (std::int64_t i = 0; i < count; ++i)
          std::copy_n(tile.get() + i * k, k, to + (first + i) * out.row_stride);
      } else {
        blas::gemm('T', 'T', to_int(count), to_int(k), to_int(basis.cols), S{1}, from,
                   to_int(stride), c, to_int(k), S{0}, tile.get(), to_int(count));
        for (std::int64_t j = 0; j < k; ++j)
          std::copy_n(tile.get() + j * count, count, to + j * out.row_stride + first);
      }
    });
  }
  // Makes the entry of largest magnitude (the first of equals) of each column of U positive.
  void fix_signs() {
    const std::int64_t k = plan_.rank, tiles = ceil_div(u_.rows, kTile);
    T* u = static_cast<T*>(u_.data);
    const auto best = scratch<T>(tiles * k);
    rows(u_.rows, [&](std::int64_t first, std::int64_t last) {
      T* out = best.get() + first / kTile * k;
      std::fill_n(out, k, T{0});
      for (std::int64_t i = first; i < last; ++i)
        for (std::int64_t j = 0; j < k; ++j)
          if (std::abs(u[i * u_.row_stride + j]) > std::abs(out[j]))
            out[j] = u[i * u_.row_stride + j];
    });
    std::vector<T> sign(static_cast<std::size_t>(k), T{0});
    for (std::int64_t i = 0; i < tiles; ++i)
      for (std::int64_t j = 0; j < k; ++j)
        if (std::abs(best[i * k + j]) > std::abs(sign[j])) sign[j] = best[i * k + j];
    for (T& value : sign) value = value < 0 ? T{-1} : T{1};
    rows(u_.rows, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first; i < last; ++i)
        for (std::int64_t j = 0; j < k; ++j) u[i * u_.row_stride + j] *= sign[j];
    });
    parallel_for(context_, k, [&](std::int64_t j) {
      T* row = static_cast<T*>(vh_.data) + j * vh_.row_stride;
      if (sign[j] < 0)
        for (std::int64_t i = 0; i < vh_.cols; ++i) row[i] = -row[i];
    });
  }

  // Whether four entries a row make a random matrix as good as Gaussian, at less cost: many in
  // every column, and few of a row's.
  static bool sparse(Panel<T> x) { return x.cols >= 32 && x.rows >= 8 * x.cols; }
  // Whether the error may be so small that the SVD of a matrix of floats would be seen in it:
  // LAPACK's errs by 60 eps for 300 x 300 and by up to 700 eps where the values fall fast. In
  // double it takes 1.7 times as long.
  bool sees_rounding() const {
    if (sizeof(T) == 8 || keeps_digits_) return false;
    const double norm = norm_.value(), captured = captured_.value();
    return !(svd_info(plan_, sigma_.get(), norm, captured, 0.0).error > 1e-3);
  }
  Norm* unmeasured() { return measured_ ? nullptr : &norm_; }
  void check_finite() {
    if (measured_) return;
    measured_ = true;
    if (!std::isfinite(norm_.sum))
      throw LinAlgError(std::string("randomized_svd: A contains NaN or Inf") +
                        (plan_.center ? ", or less its mean exceeds the range of its type" : ""));
  }
  static void check_in_range(bool finite) {
    if (!finite)
      throw LinAlgError(
          "randomized_svd: a singular value or the norm of A exceeds the range of its type");
  }

  const Context context_;
  SvdPlan plan_;
  const Operand<T> b_;
  const std::uint64_t seed_;
  MatrixView u_;
  VectorView s_;
  MatrixView vh_;
  SvdInfo* info_;

  std::int64_t basis_;
  std::unique_ptr<T[]> q_, x_, t_;
  std::optional<OrthCpu<T>> orth_;
  std::unique_ptr<T[]> sigma_, w_, p_;
  std::unique_ptr<double[]> lift_;  // W / S (basis, rank), where P = T W / S
  bool lifts_in_double_ = false;    // beyond S_1 / S_k = 30
  bool measured_ = false, keeps_digits_ = false;
  Norm norm_, captured_, outside_;
};

}  // namespace

void randomized_svd_cpu(const Context& context, const StridedMatrixView& b, const SvdPlan& plan,
                        std::uint64_t seed, MatrixView u, VectorView s, MatrixView vh,
                        SvdInfo* info) {
  SvdOptions options;
  options.rank = plan.rank;
  options.center = plan.center;
  const SvdPlan wide = plan.narrow ? plan_wide(plan.swapped ? plan.small : plan.tall,
                                               plan.swapped ? plan.tall : plan.small, options)
                                   : plan;
  CpuEngine<float>::check_basis(wide);
  const auto decompose = [&](auto element, const SvdPlan& with) {
    using Engine = CpuEngine<decltype(element)>;
    Engine engine(context, b, with, seed, u, s, vh, info);
    SvdAlgorithm<Engine>(engine, with).run();
    return engine.hides_copies();
  };
  const auto with_type = [&](const SvdPlan& with) {
    return b.dtype == DType::f64 ? decompose(double{}, with) : decompose(float{}, with);
  };
  if (!with_type(plan)) return;
  with_type(wide);
  info->sweeps += static_cast<double>(plan.sweeps);
}

std::unique_ptr<SvdSearch> svd_to_tolerance_cpu(const Context& context, const StridedMatrixView& b,
                                                const SvdPlan& plan, double rtol,
                                                const SvdOptions& options) {
  const auto search = [&](auto element) -> std::unique_ptr<SvdSearch> {
    using Engine = CpuEngine<decltype(element)>;
    const auto start = [&](const SvdPlan& first) {
      return Engine(context, b, first, options.seed, {}, {}, {}, nullptr);
    };
    return std::make_unique<SvdToToleranceOf<Engine>>(plan, rtol, options, start);
  };
  return b.dtype == DType::f64 ? search(double{}) : search(float{});
}

}  // namespace structmat
