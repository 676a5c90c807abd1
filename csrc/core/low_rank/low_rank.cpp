// SPDX-License-Identifier: Apache-2.0
#include "structmat/low_rank.h"

#include "checker.h"
#include "low_rank/low_rank_kernels.h"
#include "low_rank/low_rank_plan.h"

namespace structmat {
std::size_t low_rank_linear_workspace(const Context& context, std::int64_t tokens, std::int64_t m,
                                      std::int64_t n, std::int64_t r, DType dtype,
                                      bool with_hidden) {
  if (context.device == Device::cpu) return 0;
  return low_rank::forward_plan(tokens, m, n, r, dtype, with_hidden).workspace_bytes;
}

std::size_t low_rank_linear_backward_workspace(const Context& context, std::int64_t tokens,
                                               std::int64_t m, std::int64_t r, DType dtype) {
  if (context.device == Device::cpu) return 0;
  return low_rank::backward_plan(tokens, m, r, dtype).workspace_bytes;
}

void low_rank_linear(const Context& context, ConstMatrixView x, ConstMatrixView u,
                     ConstMatrixView v, ConstVectorView bias, MatrixView y, MatrixView hidden) {
  const Checker check("low_rank_linear", x.dtype);
  const std::int64_t tokens = x.rows, n = x.cols, m = u.rows, r = u.cols;
  check.matrix("x", x, tokens, n);
  check.matrix("U", u, m, r);
  check.matrix("V", v, r, n);
  if (bias.data != nullptr) check.vector("bias", bias, m);
  check.matrix("y", y, tokens, m);
  const bool with_hidden = hidden.data != nullptr;
  if (with_hidden) check.matrix("hidden", hidden, tokens, r);
  check.workspace(context,
                  low_rank_linear_workspace(context, tokens, m, n, r, x.dtype, with_hidden));
  if (context.device == Device::cuda)
    low_rank_linear_cuda(context, x, u, v, bias, y, hidden);
  else
    low_rank_linear_cpu(context, x, u, v, bias, y, hidden);
}

void low_rank_linear_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                              ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                              const LowRankGradients& grads) {
  const Checker check("low_rank_linear_backward", dy.dtype);
  const std::int64_t tokens = dy.rows, m = u.rows, r = u.cols, n = v.cols;
  check.matrix("dy", dy, tokens, m);
  check.matrix("U", u, m, r);
  check.matrix("V", v, r, n);
  if (grads.x.data != nullptr) check.matrix("the gradient of x", grads.x, tokens, n);
  if (grads.u.data != nullptr) {
    check.matrix("hidden", hidden, tokens, r);
    check.matrix("the gradient of U", grads.u, m, r);
  }
  if (grads.v.data != nullptr) {
    check.matrix("x", x, tokens, n);
    check.matrix("the gradient of V", grads.v, r, n);
  }
  if (grads.bias.data != nullptr) check.vector("the gradient of bias", grads.bias, m);
  check.workspace(context, low_rank_linear_backward_workspace(context, tokens, m, r, dy.dtype));
  if (context.device == Device::cuda)
    low_rank_linear_backward_cuda(context, dy, x, u, v, hidden, grads);
  else
    low_rank_linear_backward_cpu(context, dy, x, u, v, hidden, grads);
}

}  // namespace structmat
