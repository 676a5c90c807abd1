// SPDX-License-Identifier: Apache-2.0
#include "structmat/monarch.h"

#include <tuple>

#include "convert.h"

namespace structmat::torch_bindings {
namespace {

MonarchWeights weights_of(const char* op, const Tensor& x, const Tensor& W1, const Tensor& W2,
                          bool interleaved_hidden, bool interleaved_output) {
  check_same_device(x, W1, op, "W1");
  check_same_device(x, W2, op, "W2");
  return {array_view(W1, op, "W1"), array_view(W2, op, "W2"), interleaved_hidden,
          interleaved_output};
}

std::int64_t outputs(const MonarchWeights& w) {
  return w.w2.sizes[0] * w.w2.sizes[1];
}

// y, and h (J, T, hidden units of an output block) if it is to be kept.
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& W1, const Tensor& W2,
                                   const std::optional<Tensor>& bias, Activation activation,
                                   bool interleaved_hidden, bool interleaved_output,
                                   bool keep_hidden) {
  constexpr const char* op = "monarch_linear";
  const MonarchWeights w = weights_of(op, x, W1, W2, interleaved_hidden, interleaved_output);
  const Bias b(x, bias, op);
  const Rows rows(x, op, "x");
  Scope scope(x);
  const std::int64_t m = outputs(w), tokens = rows.view.rows;
  Tensor y = new_rows(x, m);
  Tensor h = keep_hidden ? new_tensor(x, {w.w2.sizes[0], tokens, w.w2.sizes[2] * w.w2.sizes[3]})
                         : Tensor();
  scope.lend_workspace(x, monarch_linear_workspace(scope.context, tokens, w, keep_hidden));
  structmat::monarch_linear(scope.context, rows.view, w, b.view, activation,
                            {y.data_ptr(), rows.view.dtype, tokens, m, m},
                            keep_hidden ? h.data_ptr() : nullptr);
  return {y, h};
}

Tensor monarch_linear(const Tensor& x, const Tensor& W1, const Tensor& W2,
                      const std::optional<Tensor>& bias, std::int64_t activation,
                      bool interleaved_hidden, bool interleaved_output) {
  return std::get<0>(forward(x, W1, W2, bias, activation_of(activation, "monarch_linear"),
                             interleaved_hidden, interleaved_output, false));
}

std::tuple<Tensor, Tensor> monarch_linear_train(const Tensor& x, const Tensor& W1, const Tensor& W2,
                                                const std::optional<Tensor>& bias,
                                                bool interleaved_hidden, bool interleaved_output,
                                                bool keep_hidden) {
  auto result = forward(x, W1, W2, bias, Activation::none, interleaved_hidden, interleaved_output,
                        keep_hidden);
  if (!keep_hidden) std::get<1>(result) = nothing(x);
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> monarch_linear_backward(
    const Tensor& dy, const std::optional<Tensor>& x, const Tensor& W1, const Tensor& W2,
    const std::optional<Tensor>& hidden, bool interleaved_hidden, bool interleaved_output,
    bool need_x, bool need_W1, bool need_W2, bool need_bias) {
  constexpr const char* op = "monarch_linear_backward";
  const MonarchWeights w = weights_of(op, dy, W1, W2, interleaved_hidden, interleaved_output);
  const Rows dy_rows(dy, op, "dy");
  const std::int64_t tokens = dy_rows.view.rows, n = w.w1.sizes[0] * w.w1.sizes[3];
  std::optional<Rows> x_rows;
  std::optional<Tensor> h;
  if (x) {
    check_same_device(dy, *x, op, "x");
    x_rows.emplace(*x, op, "x");
  }
  STD_TORCH_CHECK(x || !(need_W1 || need_W2), op,
                  ": the gradients of the weights need x, got None");
  if (hidden) {
    check_same_device(dy, *hidden, op, "hidden");
    const std::int64_t J = w.w2.sizes[0], S = w.w2.sizes[2] * w.w2.sizes[3];
    STD_TORCH_CHECK(hidden->dim() == 3 && hidden->size(0) == J && hidden->size(1) == tokens &&
                        hidden->size(2) == S,
                    op, ": hidden must be (", J, ", ", tokens, ", ", S, ")");
    STD_TORCH_CHECK(hidden->scalar_type() == dy.scalar_type(), op, ": hidden is ",
                    hidden->scalar_type(), ", wanted ", dy.scalar_type());
    h = torch::stable::contiguous(*hidden);
  }
  Scope scope(dy);
  const DType dtype = dy_rows.view.dtype;

  MonarchGradients grads;
  Tensor dx = need_x ? new_rows(dy, n) : nothing(dy);
  Tensor dW1 = need_W1 ? new_tensor(W1, W1.sizes()) : nothing(dy);
  Tensor dW2 = need_W2 ? new_tensor(W2, W2.sizes()) : nothing(dy);
  Tensor db = need_bias ? new_tensor(dy, {outputs(w)}) : nothing(dy);
  if (need_x) grads.x = {dx.data_ptr(), dtype, tokens, n, n};
  if (need_W1) grads.w1 = dW1.data_ptr();
  if (need_W2) grads.w2 = dW2.data_ptr();
  if (need_bias) grads.bias = {db.data_ptr(), dtype, outputs(w)};
  scope.lend_workspace(
      dy, monarch_linear_backward_workspace(scope.context, tokens, w, hidden.has_value()));
  structmat::monarch_linear_backward(scope.context, dy_rows.view,
                                     x_rows ? x_rows->view : ConstMatrixView(), w,
                                     h ? h->data_ptr() : nullptr, grads);
  return {dx, dW1, dW2, db};
}

}  // namespace

STRUCTMAT_REGISTER("monarch_linear", &monarch_linear)
STRUCTMAT_REGISTER("monarch_linear_train", &monarch_linear_train)
STRUCTMAT_REGISTER("monarch_linear_backward", &monarch_linear_backward)

}  // namespace structmat::torch_bindings
