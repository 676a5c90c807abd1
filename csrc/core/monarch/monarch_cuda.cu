// SPDX-License-Identifier: Apache-2.0
#include "cuda/column_sums.h"
#include "cuda/device.h"
#include "cuda/strided_product.h"
#include "monarch/monarch_fused_cuda.cuh"
#include "monarch/monarch_kernels.h"
#include "monarch/monarch_maps_cuda.h"
#include "monarch/monarch_plan.h"

namespace structmat {
namespace {

using monarch::Maps;
using monarch::Sizes;

monarch::DeviceFacts device_facts() {
  return {cuda::multiprocessors(), cuda::max_shared_bytes()};
}

}  // namespace

std::size_t monarch_linear_workspace_cuda(std::int64_t tokens, const MonarchWeights& w,
                                          bool with_hidden) {
  return monarch::forward_plan(w, tokens, with_hidden, device_facts()).workspace_bytes;
}

std::size_t monarch_linear_backward_workspace_cuda(std::int64_t tokens, const MonarchWeights& w) {
  return monarch::backward_plan(Sizes(w), tokens, w.w1.dtype, device_facts()).workspace_bytes;
}

void monarch_linear_cuda(const Context& context, ConstMatrixView x, const MonarchWeights& w,
                         ConstVectorView bias, Activation activation, MatrixView y, void* hidden) {
  const Maps maps(w, x.rows, x.dtype);
  const monarch::ForwardPlan plan =
      monarch::forward_plan(w, x.rows, hidden != nullptr, device_facts());
  if (hidden == nullptr) hidden = context.workspace;
  const cuda::StridedProduct first = maps.hidden(x, hidden);
  cuda::StridedProduct second = maps.output(hidden, y);
  second.bias = bias.data, second.activation = activation;
  if (plan.fused) {
    dispatch_dtype(x.dtype, [&](auto element) {
      using T = decltype(element);
      if constexpr (sizeof(T) == 2)
        monarch::fused<T>(context, plan.tile, first, second, monarch::run_of(Sizes(w)));
    });
    return;
  }
  cuda::multiply(context, first);
  cuda::multiply(context, second);
}

void monarch_linear_backward_cuda(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                  const MonarchWeights& w, const void* hidden,
                                  const MonarchGradients& grads) {
  const Sizes s(w);
  const monarch::BackwardPlan plan = monarch::backward_plan(s, dy.rows, dy.dtype, device_facts());
  const Maps maps(w, dy.rows, dy.dtype);
  char* const space = static_cast<char*>(context.workspace);  // dh, then h
  void* const partial = space + plan.hidden_bytes;
  const auto sum = [&](cuda::StridedProduct product, const monarch::SumPlan& parts) {
    product.splits = parts.split.count, product.split_inner = parts.split.inner;
    product.partial = partial;
    cuda::multiply(context, product);
  };
  if (grads.x.data != nullptr || grads.w1 != nullptr) {
    cuda::multiply(context, maps.hidden_gradient(dy, space));
    if (grads.x.data != nullptr) cuda::multiply(context, maps.input_gradient(space, grads.x));
    if (grads.w1 != nullptr) sum(maps.w1_gradient(space, x, grads.w1), plan.w1);
  }
  if (grads.w2 != nullptr) {
    if (hidden == nullptr) cuda::multiply(context, maps.hidden(x, space)), hidden = space;
    sum(maps.w2_gradient(dy, hidden, grads.w2), plan.w2);
  }
  if (grads.bias.data != nullptr) cuda::column_sums(context, dy, partial, grads.bias);
}

}  // namespace structmat
