// SPDX-License-Identifier: Apache-2.0
#include "structmat/monarch.h"

#include <string>

#include "checker.h"
#include "monarch/monarch_kernels.h"
#include "monarch/monarch_sizes.h"

namespace structmat {
namespace {

using monarch::Sizes;

Sizes check_weights(const char* op, const Checker& check, const MonarchWeights& w) {
  check.array("W1", w.w1);
  check.array("W2", w.w2);
  const auto& [K, J1, R1, I] = w.w1.sizes;
  const auto& [J, L, K2, R] = w.w2.sizes;
  const std::string shapes =
      std::string(op) + ": W1 is " + Checker::shape(w.w1) + " and W2 is " + Checker::shape(w.w2);
  STRUCTMAT_CHECK(K > 0 && J > 0, shapes + ", wanted at least one block in each");
  if (w.interleaved_hidden)
    STRUCTMAT_CHECK(J1 == 1 && K2 == 1 && K * R1 == J * R,
                    shapes + ", wanted (K, 1, Q, I) and (J, L, 1, S) with K Q = J S");
  else
    STRUCTMAT_CHECK(J1 == J && K2 == K && R1 == R,
                    shapes + ", wanted (K, J, R, I) and (J, L, K, R)");
  return Sizes(w);
}

}  // namespace

std::size_t monarch_linear_workspace(const Context& context, std::int64_t tokens,
                                     const MonarchWeights& weights, bool with_hidden) {
  if (context.device == Device::cpu) return 0;
  return monarch_linear_workspace_cuda(tokens, weights, with_hidden);
}

std::size_t monarch_linear_backward_workspace(const Context& context, std::int64_t tokens,
                                              const MonarchWeights& weights, bool) {
  if (context.device == Device::cpu) return 0;
  return monarch_linear_backward_workspace_cuda(tokens, weights);
}

void monarch_linear(const Context& context, ConstMatrixView x, const MonarchWeights& weights,
                    ConstVectorView bias, Activation activation, MatrixView y, void* hidden) {
  constexpr const char* op = "monarch_linear";
  const Checker check(op, x.dtype);
  const Sizes sizes = check_weights(op, check, weights);
  check.matrix("x", x, x.rows, sizes.n());
  if (bias.data != nullptr) check.vector("bias", bias, sizes.m());
  check.matrix("y", y, x.rows, sizes.m());
  check.workspace(context, monarch_linear_workspace(context, x.rows, weights, hidden != nullptr));
  if (context.device == Device::cuda)
    monarch_linear_cuda(context, x, weights, bias, activation, y, hidden);
  else
    monarch_linear_cpu(context, x, weights, bias, activation, y, hidden);
}

void monarch_linear_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                             const MonarchWeights& weights, const void* hidden,
                             const MonarchGradients& grads) {
  constexpr const char* op = "monarch_linear_backward";
  const Checker check(op, dy.dtype);
  const Sizes sizes = check_weights(op, check, weights);
  check.matrix("dy", dy, dy.rows, sizes.m());
  if (grads.x.data != nullptr) check.matrix("the gradient of x", grads.x, dy.rows, sizes.n());
  if (grads.w1 != nullptr || grads.w2 != nullptr) check.matrix("x", x, dy.rows, sizes.n());
  if (grads.bias.data != nullptr) check.vector("the gradient of bias", grads.bias, sizes.m());
  check.workspace(context,
                  monarch_linear_backward_workspace(context, dy.rows, weights, hidden != nullptr));
  if (context.device == Device::cuda)
    monarch_linear_backward_cuda(context, dy, x, weights, hidden, grads);
  else
    monarch_linear_backward_cpu(context, dy, x, weights, hidden, grads);
}

}  // namespace structmat
