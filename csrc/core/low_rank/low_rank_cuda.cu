// SPDX-License-Identifier: Apache-2.0
// Many tokens: cuBLAS products, the bias in their epilogue. Few tokens: the decode kernel.
#include <algorithm>

#include "cuda/column_sums.h"
#include "cuda/gemm.h"
#include "half.h"
#include "low_rank/low_rank_decode_cuda.cuh"
#include "low_rank/low_rank_kernels.h"
#include "low_rank/low_rank_plan.h"

namespace structmat {
namespace {

using low_rank::decode;
using low_rank::DecodeArgs;

// c = op(a) op(b) (+ bias)
void multiply(const Context& context, ConstMatrixView a, bool trans_a, ConstMatrixView b,
              bool trans_b, MatrixView c, const void* bias, void* workspace) {
  cuda::Gemm g;
  g.trans_a = trans_a, g.trans_b = trans_b;
  g.m = c.rows, g.n = c.cols, g.k = trans_a ? a.rows : a.cols;
  // a single row may have any stride
  g.a = a.data, g.lda = std::max(a.row_stride, a.cols);
  g.b = b.data, g.ldb = std::max(b.row_stride, b.cols);
  g.c = c.data, g.ldc = std::max(c.row_stride, c.cols);
  g.dtype = g.out = a.dtype;
  g.bias = bias;
  cuda::gemm(context, g, workspace);
}

}  // namespace

void low_rank_linear_cuda(const Context& context, ConstMatrixView x, ConstMatrixView u,
                          ConstMatrixView v, ConstVectorView bias, MatrixView y,
                          MatrixView hidden) {
  const low_rank::ForwardPlan plan =
      low_rank::forward_plan(x.rows, u.rows, x.cols, u.cols, x.dtype, hidden.data != nullptr);
  char* workspace = static_cast<char*>(context.workspace);
  if (plan.decode) {
    DecodeArgs first{}, second{};
    first.weight = v.data, first.weight_stride = v.row_stride;
    first.rows = v.rows, first.cols = v.cols, first.tokens = second.tokens = x.rows;
    first.in = x.data, first.in_stride = x.row_stride;
    first.out = workspace;
    second.weight = u.data, second.weight_stride = u.row_stride;
    second.rows = u.rows, second.cols = u.cols;
    second.in = workspace, second.in_splits = plan.first.splits;
    second.bias = bias.data;
    second.out = y.data, second.out_stride = y.row_stride;
    dispatch_dtype(x.dtype, [&](auto element) {
      decode<decltype(element), true>(context, plan.first, first);
      decode<decltype(element), false>(context, plan.second, second);
    });
    return;
  }
  if (hidden.data == nullptr) hidden = {workspace, x.dtype, x.rows, u.cols, u.cols};
  workspace += plan.hidden_bytes;
  multiply(context, x, false, v, true, hidden, nullptr, workspace);
  multiply(context, hidden, false, u, true, y, bias.data, workspace);
}

void low_rank_linear_backward_cuda(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                   ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                                   const LowRankGradients& grads) {
  const low_rank::BackwardPlan plan = low_rank::backward_plan(dy.rows, u.rows, u.cols, dy.dtype);
  char* workspace = static_cast<char*>(context.workspace);
  const MatrixView dh(workspace, dy.dtype, dy.rows, u.cols, u.cols);
  workspace += plan.hidden_bytes;
  void* partial = workspace;
  workspace += plan.partial_bytes;
  if (grads.x.data != nullptr || grads.v.data != nullptr)
    multiply(context, dy, false, u, false, dh, nullptr, workspace);
  if (grads.x.data != nullptr) multiply(context, dh, false, v, false, grads.x, nullptr, workspace);
  if (grads.u.data != nullptr)
    multiply(context, dy, true, hidden, false, grads.u, nullptr, workspace);
  if (grads.v.data != nullptr) multiply(context, dh, true, x, false, grads.v, nullptr, workspace);
  if (grads.bias.data != nullptr) cuda::column_sums(context, dy, partial, grads.bias);
}

}  // namespace structmat
