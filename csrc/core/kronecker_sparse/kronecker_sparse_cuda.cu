// SPDX-License-Identifier: Apache-2.0
// One strided product each, whose batches are the pairs (a, d).
#include "cuda/column_sums.h"
#include "cuda/device.h"
#include "cuda/strided_product.h"
#include "kronecker_sparse/kronecker_sparse_kernels.h"
#include "monarch/monarch_plan.h"

namespace structmat {
namespace {

using cuda::Axis;

struct Factor {
  std::int64_t A, B, C, D;
  std::int64_t tokens;
  DType dtype;

  Factor(const ConstArrayView& w, std::int64_t token_count)
      : A(w.sizes[0]),
        B(w.sizes[1]),
        C(w.sizes[2]),
        D(w.sizes[3]),
        tokens(token_count),
        dtype(w.dtype) {}

  cuda::StridedProduct product(std::int64_t rows, std::int64_t cols, std::int64_t inner) const {
    cuda::StridedProduct p;
    p.dtype = dtype;
    p.batches = A * D, p.rows = rows, p.cols = cols, p.inner = inner;
    return p;
  }
  // A matrix of tokens whose columns are (a, count, d).
  cuda::Operand rows(const void* data, std::int64_t row_stride, std::int64_t count) const {
    return {data, pair(count * D, 1), Axis::linear(row_stride), Axis::linear(D)};
  }
  cuda::Operand weight(const ConstArrayView& w) const {  // (b, c)
    return {w.data, pair(w.strides[0], w.strides[3]), Axis::linear(w.strides[1]),
            Axis::linear(w.strides[2])};
  }
  cuda::Operand weight_gradient(void* w) const {
    return {w, pair(B * C * D, 1), Axis::linear(C * D), Axis::linear(D)};
  }
  monarch::SumPlan sum_plan(const monarch::DeviceFacts& device) const {
    return monarch::sum_plan(A * D, B, C, tokens, dtype, device);
  }
  std::size_t partial_bytes(const monarch::DeviceFacts& device) const {
    return std::max(sum_plan(device).partial_bytes,
                    cuda::column_sum_bytes(tokens, A * B * D, dtype));
  }

 private:
  Axis pair(std::int64_t a, std::int64_t d) const {
    return Axis::split(std::max<std::int64_t>(D, 1), a, d);
  }
};

monarch::DeviceFacts device_facts() {
  return {cuda::multiprocessors(), cuda::max_shared_bytes()};
}

}  // namespace

std::size_t kronecker_sparse_linear_backward_workspace_cuda(std::int64_t tokens,
                                                            const ConstArrayView& w) {
  return Factor(w, tokens).partial_bytes(device_facts());
}

void kronecker_sparse_linear_cuda(const Context& context, ConstMatrixView x,
                                  const ConstArrayView& w, ConstVectorView bias,
                                  Activation activation, MatrixView y) {
  const Factor f(w, x.rows);
  cuda::StridedProduct p = f.product(f.tokens, f.B, f.C);
  p.a = f.rows(x.data, x.row_stride, f.C);
  p.b = f.weight(w);
  p.c = f.rows(y.data, y.row_stride, f.B);
  p.bias = bias.data, p.activation = activation;
  cuda::multiply(context, p);
}

void kronecker_sparse_linear_backward_cuda(const Context& context, ConstMatrixView dy,
                                           ConstMatrixView x, const ConstArrayView& w,
                                           const KroneckerSparseGradients& grads) {
  const Factor f(w, dy.rows);
  if (grads.x.data != nullptr) {
    cuda::StridedProduct p = f.product(f.tokens, f.C, f.B);
    p.a = f.rows(dy.data, dy.row_stride, f.B);
    p.b = f.weight(w);
    std::swap(p.b.row, p.b.col);
    p.c = f.rows(grads.x.data, grads.x.row_stride, f.C);
    cuda::multiply(context, p);
  }
  if (grads.w != nullptr) {
    const monarch::SumPlan plan = f.sum_plan(device_facts());
    cuda::StridedProduct p = f.product(f.B, f.C, f.tokens);
    p.tall = true;
    p.a = f.rows(dy.data, dy.row_stride, f.B);
    p.b = f.rows(x.data, x.row_stride, f.C);
    std::swap(p.a.row, p.a.col);
    std::swap(p.b.row, p.b.col);
    p.c = f.weight_gradient(grads.w);
    p.splits = plan.split.count, p.split_inner = plan.split.inner;
    p.partial = context.workspace;
    cuda::multiply(context, p);
  }
  if (grads.bias.data != nullptr) cuda::column_sums(context, dy, context.workspace, grads.bias);
}

}  // namespace structmat
