// SPDX-License-Identifier: Apache-2.0
#include "structmat/kronecker_sparse.h"

#include "checker.h"
#include "kronecker_sparse/kronecker_sparse_kernels.h"

namespace structmat {
namespace {

struct Widths {
  std::int64_t in, out;
  explicit Widths(const ConstArrayView& w)
      : in(w.sizes[0] * w.sizes[2] * w.sizes[3]), out(w.sizes[0] * w.sizes[1] * w.sizes[3]) {}
};

}  // namespace

std::size_t kronecker_sparse_linear_workspace(const Context& context, std::int64_t,
                                              const ConstArrayView&) {
  static_cast<void>(context);
  return 0;
}

std::size_t kronecker_sparse_linear_backward_workspace(const Context& context, std::int64_t tokens,
                                                       const ConstArrayView& w) {
  if (context.device == Device::cpu) return 0;
  return kronecker_sparse_linear_backward_workspace_cuda(tokens, w);
}

void kronecker_sparse_linear(const Context& context, ConstMatrixView x, const ConstArrayView& w,
                             ConstVectorView bias, Activation activation, MatrixView y) {
  const Checker check("kronecker_sparse_linear", x.dtype);
  check.array("W", w);
  const Widths width(w);
  check.matrix("x", x, x.rows, width.in);
  if (bias.data != nullptr) check.vector("bias", bias, width.out);
  check.matrix("y", y, x.rows, width.out);
  check.workspace(context, kronecker_sparse_linear_workspace(context, x.rows, w));
  if (context.device == Device::cuda)
    kronecker_sparse_linear_cuda(context, x, w, bias, activation, y);
  else
    kronecker_sparse_linear_cpu(context, x, w, bias, activation, y);
}

void kronecker_sparse_linear_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                      const ConstArrayView& w,
                                      const KroneckerSparseGradients& grads) {
  const Checker check("kronecker_sparse_linear_backward", dy.dtype);
  check.array("W", w);
  const Widths width(w);
  check.matrix("dy", dy, dy.rows, width.out);
  if (grads.x.data != nullptr) check.matrix("the gradient of x", grads.x, dy.rows, width.in);
  if (grads.w != nullptr) check.matrix("x", x, dy.rows, width.in);
  if (grads.bias.data != nullptr) check.vector("the gradient of bias", grads.bias, width.out);
  check.workspace(context, kronecker_sparse_linear_backward_workspace(context, dy.rows, w));
  if (context.device == Device::cuda)
    kronecker_sparse_linear_backward_cuda(context, dy, x, w, grads);
  else
    kronecker_sparse_linear_backward_cpu(context, dy, x, w, grads);
}

}  // namespace structmat
