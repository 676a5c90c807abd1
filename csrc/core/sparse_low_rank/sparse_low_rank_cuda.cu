// SPDX-License-Identifier: Apache-2.0
#include "cuda/column_sums.h"
#include "cuda/gemm.h"
#include "sparse_low_rank/sparse_base_cuda.cuh"
#include "sparse_low_rank/sparse_few_cuda.cuh"
#include "sparse_low_rank/sparse_low_rank_kernels.h"
#include "sparse_low_rank/sparse_low_rank_plan.h"
#include "sparse_low_rank/sparse_product_cuda.cuh"
#include "sparse_low_rank/sparse_rows_cuda.cuh"
#include "sparse_low_rank/sparse_sampled_cuda.cuh"
#include "sparse_low_rank/sparse_scatter_cuda.cuh"
#include "sparse_low_rank/sparse_spread_cuda.cuh"
#include "sparse_low_rank/sparse_strips_cuda.cuh"
#include "sparse_low_rank/sparse_tiles_cuda.cuh"

namespace structmat {
namespace {

using namespace sparse_low_rank;

bool one_group(const SparsePatternView& pattern) {
  return pattern.rows > 0 && pattern.group >= pattern.rows;
}
Product product_of(std::int64_t tokens, const SparsePatternView& pattern, DType dtype) {
  Product p;
  p.tokens = tokens, p.m = pattern.rows, p.n = pattern.cols, p.nnz = pattern.nnz;
  p.columns = one_group(pattern), p.row_strips = pattern.group == kStrip, p.dtype = dtype;
  return p;
}
Product product_of(std::int64_t tokens, const SparseLowRankWeights& weights) {
  Product p = product_of(tokens, weights.pattern, weights.values.dtype);
  p.r = weights.u.cols, p.base = weights.base.data != nullptr;
  return p;
}
BackwardSpace backward_space(std::int64_t tokens, const SparseLowRankWeights& weights,
                             const SparseTransposeView& transpose,
                             const SparseLowRankGradients& grads, void* workspace) {
  Product p = product_of(tokens, weights);
  p.column_strips = transpose.strip == kStrip;
  const auto has = [](const auto& a) { return a.data != nullptr; };
  const Wanted wanted{has(grads.x), has(grads.u), has(grads.v), has(grads.values), has(grads.bias)};
  return BackwardSpace(p, wanted, cuda::multiprocessors(), cuda::max_shared_bytes(), workspace);
}
DType sum_type(DType dtype) {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}

// c = op(a) op(b) + beta c (+ bias)
struct Gemms {
  const Context& context;
  void* workspace;

  void operator()(ConstMatrixView a, bool trans_a, ConstMatrixView b, bool trans_b, MatrixView c,
                  double beta = 0, const void* bias = nullptr) const {
    cuda::Gemm g;
    g.trans_a = trans_a, g.trans_b = trans_b;
    g.m = c.rows, g.n = c.cols, g.k = trans_a ? a.rows : a.cols;
    // a single row may have any stride
    g.a = a.data, g.lda = std::max(a.row_stride, a.cols);
    g.b = b.data, g.ldb = std::max(b.row_stride, b.cols);
    g.c = c.data, g.ldc = std::max(c.row_stride, c.cols);
    g.dtype = a.dtype, g.out = c.dtype;
    g.beta = beta, g.bias = bias;
    if (g.k == 0 && beta != 0) return;
    cuda::gemm(context, g, workspace);
  }
};

// [x's columns of S | rest], in whole packs.
Joined columns_of(const ConstMatrixView& x, const SparsePatternView& pattern, void* to,
                  std::int64_t k, std::int64_t inner) {
  Joined p;
  p.from = x, p.starts = pattern.starts, p.columns = pattern.columns, p.slabs = pattern.slabs();
  p.count = pattern.nnz / pattern.rows, p.k = k;
  p.to = {to, x.dtype, x.rows, inner, inner};
  return p;
}

// y = h U^T + x base^T + x S^T + bias, in one launch but for `base` and a `hidden` to be kept;
// `sums` is (T, m).
template <class T>
void forward_few(const Context& context, SparseProduct p, const SparseLowRankWeights& w,
                 const ForwardSpace& space, const MatrixView& hidden) {
  const std::int64_t tokens = p.x.rows, m = w.pattern.rows, r = w.u.cols;
  const bool base = w.base.data != nullptr, keep = hidden.data != nullptr && r > 0;
  const Gemms gemm{context, space.gemm};
  const MatrixView sums(space.sums, sum_type(p.x.dtype), tokens, m, m);
  if (base) gemm(p.x, false, w.base, true, sums);
  if (keep) {
    gemm(p.x, false, w.v, true, hidden);
    gemm(hidden, false, w.u, true, sums, base ? 1 : 0);
  }
  if (base || keep) p.sums = sums.data, p.sums_stride = m;
  if (keep || r == 0) return multiply_few<T>(context, p);
  const FewLowRank low{w.v, w.u, space.first, space.hidden, space.sums};
  multiply_few<T>(context, p, &low);
}

template <class T>
void forward(const Context& context, const ConstMatrixView& x, const SparseLowRankWeights& w,
             const void* bias, const MatrixView& y, MatrixView hidden) {
  const std::int64_t tokens = x.rows, m = w.pattern.rows, n = w.pattern.cols, r = w.u.cols;
  const bool base = w.base.data != nullptr;
  constexpr bool half = sizeof(T) == 2;
  const ForwardSpace space(product_of(tokens, w), context.workspace);
  const Gemms gemm{context, space.gemm};
  const bool keep = hidden.data != nullptr;
  if (space.way == Way::columns) {
    Joined left = columns_of(x, w.pattern, space.left, space.k, space.inner), right;
    if (keep)
      gemm(x, false, w.v, true, hidden), left.rest = hidden;
    else if (r > 0)
      gemm(x, false, w.v, true,
           {static_cast<T*>(space.left) + space.k, x.dtype, tokens, r, space.inner});
    join<T>(context, left);
    right.from = {w.values.data, x.dtype, m, left.count, left.count};
    right.count = left.count, right.k = space.k, right.rest = w.u;
    right.to = {space.right, x.dtype, m, space.inner, space.inner};
    join<T>(context, right);
    if (!base) {
      gemm(left.to, false, right.to, true, y, 0, bias);
    } else {
      Rounded out;
      const MatrixView sums = half ? MatrixView(space.sums, DType::f32, tokens, m, m) : y;
      gemm(x, false, w.base, true, sums);
      gemm(left.to, false, right.to, true, sums, 1);
      out.sums = sums.data, out.sums_stride = sums.row_stride, out.bias = bias, out.y = y;
      round_sums<T>(context, out);
    }
    return spread_nan<T>(context, x, y, r > 0 || base);
  }
  if (space.way == Way::dense) {
    const MatrixView weight(space.weight, x.dtype, m, n, whole_packs(n));
    if (keep) gemm(x, false, w.v, true, hidden);
    write_weight<T>(context, w, weight);
    gemm(x, false, weight, true, y, 0, bias);
    return spread_nan<T>(context, x, y, true);
  }
  SparseProduct p;
  p.x = x, p.pattern = w.pattern, p.values = w.values.data, p.bias = bias, p.y = y;
  if (space.way == Way::few) return forward_few<T>(context, p, w, space, hidden);
  if (!keep) hidden = {space.hidden, x.dtype, tokens, r, r};
  if (r > 0) gemm(x, false, w.v, true, hidden);
  if constexpr (half)
    if (space.way == Way::tiles || space.way == Way::strips) {
      if (space.way == Way::tiles)
        multiply_scattered<T>(context, p, hidden, w.u, w.base, false);
      else
        multiply_strips<T>(context, p, {w.pattern, p.values}, hidden, w.u, false, space.strips);
      return spread_nan<T>(context, x, y, space.way == Way::tiles || r > 0);
    }
  if (r > 0 || base) {
    const MatrixView sums = half ? MatrixView(space.sums, DType::f32, tokens, m, m) : y;
    if (base) gemm(x, false, w.base, true, sums);
    if (r > 0) gemm(hidden, false, w.u, true, sums, base ? 1 : 0);
    p.sums = sums.data, p.sums_stride = sums.row_stride;
  }
  multiply_sparse<T>(context, p);
}

// dx = dy W
template <class T>
void input_gradient(const Context& context, const ConstMatrixView& dy, const ConstMatrixView& dh,
                    const SparseLowRankWeights& w, const SparseTransposeView& transpose,
                    const BackwardSpace& space, const MatrixView& dx) {
  const std::int64_t tokens = dy.rows, m = w.pattern.rows, n = w.pattern.cols, r = w.u.cols;
  const bool base = w.base.data != nullptr;
  constexpr bool half = sizeof(T) == 2;
  const Gemms gemm{context, space.gemm};
  if (space.way == Way::dense) {
    const MatrixView weight(space.weight, dy.dtype, m, n, whole_packs(n));
    write_weight<T>(context, w, weight);
    gemm(dy, false, weight, false, dx);
    return spread_nan<T>(context, dy, dx, true);
  }
  const MatrixView sums = half ? MatrixView(space.sums, DType::f32, tokens, n, n) : dx;
  const auto dense_part = [&] {
    if (base) gemm(dy, false, w.base, false, sums);
    if (r > 0) gemm(dh, false, w.v, false, sums, base ? 1 : 0);
  };
  if (space.way == Way::columns) {
    if (r == 0 && !base)
      gemm(ConstMatrixView(nullptr, dy.dtype, tokens, 0, 0), false,
           ConstMatrixView(nullptr, dy.dtype, 0, n, n), false, sums);  // zero
    dense_part();
    const std::int64_t k = space.k;
    gemm(dy, false, {w.values.data, dy.dtype, m, k, k}, false,
         {space.columns, sum_type(dy.dtype), tokens, k, k});
    Rounded out;
    out.sums = sums.data, out.sums_stride = sums.row_stride, out.added = space.columns;
    out.count = k, out.starts = w.pattern.starts, out.columns = w.pattern.columns;
    out.slabs = w.pattern.slabs(), out.y = dx;
    round_sums<T>(context, out);
    return spread_nan<T>(context, dy, dx, r > 0 || base);
  }
  if constexpr (half)
    if (space.way == Way::spread) {
      spread_strips<T>(context, dy, {w.pattern, w.values.data}, dh, w.v, space.spread, dx);
      return spread_nan<T>(context, dy, dx, r > 0);
    }
  SparseProduct p;
  p.x = dy, p.pattern = transpose.pattern, p.values = space.values, p.y = dx;
  if constexpr (half)
    if (space.way == Way::strips) {
      multiply_strips<T>(context, p, {transpose.pattern, w.values.data, transpose.permutation}, dh,
                         w.v, true, space.strips);
      return spread_nan<T>(context, dy, dx, r > 0);
    }
  permute<T>(context, w.values.data, transpose.permutation, w.pattern.nnz, space.values);
  if constexpr (half)
    if (space.way == Way::tiles) {
      multiply_scattered<T>(context, p, dh, w.v, w.base, true);
      return spread_nan<T>(context, dy, dx, true);
    }
  if (r > 0 || base) {
    dense_part();
    p.sums = sums.data, p.sums_stride = sums.row_stride;
  }
  if (space.way == Way::few) return multiply_few<T>(context, p);
  multiply_sparse<T>(context, p);
}

// values = (dy^T x) on the support
template <class T>
void sampled(const Context& context, const ConstMatrixView& dy, const ConstMatrixView& x,
             const SparsePatternView& pattern, const SampledSpace& space, void* values) {
  if (space.k > 0) {
    const Joined left = columns_of(x, pattern, space.left, space.k, space.k);
    join<T>(context, left);
    const MatrixView gathered(space.left, x.dtype, x.rows, left.count, space.k);
    return Gemms{context, space.gemm}(dy, true, gathered, false,
                                      {values, x.dtype, pattern.rows, left.count, left.count});
  }
  if (pattern.nnz == 0) return;
  if (!space.strips)
    sample_tiles<T>(context, dy, x, pattern, space, values);
  else if constexpr (sizeof(T) == 2)
    sample_strips<T>(context, dy, x, pattern, space, values);
  if (space.splits > 1) add_parts<T>(context, space, pattern.nnz, values);
}

}  // namespace

std::size_t sparse_low_rank_linear_workspace_cuda(std::int64_t tokens,
                                                  const SparseLowRankWeights& given) {
  SparseLowRankWeights weights = given;
  const NarrowBase narrow(weights);
  return std::max(narrow.bytes(), ForwardSpace(product_of(tokens, weights), nullptr).bytes);
}
std::size_t sparse_low_rank_linear_backward_workspace_cuda(std::int64_t tokens,
                                                           const SparseLowRankWeights& given,
                                                           const SparseTransposeView& transpose,
                                                           const SparseLowRankGradients& grads) {
  SparseLowRankWeights weights = given;
  const NarrowBase narrow(weights);
  return std::max(grads.x.data != nullptr ? narrow.bytes() : 0,
                  backward_space(tokens, weights, transpose, grads, nullptr).bytes);
}
std::size_t sampled_matmul_workspace_cuda(std::int64_t tokens, const SparsePatternView& pattern,
                                          DType dtype) {
  return SampledSpace(product_of(tokens, pattern, dtype), cuda::multiprocessors(), nullptr).bytes;
}

void sparse_low_rank_linear_cuda(const Context& context, ConstMatrixView x,
                                 const SparseLowRankWeights& given, ConstVectorView bias,
                                 MatrixView y, MatrixView hidden) {
  SparseLowRankWeights weights = given;
  const NarrowBase narrow(weights);
  dispatch_dtype(x.dtype, [&](auto element) {
    forward<decltype(element)>(context, x, weights, bias.data, y, hidden);
  });
  narrow.add(context, x, true, y);
}

void sparse_low_rank_linear_backward_cuda(const Context& context, ConstMatrixView dy,
                                          ConstMatrixView x, const SparseLowRankWeights& given,
                                          const SparseTransposeView& transpose,
                                          ConstMatrixView hidden,
                                          const SparseLowRankGradients& grads) {
  SparseLowRankWeights weights = given;
  const NarrowBase narrow(weights);
  const BackwardSpace space = backward_space(dy.rows, weights, transpose, grads, context.workspace);
  const Gemms gemm{context, space.gemm};
  const std::int64_t r = weights.u.cols;
  const MatrixView dh(space.hidden, dy.dtype, dy.rows, r, r);
  if (r > 0 && (grads.x.data != nullptr || grads.v.data != nullptr))
    gemm(dy, false, weights.u, false, dh);
  if (grads.u.data != nullptr) gemm(dy, true, hidden, false, grads.u);
  if (grads.v.data != nullptr) gemm(dh, true, x, false, grads.v);
  if (grads.bias.data != nullptr) cuda::column_sums(context, dy, space.bias_partial, grads.bias);
  dispatch_dtype(dy.dtype, [&](auto element) {
    using T = decltype(element);
    if (grads.x.data != nullptr)
      input_gradient<T>(context, dy, dh, weights, transpose, space, grads.x);
    if (grads.values.data != nullptr)
      sampled<T>(context, dy, x, weights.pattern,
                 SampledSpace(product_of(dy.rows, weights), cuda::multiprocessors(), space.sampled),
                 grads.values.data);
  });
  if (grads.x.data != nullptr) narrow.add(context, dy, false, grads.x);
}

void sampled_matmul_cuda(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                         const SparsePatternView& pattern, VectorView values) {
  const SampledSpace space(product_of(dy.rows, pattern, dy.dtype), cuda::multiprocessors(),
                           context.workspace);
  dispatch_dtype(dy.dtype, [&](auto element) {
    sampled<decltype(element)>(context, dy, x, pattern, space, values.data);
  });
}

}  // namespace structmat
