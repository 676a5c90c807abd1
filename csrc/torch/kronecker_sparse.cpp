// SPDX-License-Identifier: Apache-2.0
#include "structmat/kronecker_sparse.h"

#include <tuple>

#include "convert.h"

namespace structmat::torch_bindings {
namespace {

Tensor kronecker_sparse_linear(const Tensor& x, const Tensor& W, const std::optional<Tensor>& bias,
                               std::int64_t activation) {
  constexpr const char* op = "kronecker_sparse_linear";
  check_same_device(x, W, op, "W");
  const ConstArrayView w = array_view(W, op, "W");
  const Bias b(x, bias, op);
  const Rows rows(x, op, "x");
  Scope scope(x);
  const std::int64_t m = w.sizes[0] * w.sizes[1] * w.sizes[3], tokens = rows.view.rows;
  Tensor y = new_rows(x, m);
  scope.lend_workspace(x, kronecker_sparse_linear_workspace(scope.context, tokens, w));
  structmat::kronecker_sparse_linear(scope.context, rows.view, w, b.view,
                                     activation_of(activation, op),
                                     {y.data_ptr(), rows.view.dtype, tokens, m, m});
  return y;
}

std::tuple<Tensor, Tensor, Tensor> kronecker_sparse_linear_backward(const Tensor& dy,
                                                                    const std::optional<Tensor>& x,
                                                                    const Tensor& W, bool need_x,
                                                                    bool need_W, bool need_bias) {
  constexpr const char* op = "kronecker_sparse_linear_backward";
  check_same_device(dy, W, op, "W");
  const ConstArrayView w = array_view(W, op, "W");
  const Rows dy_rows(dy, op, "dy");
  STD_TORCH_CHECK(x || !need_W, op, ": the gradient of W needs x, got None");
  std::optional<Rows> x_rows;
  if (x) {
    check_same_device(dy, *x, op, "x");
    x_rows.emplace(*x, op, "x");
  }
  Scope scope(dy);
  const DType dtype = dy_rows.view.dtype;
  const std::int64_t tokens = dy_rows.view.rows;
  const std::int64_t n = w.sizes[0] * w.sizes[2] * w.sizes[3];
  const std::int64_t m = w.sizes[0] * w.sizes[1] * w.sizes[3];

  KroneckerSparseGradients grads;
  Tensor dx = need_x ? new_rows(dy, n) : nothing(dy);
  Tensor dW = need_W ? new_tensor(W, W.sizes()) : nothing(dy);
  Tensor db = need_bias ? new_tensor(dy, {m}) : nothing(dy);
  if (need_x) grads.x = {dx.data_ptr(), dtype, tokens, n, n};
  if (need_W) grads.w = dW.data_ptr();
  if (need_bias) grads.bias = {db.data_ptr(), dtype, m};
  scope.lend_workspace(dy, kronecker_sparse_linear_backward_workspace(scope.context, tokens, w));
  structmat::kronecker_sparse_linear_backward(scope.context, dy_rows.view,
                                              x_rows ? x_rows->view : ConstMatrixView(), w, grads);
  return {dx, dW, db};
}

}  // namespace

STRUCTMAT_REGISTER("kronecker_sparse_linear", &kronecker_sparse_linear)
STRUCTMAT_REGISTER("kronecker_sparse_linear_backward", &kronecker_sparse_linear_backward)

}  // namespace structmat::torch_bindings
