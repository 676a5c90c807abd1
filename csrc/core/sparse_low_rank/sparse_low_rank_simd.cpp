// SPDX-License-Identifier: Apache-2.0
#include "sparse_low_rank/sparse_low_rank_simd.h"

#include "low_rank/low_rank_simd.h"
#include "sparse_low_rank/sddmm_simd.h"
#include "sparse_low_rank/sparse_product_simd.h"

namespace structmat {
namespace {

template <class T>
Operand<T> operand(const ConstMatrixView& a, bool transposed = false) {
  return {static_cast<const T*>(a.data), a.row_stride, transposed};
}

template <class T>
void forward(const Context& context, const ConstMatrixView& x, const SparseLowRankWeights& weights,
             const T* bias, const MatrixView& y, const MatrixView& hidden) {
  const SparsePatternView& p = weights.pattern;
  SparseProduct<T>{p.rows,
                   p.cols,
                   weights.u.cols,
                   operand<T>(weights.u),
                   operand<T>(weights.v),
                   weights.base,
                   {p, static_cast<const T*>(weights.values.data)},
                   false,
                   bias}
      .run(context, x, y, hidden);
}

template <class T>
void backward(const Context& context, const ConstMatrixView& dy, const ConstMatrixView& x,
              const SparseLowRankWeights& weights, const SparseTransposeView& transpose,
              const ConstMatrixView& hidden, const SparseLowRankGradients& grads) {
  using S = accumulator_t<T>;
  const SparsePatternView& p = weights.pattern;
  const std::int64_t tokens = dy.rows, m = p.rows, n = p.cols, r = weights.u.cols;
  const bool want_x = grads.x.data != nullptr, want_v = grads.v.data != nullptr && r > 0;
  if (want_x) {
    // Columns that rows share are met group by group, others as rows of the transpose.
    Scratch values_memory, dh_memory;
    SparseMatrix<T> sparse{p, static_cast<const T*>(weights.values.data)};
    const bool shared = p.group > 1;
    if (!shared) {
      T* const values = values_memory.get<T>(p.nnz);
      constexpr std::int64_t kStep = 1 << 14;
      parallel_for(context, ceil_div(p.nnz, kStep), [&](std::int64_t part) {
        for (std::int64_t e = part * kStep; e < std::min(p.nnz, (part + 1) * kStep); ++e)
          values[e] = sparse.values[transpose.permutation[e]];
      });
      sparse = {transpose.pattern, values};
    }
    // A stride that is no multiple of 4 KB: columns of dh are read, too.
    MatrixView dh;
    if (want_v) {
      const std::int64_t stride = r + kLanes<S>;
      dh = {dh_memory.get<S>(tokens * stride), dtype_of<S>(), tokens, r, stride};
    }
    SparseProduct<T>{
        n,      m,     r, operand<T>(weights.v, true), operand<T>(weights.u, true), weights.base,
        sparse, shared}
        .run(context, dy, grads.x, dh);
    if (want_v)
      multiply(context, Product<S, T, T>{r,
                                         n,
                                         tokens,
                                         {static_cast<const S*>(dh.data), dh.row_stride, true},
                                         operand<T>(x),
                                         static_cast<T*>(grads.v.data),
                                         grads.v.row_stride});
  }
  LowRankGradients rest;
  rest.u = grads.u;
  rest.bias = grads.bias;
  if (!want_x) rest.v = grads.v;
  if (rest.u.data != nullptr || rest.v.data != nullptr || rest.bias.data != nullptr) {
    ConstMatrixView u = weights.u, v = weights.v;
    u.rows = m, v.cols = n;  // without data the sizes are those of no rank
    STRUCTMAT_SIMD::low_rank_backward(context, dy, x, u, v, hidden, rest);
  }
  if (grads.values.data != nullptr)
    SampledProduct<T>{dy, x, p, static_cast<T*>(grads.values.data)}.run(context);
}

}  // namespace

namespace STRUCTMAT_SIMD {

void sparse_low_rank_forward(const Context& context, ConstMatrixView x,
                             const SparseLowRankWeights& weights, ConstVectorView bias,
                             MatrixView y, MatrixView hidden) {
  dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    forward<T>(context, x, weights, static_cast<const T*>(bias.data), y, hidden);
  });
}

void sparse_low_rank_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                              const SparseLowRankWeights& weights,
                              const SparseTransposeView& transpose, ConstMatrixView hidden,
                              const SparseLowRankGradients& grads) {
  dispatch_dtype(dy.dtype, [&](auto element) {
    backward<decltype(element)>(context, dy, x, weights, transpose, hidden, grads);
  });
}

void sampled_product(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                     const SparsePatternView& pattern, VectorView values) {
  dispatch_dtype(dy.dtype, [&](auto element) {
    using T = decltype(element);
    SampledProduct<T>{dy, x, pattern, static_cast<T*>(values.data)}.run(context);
  });
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
