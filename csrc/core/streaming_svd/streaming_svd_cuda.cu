// SPDX-License-Identifier: Apache-2.0
// streaming_svd_cpu.cpp on the GPU: products by cuBLAS, eigenvalue problems by Jacobi's iteration.
// Nothing waits for the device: the unit of the rows, the energy lost and failures stay there.
#include <algorithm>

#include "cuda/arena.h"
#include "cuda/device.h"
#include "cuda/gemm.h"
#include "streaming_svd/streaming_svd_cuda.cuh"
#include "streaming_svd/streaming_svd_kernels.h"
#include "structmat/error.h"
#include "svd/jacobi_cuda.cuh"

namespace structmat {
namespace {

using namespace streaming_svd_cuda;

// An eigenvalue problem's work space.
struct Eigen {
  double *matrix, *turned, *vectors, *unused, *norms, *energies, *unit;
  int *place, *rotated;
  svd_cuda::State* state;

  Eigen(cuda::Arena& arena, std::int64_t size, std::int64_t count)
      : matrix(arena.take<double>(size * size)),
        turned(arena.take<double>(size * size)),
        vectors(arena.take<double>(size * count)),
        unused(arena.take<double>(size * count)),
        norms(arena.take<double>(size)),
        energies(arena.take<double>(size)),
        unit(arena.take<double>(1)),
        place(arena.take<int>(size)),
        rotated(arena.take<int>(svd_cuda::kJacobiSweeps)),
        state(arena.take<svd_cuda::State>(1)) {}

  // energies <- the eigenvalues of `matrix`, positive semidefinite, descending; vectors (size,
  // count) <- the leading eigenvectors.
  void solve(const Context& context, std::int64_t size, std::int64_t count) const {
    // Rows of a semidefinite matrix below its rounding are noise, which never becomes orthogonal.
    const double noise = streaming_svd_noise(size, 1);
    const svd_cuda::Jacobi<double> jacobi{matrix, turned,  norms, energies, unit,
                                          unused, vectors, place, rotated,  state};
    svd_cuda::jacobi_svd<double>(context.stream, jacobi, size, count, noise * noise);
  }
};

struct Buffers {
  double *stack, *ratios, *largest;
  void* gemm;

  Buffers(cuda::Arena& arena, const StreamingSvdState& s) {
    const std::int64_t n = s.buffer.cols, chunk = s.buffer.rows;
    stack = arena.take<double>(((is_exact(s) ? chunk : 2 * s.factor.rows) + 1) * n);
    ratios = arena.take<double>(2);
    largest = arena.take<double>(chunk);
    gemm = arena.take<unsigned char>(cuda::kGemmWorkspace);
  }
  static bool is_exact(const StreamingSvdState& s) { return s.factor.rows == s.buffer.cols; }
};

class Engine {
 public:
  Engine(const Context& context, const StreamingSvdState& s)
      : context_(context),
        s_(s),
        n_(s.buffer.cols),
        keep_(s.factor.rows),
        exact_(Buffers::is_exact(s)),
        arena_(context.workspace),
        buffers_(arena_, s),
        factor_(static_cast<double*>(s.factor.data)),
        mean_(static_cast<double*>(s.mean.data)),
        facts_(static_cast<double*>(s.facts.data)) {}

  void fold(const StridedMatrixView& rows) {
    const StreamingJoin join(s_, rows.rows);
    void* stream = context_.stream;
    const bool ranged = s_.buffer.dtype == DType::f64;
    if (ranged) {
      SM_LAUNCH(largest_kernel, static_cast<unsigned>(rows.rows), kThreads, 0, stream,
                static_cast<const double*>(rows.data), rows.row_stride, n_, s_.decay,
                buffers_.largest);
      SM_LAUNCH(unit_kernel, 1, kThreads, 0, stream, buffers_.largest, rows.rows, join.factor,
                facts_, buffers_.ratios);
    }
    dispatch_dtype(s_.buffer.dtype, [&](auto element) {
      using T = decltype(element);
      SM_LAUNCH(prepare_kernel<T>, tiles(n_, 32), kThreads, 0, stream,
                static_cast<const T*>(rows.data), rows.row_stride, rows.rows, n_, s_.decay,
                1 / decayed_count(s_.decay, rows.rows), join.share, join.between, s_.center, facts_,
                mean_, behind());
    });
    absorb(rows.rows + (s_.center ? 1 : 0), join.factor, ranged ? buffers_.ratios : nullptr);
  }

  void merge(const StreamingSvdState& other) {
    const StreamingJoin join(s_, other.rows - other.buffered);
    void* stream = context_.stream;
    const auto* factor = static_cast<const double*>(other.factor.data);
    const auto* facts = static_cast<const double*>(other.facts.data);
    const double *mine = buffers_.ratios, *theirs = buffers_.ratios + 1;
    SM_LAUNCH(merge_units_kernel, 1, 1, 0, stream, facts_, facts, join.factor, buffers_.ratios);
    double* row = behind();
    if (exact_) {
      scale(factor_, factor_, n_ * n_, join.factor, mine, true);
      SM_LAUNCH(add_kernel, blocks_for(n_ * n_), kThreads, 0, stream, factor, factor_, n_ * n_,
                theirs);
    } else {
      scale(factor, row, keep_ * n_, 1, theirs, false);
      row += keep_ * n_;
    }
    SM_LAUNCH(merge_means_kernel, blocks_for(n_), kThreads, 0, stream, mean_,
              static_cast<const double*>(other.mean.data), facts_, n_, join.share, join.between,
              row);
    const std::int64_t center = s_.center ? 1 : 0;
    if (exact_)
      absorb(center, 1, nullptr);
    else
      absorb(keep_ + center, join.factor, mine);
    SM_LAUNCH(merge_lost_kernel, 1, 1, 0, stream, facts_, facts, theirs);
  }

  void result(std::uint64_t seed, VectorView sigma, MatrixView vh, SvdInfo* info) {
    const std::int64_t k = s_.rank;
    if (exact_) {
      const Eigen eigen(arena_, n_, k);
      SM_LAUNCH(mirror_kernel, blocks_for(n_ * n_), kThreads, 0, context_.stream, factor_,
                eigen.matrix, n_);
      eigen.solve(context_, n_, k);
      finish({eigen.energies, eigen.vectors, 1, k, true}, eigen.rotated, nullptr, sigma, vh, info);
      return;
    }
    const Factors f(arena_, s_);
    SvdOptions options = f.options;
    options.seed = seed;
    Context context = context_;
    context.workspace = f.workspace;
    context.workspace_bytes = f.workspace_bytes;
    randomized_svd(context, f.view, options, {f.u, keep_, k}, {f.sigma, k}, {f.vh, k, n_}, f.info);
    finish({f.sigma, f.vh, n_, 1, false}, nullptr, f.info, sigma, vh, info);
  }

  static std::size_t workspace(const StreamingSvdState& s) {
    const auto with = [&](auto&& add) {
      cuda::Arena arena(nullptr);
      const Buffers buffers(arena, s);
      add(arena);
      return arena.used();
    };
    const std::int64_t size = 2 * s.factor.rows + 1;
    if (Buffers::is_exact(s))
      return with([&](cuda::Arena& arena) { Eigen(arena, s.buffer.cols, s.rank); });
    return std::max(with([&](cuda::Arena& arena) { Eigen(arena, size, s.factor.rows); }),
                    with([&](cuda::Arena& arena) { Factors(arena, s); }));
  }

 private:
  // The decomposition of the factor.
  struct Factors {
    StridedMatrixView view;
    SvdOptions options;
    double *u, *sigma, *vh;
    SvdInfo* info;
    void* workspace;
    std::size_t workspace_bytes;

    Factors(cuda::Arena& arena, const StreamingSvdState& s)
        : view(ConstMatrixView(s.factor)),
          u(arena.take<double>(s.factor.rows * s.rank)),
          sigma(arena.take<double>(s.rank)),
          vh(arena.take<double>(s.rank * s.buffer.cols)),
          info(arena.take<SvdInfo>(1)) {
      options.rank = s.rank;
      options.oversample = s.factor.rows - s.rank;  // a complete basis: it is exact
      Context context;
      context.device = Device::cuda;
      workspace_bytes = randomized_svd_workspace(context, view, options);
      workspace = arena.take<unsigned char>(static_cast<std::int64_t>(workspace_bytes));
    }
  };

  // Where rows that join the factor lie.
  double* behind() const { return exact_ ? buffers_.stack : buffers_.stack + keep_ * n_; }

  void scale(const double* from, double* to, std::int64_t count, double by, const double* ratio,
             bool square) {
    SM_LAUNCH(scale_kernel, blocks_for(count), kThreads, 0, context_.stream, from, to, count, by,
              ratio, square);
  }

  // c (m, n) = op(a) op(b) + beta c
  void gemm(bool trans_a, bool trans_b, std::int64_t m, std::int64_t n, std::int64_t k,
            const double* a, std::int64_t lda, const double* b, std::int64_t ldb, double beta,
            double* c, std::int64_t ldc) {
    constexpr DType wide = DType::f64;
    const cuda::Gemm product{trans_a, trans_b, m,   n,    k,    a, lda, b,
                             ldb,     c,       ldc, wide, wide, 1, beta};
    cuda::gemm(context_, product, buffers_.gemm);
  }

  // The factor of `by` times `ratio` F and `count` rows behind it.
  void absorb(std::int64_t count, double by, const double* ratio) {
    if (exact_) {
      if (by != 1 || ratio != nullptr) scale(factor_, factor_, n_ * n_, by, ratio, true);
      if (count > 0)
        gemm(true, false, n_, n_, count, buffers_.stack, n_, buffers_.stack, n_, 1, factor_, n_);
      return;
    }
    scale(factor_, buffers_.stack, keep_ * n_, by, ratio, false);
    const std::int64_t size = keep_ + count;
    const Eigen eigen(arena_, 2 * keep_ + 1, keep_);
    gemm(false, true, size, size, n_, buffers_.stack, n_, buffers_.stack, n_, 0, eigen.matrix,
         size);
    eigen.solve(context_, size, keep_);
    SM_LAUNCH(lost_kernel, 1, 1, 0, context_.stream, eigen.energies, keep_, size, by, ratio,
              eigen.rotated + svd_cuda::kJacobiSweeps - 1, facts_);
    gemm(true, false, keep_, n_, size, eigen.vectors, keep_, buffers_.stack, n_, 0, factor_, n_);
  }

  void finish(const Vectors& found, const int* rotated, const SvdInfo* inner, VectorView sigma,
              MatrixView vh, SvdInfo* info) {
    const int* last = rotated == nullptr ? nullptr : rotated + svd_cuda::kJacobiSweeps - 1;
    const auto write = [&](auto element) {
      using T = decltype(element);
      SM_LAUNCH(info_kernel<T>, 1, 1, 0, context_.stream, found, n_, s_.rank, facts_, last, inner,
                info);
      SM_LAUNCH(finish_kernel<T>, static_cast<unsigned>(s_.rank), kThreads, 0, context_.stream,
                found, n_, facts_, info, static_cast<T*>(sigma.data), static_cast<T*>(vh.data),
                vh.row_stride);
    };
    if (sigma.dtype == DType::f64)
      write(double{});
    else
      write(float{});
  }

  const Context context_;
  const StreamingSvdState& s_;
  const std::int64_t n_, keep_;
  const bool exact_;
  cuda::Arena arena_;
  const Buffers buffers_;
  double *const factor_, *const mean_, *const facts_;
};

}  // namespace

void streaming_svd_store_cuda(const Context& context, const StridedMatrixView& rows,
                              MatrixView to) {
  dispatch_dtype(to.dtype, [&](auto element) {
    using T = decltype(element);
    SM_LAUNCH(store_kernel<T>, blocks_for(to.rows * to.cols), kThreads, 0, context.stream,
              static_cast<const T*>(rows.data), rows.row_stride, rows.col_stride,
              static_cast<T*>(to.data), to.rows, to.cols);
  });
}
void streaming_svd_store_cuda(const Context& context, const CsrView& rows, MatrixView to) {
  dispatch_dtype(to.dtype, [&](auto element) {
    using T = decltype(element);
    SM_LAUNCH(scatter_kernel<T>, static_cast<unsigned>(to.rows), kThreads, 0, context.stream,
              rows.starts, rows.columns, static_cast<const T*>(rows.values),
              static_cast<T*>(to.data), to.cols);
  });
}
void streaming_svd_fold_cuda(const Context& context, const StreamingSvdState& s,
                             const StridedMatrixView& rows) {
  Engine(context, s).fold(rows);
}
void streaming_svd_merge_cuda(const Context& context, const StreamingSvdState& s,
                              const StreamingSvdState& other) {
  Engine(context, s).merge(other);
}
void streaming_svd_result_cuda(const Context& context, const StreamingSvdState& s,
                               std::uint64_t seed, VectorView sigma, MatrixView vh, SvdInfo* info) {
  Engine(context, s).result(seed, sigma, vh, info);
}
void streaming_svd_check_cuda(const Context& context, const StridedMatrixView& values,
                              double* finite) {
  SM_LAUNCH(assume_kernel, 1, 1, 0, context.stream, finite);
  if (values.rows * values.cols == 0) return;
  dispatch_dtype(values.dtype, [&](auto element) {
    using T = decltype(element);
    SM_LAUNCH(check_kernel<T>, blocks_for(values.rows * values.cols), kThreads, 0, context.stream,
              static_cast<const T*>(values.data), values.rows, values.cols, values.row_stride,
              values.col_stride, finite);
  });
}
std::size_t streaming_svd_workspace_cuda(const StreamingSvdState& s) {
  return Engine::workspace(s);
}

}  // namespace structmat
