// SPDX-License-Identifier: Apache-2.0
#include "structmat/low_rank.h"

#include <tuple>
#include <vector>

#include "convert.h"

namespace structmat::torch_bindings {
namespace {

struct Factors {  // U (m, r), V (r, n)
  Tensor u_rows, v_rows;
  ConstMatrixView u, v;

  Factors(const char* op, const Tensor& x, const Tensor& U, const Tensor& V)
      : u_rows(with_contiguous_rows(U)), v_rows(with_contiguous_rows(V)) {
    check_same_device(x, U, op, "U");
    check_same_device(x, V, op, "V");
    u = matrix_view(u_rows, op, "U");
    v = matrix_view(v_rows, op, "V");
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& U, const Tensor& V,
                                   const std::optional<Tensor>& bias, bool keep_hidden) {
  constexpr const char* op = "low_rank_linear";
  const Factors w(op, x, U, V);
  const Bias b(x, bias, op);
  const Rows rows(x, op, "x");
  Scope scope(x);
  Tensor y = new_rows(x, w.u.rows);
  Tensor h = keep_hidden ? new_rows(x, w.u.cols) : Tensor();
  const std::int64_t tokens = rows.view.rows;
  scope.lend_workspace(x, low_rank_linear_workspace(scope.context, tokens, w.u.rows, rows.view.cols,
                                                    w.u.cols, rows.view.dtype, keep_hidden));
  MatrixView hidden;
  if (keep_hidden) hidden = {h.data_ptr(), rows.view.dtype, tokens, w.u.cols, w.u.cols};
  structmat::low_rank_linear(scope.context, rows.view, w.u, w.v, b.view,
                             {y.data_ptr(), rows.view.dtype, tokens, w.u.rows, w.u.rows}, hidden);
  return {y, h};
}

Tensor low_rank_linear(const Tensor& x, const Tensor& U, const Tensor& V,
                       const std::optional<Tensor>& bias) {
  return std::get<0>(forward(x, U, V, bias, false));
}

std::tuple<Tensor, Tensor> low_rank_linear_train(const Tensor& x, const Tensor& U, const Tensor& V,
                                                 const std::optional<Tensor>& bias,
                                                 bool keep_hidden) {
  auto result = forward(x, U, V, bias, keep_hidden);
  if (!keep_hidden) std::get<1>(result) = nothing(x);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> low_rank_linear_backward(
    const Tensor& dy, const std::optional<Tensor>& x, const Tensor& U, const Tensor& V,
    const std::optional<Tensor>& hidden, bool need_x, bool need_bias) {
  constexpr const char* op = "low_rank_linear_backward";
  const Factors w(op, dy, U, V);
  const Rows dy_rows(dy, op, "dy");
  std::optional<Rows> x_rows, h_rows;
  if (x) x_rows.emplace(*x, op, "x");
  if (hidden) h_rows.emplace(*hidden, op, "hidden");
  Scope scope(dy);
  const DType dtype = dy_rows.view.dtype;
  const std::int64_t m = w.u.rows, r = w.u.cols, n = w.v.cols, tokens = dy_rows.view.rows;

  LowRankGradients grads;
  Tensor dx = need_x ? new_rows(dy, n) : nothing(dy);
  Tensor dU = hidden ? new_tensor(U, {m, r}) : nothing(dy);
  Tensor dV = x ? new_tensor(V, {r, n}) : nothing(dy);
  Tensor db = need_bias ? new_tensor(dy, {m}) : nothing(dy);
  if (need_x) grads.x = {dx.data_ptr(), dtype, tokens, n, n};
  if (hidden) grads.u = {dU.data_ptr(), dtype, m, r, r};
  if (x) grads.v = {dV.data_ptr(), dtype, r, n, n};
  if (need_bias) grads.bias = {db.data_ptr(), dtype, m};
  scope.lend_workspace(dy, low_rank_linear_backward_workspace(scope.context, tokens, m, r, dtype));
  structmat::low_rank_linear_backward(scope.context, dy_rows.view,
                                      x_rows ? x_rows->view : ConstMatrixView(), w.u, w.v,
                                      h_rows ? h_rows->view : ConstMatrixView(), grads);
  return {dx, dU, dV, db};
}

}  // namespace

STRUCTMAT_REGISTER("low_rank_linear", &low_rank_linear)
STRUCTMAT_REGISTER("low_rank_linear_train", &low_rank_linear_train)
STRUCTMAT_REGISTER("low_rank_linear_backward", &low_rank_linear_backward)

}  // namespace structmat::torch_bindings
