// SPDX-License-Identifier: Apache-2.0
#include "monarch/monarch_simd.h"

#include "monarch/monarch_gradient_simd.h"
#include "simd.h"

namespace structmat {
namespace {

// body(Monarch) for the dtype.
template <class Body>
void with_kernels(DType dtype, const Context& context, const MonarchWeights& weights, Body&& body) {
#if defined(__AVX512F__)
  if (dtype == DType::bf16 && simd_level() >= Simd::avx512bf16)
    return body(Monarch<bfloat16, true>{context, weights, Sizes(weights)});
#endif
  dispatch_dtype(dtype, [&](auto element) {
    body(Monarch<decltype(element)>{context, weights, Sizes(weights)});
  });
}

}  // namespace

namespace STRUCTMAT_SIMD {

void monarch_forward(const Context& context, ConstMatrixView x, const MonarchWeights& weights,
                     ConstVectorView bias, Activation activation, MatrixView y, void* hidden) {
  with_kernels(x.dtype, context, weights,
               [&](const auto& monarch) { monarch.forward(x, bias.data, activation, y, hidden); });
}

void monarch_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                      const MonarchWeights& weights, const void* hidden,
                      const MonarchGradients& grads) {
  with_kernels(dy.dtype, context, weights,
               [&](const auto& monarch) { monarch.backward(dy, x, hidden, grads); });
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
