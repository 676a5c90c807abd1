// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/arena.h"
#include "cuda/device.h"
#include "cuda/gemm.h"
#include "cuda/side_streams.h"
#include "random/random_kernels.h"
#include "structmat/error.h"
#include "svd/jacobi_cuda.cuh"
#include "svd/mean_cuda.cuh"
#include "svd/norm.h"
#include "svd/orth_cuda.cuh"
#include "svd/panel_cuda.cuh"
#include "svd/svd_info.h"
#include "svd/svd_kernels.h"
#include "svd/svd_tolerance.h"

namespace structmat {
namespace {

using namespace svd_cuda;

constexpr std::int64_t kConverted = std::int64_t{1} << 24;  // elements of A converted at a time

// B as it is stored, columns side by side where that can be, and whether that is its transpose.
struct Stored {
  StridedMatrixView view;
  bool transposed, in_place;

  Stored(const StridedMatrixView& b, bool center)
      : view(b), transposed(b.col_stride != 1 && b.row_stride == 1) {
    if (transposed) {
      std::swap(view.rows, view.cols);
      std::swap(view.row_stride, view.col_stride);
    }
    in_place = !center && (view.dtype == DType::f32 || view.dtype == DType::f64) &&
               view.col_stride == 1 && view.row_stride >= view.cols;
  }
  std::int64_t panel_rows() const {
    return std::clamp<std::int64_t>(kConverted / view.cols, 1, view.rows);
  }
};

// A itself, whose rows have the mean.
StridedMatrixView rows_of_a(const SvdPlan& plan, const Stored& s) {
  if (plan.swapped == s.transposed) return s.view;
  const StridedMatrixView& v = s.view;
  return {v.data, v.dtype, v.cols, v.rows, v.col_stride, v.row_stride};
}

template <class T>
struct Buffers {
  T *q, *x, *t;                    // (tall, l + probes), (small, l + probes), (small, l)
  double* wide;                    // (tall, block) or (small, l): a panel of floats in double
  T* c;                            // (l, max(l, probes)): projections and R
  T* j;                            // (l, l): rotations
  T *left, *right;                 // (l, k): the columns of W and P
  T *norms, *sigma, *unit;         // (l), (l), (1)
  T* extremes;                     // (kMaxSlabs, l)
  int *place, *rotated;            // (l), (kJacobiSweeps)
  ScaledNorm *of_a, *of_t, *of_y;  // (kMaxMeasures)
  Mean<T> mean;
  T* converted;
  OrthWork orth;
  std::size_t bytes;

  Buffers(cuda::Arena arena, const SvdPlan& plan, const Stored& a)
      : mean(arena, rows_of_a(plan, a), plan.center), orth(arena, plan.basis()) {
    const std::int64_t l = plan.basis(), k = plan.rank;
    q = arena.take<T>(plan.tall * plan.stored());
    x = arena.take<T>(plan.small * plan.stored());
    t = arena.take<T>(plan.small * l);
    wide =
        arena.take<double>(sizeof(T) == 8 ? 0 : std::max(plan.tall * plan.block, plan.small * l));
    c = arena.take<T>(l * std::max(l, plan.probes));
    j = arena.take<T>(l * l);
    left = arena.take<T>(l * k);
    right = arena.take<T>(l * k);
    norms = arena.take<T>(l);
    sigma = arena.take<T>(l);
    unit = arena.take<T>(1);
    extremes = arena.take<T>(kMaxSlabs * l);
    place = arena.take<int>(l);
    rotated = arena.take<int>(kJacobiSweeps);
    of_a = arena.take<ScaledNorm>(kMaxMeasures);
    of_t = arena.take<ScaledNorm>(kMaxMeasures);
    of_y = arena.take<ScaledNorm>(kMaxMeasures);
    converted = arena.take<T>(a.in_place ? 0 : a.panel_rows() * a.view.cols);
    bytes = arena.used();
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) copy_kernel(Panel<T> from, Panel<T> to) {
  for (Entries e(from.rows, from.cols); e.left(); e.next())
    to.data[e.row * to.stride + e.col] = from.data[e.row * from.stride + e.col];
}

// to <- a panel, in double, in pass `pass` over it
template <class T>
__global__ void __launch_bounds__(kThreads)
    widen_kernel(Panel<T> from, Panel<double> to, const State* state, int pass) {
  if (pass > 0 && state->done_at < pass) return;
  for (Entries e(from.rows, from.cols); e.left(); e.next())
    to.data[e.row * to.stride + e.col] = from.data[e.row * from.stride + e.col];
}

// The facts, from the partial norms. One block.
template <class T>
__global__ void __launch_bounds__(kThreads)
    info_kernel(SvdPlan plan, const T* sigma, const ScaledNorm* of_a, int parts_a,
                const ScaledNorm* of_t, int parts_t, const ScaledNorm* of_y, int parts_y,
                const int* rotated, const State* state, SvdInfo* info) {
  const ScaledNorm* const parts[3] = {of_a, of_t, of_y};
  const int counts[3] = {parts_a, parts_t, parts_y};
  double value[3];
  for (int which = 0; which < 3; ++which) {
    ScaledNorm norm{0, 0};
    for (int i = threadIdx.x; i < counts[which]; i += kThreads)
      norm = combine(norm, parts[which][i]);
    norm = reduce_norm(norm);
    __syncthreads();
    value[which] = norm.scale * sqrt(norm.sum);
  }
  if (threadIdx.x != 0) return;
  const double outside = plan.probes > 0 ? value[2] / sqrt(static_cast<double>(plan.probes)) : 0.0;
  *info = svd_info(plan, sigma, value[0], value[1], outside);
  if (state->overflowed != 0 || rotated[kJacobiSweeps - 1] != 0 || !is_finite(value[0]) ||
      !is_finite(value[2]) || !is_finite(static_cast<double>(sigma[0]))) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    *info = {nan, nan, nan, nan, 0};
  }
}

// S from all singular values; NaN in the place of everything where there is no finite answer.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Panel<T> u, Panel<T> s, Panel<T> vh, const T* sigma, SvdInfo* info) {
  const bool finite = info->finite != 0;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t id = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (std::int64_t i = id; i < s.cols; i += step) s.data[i] = finite ? sigma[i] : nan;
  if (finite) return;
  for (std::int64_t i = id; i < u.rows * u.cols; i += step)
    u.data[i / u.cols * u.stride + i % u.cols] = nan;
  for (std::int64_t i = id; i < vh.rows * vh.cols; i += step)
    vh.data[i / vh.cols * vh.stride + i % vh.cols] = nan;
}

__global__ void report_kernel(SvdInfo* info, bool converged) {
  info->converged = converged ? 1 : 0;
}

// gram <- scale^2 Y^T Y for a few columns. One block an entry.
template <class T>
__global__ void __launch_bounds__(kThreads)
    scaled_gram_kernel(Panel<T> y, double scale, double* gram) {
  __shared__ double all[kThreads];
  const std::int64_t i = blockIdx.x / y.cols, j = blockIdx.x % y.cols;
  double sum = 0;
  for (std::int64_t r = threadIdx.x; r < y.rows; r += kThreads)
    sum += (y.data[r * y.stride + i] * scale) * (y.data[r * y.stride + j] * scale);
  all[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) all[threadIdx.x] += all[threadIdx.x + half];
  }
  if (threadIdx.x == 0) gram[blockIdx.x] = all[0];
}

template <class T>
class CudaEngine {
 public:
  using Scalar = T;

  CudaEngine(const Context& context, const StridedMatrixView& b, const SvdPlan& plan,
             std::uint64_t seed, MatrixView u, VectorView s, MatrixView vh, SvdInfo* info)
      : context_(context),
        plan_(plan),
        b_(b),
        stored_(b, plan.center),
        seed_(seed),
        info_(info),
        buffers_(cuda::Arena(context.workspace), plan, stored_),
        u_{static_cast<T*>(u.data), u.rows, u.cols, u.row_stride},
        s_{static_cast<T*>(s.data), 1, s.size, s.size},
        vh_{static_cast<T*>(vh.data), vh.rows, vh.cols, vh.row_stride} {
    SM_LAUNCH(start_kernel, 1, 1, 0, context_.stream, buffers_.orth.state);
    if (plan.center) buffers_.mean.find(context_.stream, rows_of_a(plan, stored_));
    dispatch_dtype(b.dtype, [&](auto element) {
      using S = decltype(element);
      if constexpr (std::is_same_v<accumulator_t<S>, T>) {
        const StridedMatrixView& v = stored_.view;
        const S* const data = static_cast<const S*>(v.data);
        const unsigned parts = measure_count(v.rows * v.cols);
        if (plan.center)
          SM_LAUNCH((measure_kernel<S, true>), parts, kThreads, 0, context_.stream, data, v.rows,
                    v.cols, v.row_stride, v.col_stride, buffers_.of_a, shift(stored_.transposed));
        else
          SM_LAUNCH((measure_kernel<S>), parts, kThreads, 0, context_.stream, data, v.rows, v.cols,
                    v.row_stride, v.col_stride, buffers_.of_a, Shift<T>{});
      }
    });
  }

  Panel<T> q() { return {buffers_.q, plan_.tall, plan_.basis(), plan_.stored()}; }
  Panel<T> x() { return {buffers_.x, plan_.small, plan_.basis(), plan_.stored()}; }
  Panel<T> t() { return {buffers_.t, plan_.small, plan_.basis(), plan_.basis()}; }

  void sketch(Panel<T> y, std::uint32_t stream) {
    fill_gaussian_cuda(context_, {y.data, dtype_of<T>(), y.rows, y.cols, y.stride}, seed_, stream);
  }
  void multiply(Panel<T> x, Panel<T> y) { product(stored_.transposed, x, y); }
  void multiply_transposed(Panel<T> x, Panel<T> y) { product(!stored_.transposed, x, y); }
  // y = B X or x = B^T Y for a random X or Y.
  void multiply_random(Panel<T> x, Panel<T> y) {
    sketch(x, 0);
    multiply(x, y);
  }
  void multiply_random_transposed(Panel<T> y, Panel<T> x) {
    sketch(y, 0);
    multiply_transposed(y, x);
  }
  void load(Panel<T> y) { gather(b_, 0, y, shift(false)); }
  void copy(Panel<T> from, Panel<T> to) {
    SM_LAUNCH(copy_kernel<T>, blocks_for(from.rows * from.cols), kThreads, 0, context_.stream, from,
              to);
  }

  // See orth.h. What projection in T leaves of `before` grows with R^-1, so that a second pass
  // always follows; the others stand down where they have nothing to do.
  void orthonormalize(Panel<T> y, Panel<T> before, int passes, std::uint32_t& stream) {
    constexpr bool in_double = std::is_same_v<T, double>;
    const bool alone = before.cols == 0;
    const double eps = std::numeric_limits<T>::epsilon();
    const double growth = in_double || !alone ? 0.0 : eps * 0x1p49;
    const double noise = in_double || !alone ? 16 * eps : 0x1p-40, kept = alone ? 0.0 : 0.1;
    if (in_double || !alone) normalize(y);  // squares of floats neither overflow nor vanish
    Panel<double> wide{buffers_.wide, y.rows, y.cols, y.cols};
    if constexpr (in_double) wide = y;
    for (int pass = 0; pass < passes; ++pass) {
      if (!alone) project(y, before, pass);
      if (!in_double && (pass == 0 || !alone))
        SM_LAUNCH(widen_kernel<T>, blocks_for(y.rows * y.cols), kThreads, 0, context_.stream, y,
                  wide, buffers_.orth.state, pass);
      const bool settles = (alone || pass > 0) && pass + 1 < passes;
      orth_pass(context_, buffers_.orth, {pass, settles, noise, growth, kept, seed_, ++stream},
                wide, y);
    }
  }

  // y <- (I - Q Q^T) y for y = B G, and its norm.
  static constexpr bool asks_outside() { return true; }  // the host does not know
  void measure_outside(Panel<T> y, Panel<T> q) {
    project(y, q, 0);
    SM_LAUNCH(measure_kernel<T>, measure_count(y.rows * y.cols), kThreads, 0, context_.stream,
              y.data, y.rows, y.cols, y.stride, std::int64_t{1}, buffers_.of_y);
  }

  // R = x^T t = P diag(S) W^T; left <- W_k, right <- P_k.
  bool svd_by_gram(Panel<T>) { return false; }  // it would wait for the singular values
  void small_svd(Panel<T> x, Panel<T> t, std::int64_t k) {
    const std::int64_t l = t.cols;
    vectors_ = {l, k};
    void* stream = context_.stream;
    SM_LAUNCH(measure_kernel<T>, measure_count(t.rows * t.cols), kThreads, 0, stream, t.data,
              t.rows, t.cols, t.stride, std::int64_t{1}, buffers_.of_t);
    cublas<T>(true, l, l, x.rows, 1, x.data, x.stride, t.data, t.stride, 0, buffers_.c, l);
    const Jacobi<T> jacobi{buffers_.c,       buffers_.j,         buffers_.norms, buffers_.sigma,
                           buffers_.unit,    buffers_.left,      buffers_.right, buffers_.place,
                           buffers_.rotated, buffers_.orth.state};
    jacobi_svd<T>(stream, jacobi, l, k, least_square<T>());
  }
  std::array<Panel<T>, 2> rough_vectors() {
    return {Panel<T>{buffers_.left, vectors_[0], vectors_[1], vectors_[1]},
            Panel<T>{buffers_.right, vectors_[0], vectors_[1], vectors_[1]}};
  }

  void factors(Panel<T> q, Panel<T> x) {
    const std::int64_t l = q.cols, k = plan_.rank, ld = vectors_[1];
    const Panel<T> left = plan_.swapped ? x : q, right = plan_.swapped ? q : x;
    const T* of_left = plan_.swapped ? buffers_.right : buffers_.left;
    const T* of_right = plan_.swapped ? buffers_.left : buffers_.right;
    cublas<T>(false, u_.rows, k, l, 1, left.data, left.stride, of_left, ld, 0, u_.data, u_.stride);
    constexpr DType dtype = dtype_of<T>();
    const cuda::Gemm product{true,       true,         k,        vh_.cols,   l,     of_right, ld,
                             right.data, right.stride, vh_.data, vh_.stride, dtype, dtype};
    cuda::gemm(context_, product, buffers_.orth.gemm);
    extremes(u_);
    const int slabs = static_cast<int>(slab_count(u_.rows));
    for (const Panel<T>& p : {u_, vh_})
      SM_LAUNCH(sign_kernel<T>, blocks_for(p.rows * p.cols), kThreads, 0, context_.stream, p,
                p.data == vh_.data, buffers_.extremes, slabs);
    SM_LAUNCH(info_kernel<T>, 1, kThreads, 0, context_.stream, plan_, buffers_.sigma, buffers_.of_a,
              static_cast<int>(measure_count(plan_.tall * plan_.small)), buffers_.of_t,
              static_cast<int>(measure_count(plan_.small * l)), buffers_.of_y,
              plan_.probes > 0 ? static_cast<int>(measure_count(plan_.tall * plan_.probes)) : 0,
              buffers_.rotated, buffers_.orth.state, info_);
    SM_LAUNCH(finish_kernel<T>, blocks_for(u_.rows * k), kThreads, 0, context_.stream, u_, s_, vh_,
              buffers_.sigma, info_);
  }

  // ---- of a basis that grows (svd_tolerance.h) ----
  struct Owned {
    std::shared_ptr<void> memory;
    Panel<T> panel;
  };
  // An engine with memory of its own, and no outputs yet.
  CudaEngine(const Context& context, const StridedMatrixView& b, const SvdPlan& plan,
             std::uint64_t seed, const SvdAllocate& allocate)
      : CudaEngine(lent(context, b, plan, allocate), b, plan, seed, allocate) {}
  Owned allocate(std::int64_t rows, std::int64_t cols) const {
    Owned out{allocate_(static_cast<std::size_t>(rows * cols) * sizeof(T)), {}};
    out.panel = {static_cast<T*>(out.memory.get()), rows, cols, cols};
    return out;
  }
  // Buffers for another plan, with the first `used` columns of the basis.
  void resize(const SvdPlan& plan, std::int64_t used) {
    const Panel<T> old[] = {q(), x(), t()};
    const std::shared_ptr<void> kept = memory_;
    const Buffers<T> before = buffers_;
    memory_ = lent(context_, b_, plan, allocate_).memory;
    buffers_ = Buffers<T>(cuda::Arena(memory_.get()), plan, stored_);
    plan_ = plan;
    SM_LAUNCH(start_kernel, 1, 1, 0, context_.stream, buffers_.orth.state);
    const Panel<T> now[] = {q(), x(), t()};
    for (int i = 0; i < 3 && used > 0; ++i) copy(old[i].columns(0, used), now[i].columns(0, used));
    if (plan.center) {
      const std::int64_t n = rows_of_a(plan, stored_).cols;
      copy(Panel<T>{before.mean.high, 1, n, n}, Panel<T>{buffers_.mean.high, 1, n, n});
      copy(Panel<T>{before.mean.low, 1, n, n}, Panel<T>{buffers_.mean.low, 1, n, n});
    }
    const std::int64_t parts = 2 * measure_count(plan.tall * plan.small);
    SM_LAUNCH(copy_kernel<double>, 1, kThreads, 0, context_.stream,
              (Panel<double>{&before.of_a->scale, 1, parts, parts}),
              (Panel<double>{&buffers_.of_a->scale, 1, parts, parts}));
  }
  double norm() const {
    State state{};
    cuda::read(context_.stream, &state, buffers_.orth.state, sizeof state);
    const double norm = sum(buffers_.of_a, measure_count(plan_.tall * plan_.small));
    if (!std::isfinite(norm))
      throw LinAlgError("randomized_svd: A contains NaN or Inf, or its norm exceeds float64");
    if (state.overflowed != 0)
      throw LinAlgError("randomized_svd: a product with A exceeds the range of its type");
    return norm;
  }
  double norm_of(Panel<T> y) {
    SM_LAUNCH(measure_kernel<T>, measure_count(y.rows * y.cols), kThreads, 0, context_.stream,
              y.data, y.rows, y.cols, y.stride, std::int64_t{1}, buffers_.of_t);
    return sum(buffers_.of_t, measure_count(y.rows * y.cols));
  }
  // out <- Y^T Y / unit^2
  void gram_of(Panel<T> y, double unit, double* out) {
    const std::int64_t n = y.cols;
    const double scale = 1 / std::max(unit, std::numeric_limits<double>::min());
    SM_LAUNCH(scaled_gram_kernel<T>, static_cast<unsigned>(n * n), kThreads, 0, context_.stream, y,
              scale, buffers_.orth.gram);
    cuda::read(context_.stream, out, buffers_.orth.gram,
               static_cast<std::size_t>(n * n) * sizeof(double));
  }
  std::vector<double> singular_values(std::int64_t count) const {
    std::vector<T> found(static_cast<std::size_t>(count));
    cuda::read(context_.stream, found.data(), buffers_.sigma, found.size() * sizeof(T));
    return {found.begin(), found.end()};
  }
  void finish(const SvdPlan& plan, MatrixView u, VectorView s, MatrixView vh, SvdInfo* info) {
    plan_ = plan;
    info_ = info;
    u_ = {static_cast<T*>(u.data), u.rows, u.cols, u.row_stride};
    s_ = {static_cast<T*>(s.data), 1, s.size, s.size};
    vh_ = {static_cast<T*>(vh.data), vh.rows, vh.cols, vh.row_stride};
  }
  void report(bool converged) {
    SM_LAUNCH(report_kernel, 1, 1, 0, context_.stream, info_, converged);
  }

 private:
  struct Lent {
    Context context;
    std::shared_ptr<void> memory;
  };
  CudaEngine(Lent lent, const StridedMatrixView& b, const SvdPlan& plan, std::uint64_t seed,
             const SvdAllocate& allocate)
      : CudaEngine(lent.context, b, plan, seed, {}, {}, {}, nullptr) {
    allocate_ = allocate;
    memory_ = std::move(lent.memory);
  }
  static Lent lent(Context context, const StridedMatrixView& b, const SvdPlan& plan,
                   const SvdAllocate& allocate) {
    context.workspace_bytes = randomized_svd_workspace_cuda(b, plan);
    std::shared_ptr<void> memory = allocate(context.workspace_bytes);
    context.workspace = memory.get();
    return {context, std::move(memory)};
  }
  double sum(const ScaledNorm* parts, unsigned count) const {
    std::vector<ScaledNorm> found(count);
    cuda::read(context_.stream, found.data(), parts, count * sizeof(ScaledNorm));
    Norm all;
    for (const ScaledNorm& part : found) all.add(Norm{part.scale, part.sum});
    return all.value();
  }
  template <class U>
  void cublas(bool trans_a, std::int64_t m, std::int64_t n, std::int64_t k, U alpha, const U* a,
              std::int64_t lda, const U* b, std::int64_t ldb, U beta, U* c, std::int64_t ldc) {
    constexpr DType dtype = dtype_of<U>();
    const cuda::Gemm product{trans_a, false, m,   n,     k,     a,     lda, b,
                             ldb,     c,     ldc, dtype, dtype, alpha, beta};
    cuda::gemm(context_, product, buffers_.orth.gemm);
  }
  // y <- (I - before before^T) y
  void project(Panel<T> y, Panel<T> before, int pass) {
    pass_gemm<true, T>(context_, buffers_.orth, pass, before.cols, y.cols, y.rows, 1, before.data,
                       before.stride, y.data, y.stride, 0, buffers_.c, y.cols);
    pass_gemm<false, T>(context_, buffers_.orth, pass, y.rows, y.cols, before.cols, -1, before.data,
                        before.stride, buffers_.c, y.cols, 1, y.data, y.stride);
  }
  // Scales columns by powers of two: exact.
  void normalize(Panel<T> y) {
    extremes(y);
    SM_LAUNCH(normalize_kernel<T>, dim3(tiles(y.rows, 256), tiles(y.cols, 32)), kThreads, 0,
              context_.stream, y, buffers_.extremes, static_cast<int>(slab_count(y.rows)));
  }
  void extremes(Panel<T> y) {
    SM_LAUNCH(extremes_kernel<T>, dim3(tiles(y.cols, 32), slab_count(y.rows)), kThreads, 0,
              context_.stream, y, buffers_.extremes, buffers_.orth.state);
  }
  // The mean of A's rows, as what is subtracted from B or its transpose.
  Shift<T> shift(bool transposed) const {
    if (!plan_.center) return {};
    return {buffers_.mean.high, buffers_.mean.low, plan_.swapped != transposed};
  }
  // out <- rows first .. first + out.rows of a strided matrix, less their share of `shift`
  void gather(const StridedMatrixView& a, std::int64_t first, Panel<T> out, Shift<T> shift) {
    dispatch_dtype(a.dtype, [&](auto element) {
      using S = decltype(element);
      if constexpr (sizeof(S) <= sizeof(T))
        SM_LAUNCH((gather_kernel<S, T>), blocks_for(out.rows * out.cols), kThreads, 0,
                  context_.stream, static_cast<const S*>(a.data) + first * a.row_stride,
                  a.row_stride, a.col_stride, out, shift, first);
    });
  }
  // y = op(S) x for the stored S
  void product(bool transposed, Panel<T> x, Panel<T> y) {
    const StridedMatrixView& s = stored_.view;
    if (stored_.in_place) {
      cublas<T>(transposed, y.rows, y.cols, x.rows, 1, static_cast<const T*>(s.data), s.row_stride,
                x.data, x.stride, 0, y.data, y.stride);
      return;
    }
    const std::int64_t height = stored_.panel_rows();
    for (std::int64_t first = 0; first < s.rows; first += height) {
      const std::int64_t rows = std::min(height, s.rows - first);
      gather(s, first, {buffers_.converted, rows, s.cols, s.cols}, shift(stored_.transposed));
      if (transposed)
        cublas<T>(true, s.cols, y.cols, rows, 1, buffers_.converted, s.cols,
                  x.data + first * x.stride, x.stride, first > 0, y.data, y.stride);
      else
        cublas<T>(false, rows, y.cols, s.cols, 1, buffers_.converted, s.cols, x.data, x.stride, 0,
                  y.data + first * y.stride, y.stride);
    }
  }

  const Context context_;
  SvdPlan plan_;
  const StridedMatrixView b_;
  const Stored stored_;
  const std::uint64_t seed_;
  SvdInfo* info_;
  Buffers<T> buffers_;
  Panel<T> u_, s_, vh_;
  std::array<std::int64_t, 2> vectors_{};  // of the small SVD: their length and their number
  SvdAllocate allocate_;
  std::shared_ptr<void> memory_;
};

}  // namespace

void randomized_svd_cuda(const Context& context, const StridedMatrixView& b, const SvdPlan& plan,
                         std::uint64_t seed, MatrixView u, VectorView s, MatrixView vh,
                         SvdInfo* info) {
  const auto decompose = [&](auto element) {
    CudaEngine<decltype(element)> engine(context, b, plan, seed, u, s, vh, info);
    SvdAlgorithm<CudaEngine<decltype(element)>>(engine, plan).run();
  };
  if (b.dtype == DType::f64)
    decompose(double{});
  else
    decompose(float{});
}

std::unique_ptr<SvdSearch> svd_to_tolerance_cuda(const Context& context, const StridedMatrixView& b,
                                                 const SvdPlan& plan, double rtol,
                                                 const SvdOptions& options,
                                                 const SvdAllocate& allocate) {
  const auto search = [&](auto element) -> std::unique_ptr<SvdSearch> {
    using Engine = CudaEngine<decltype(element)>;
    const auto start = [&](const SvdPlan& first) {
      return Engine(context, b, first, options.seed, allocate);
    };
    return std::make_unique<SvdToToleranceOf<Engine>>(plan, rtol, options, start);
  };
  return b.dtype == DType::f64 ? search(double{}) : search(float{});
}

std::size_t randomized_svd_workspace_cuda(const StridedMatrixView& b, const SvdPlan& plan) {
  const Stored stored(b, plan.center);
  return b.dtype == DType::f64 ? Buffers<double>(cuda::Arena(nullptr), plan, stored).bytes
                               : Buffers<float>(cuda::Arena(nullptr), plan, stored).bytes;
}

void run_lanes_cuda(const Context& context, const SvdLanes& lanes,
                    const std::function<void(const Context&, std::int64_t)>& run) {
  cuda::SideStreams streams(context.stream, lanes.lanes);
  const auto count = static_cast<std::int64_t>(lanes.lane.size());
  for (std::int64_t i = 0; i < count; ++i) {
    const int lane = lanes.lane[static_cast<std::size_t>(i)];
    if (lane < 0) continue;
    Context own = context;
    own.stream = streams[lane];
    own.workspace = static_cast<unsigned char*>(context.workspace) +
                    static_cast<std::size_t>(lane) * lanes.bytes_of_lane;
    own.workspace_bytes = lanes.bytes_of_lane;
    run(own, i);
  }
  streams.join();
  for (std::int64_t i = 0; i < count; ++i)
    if (lanes.lane[static_cast<std::size_t>(i)] < 0) run(context, i);
}

}  // namespace structmat
