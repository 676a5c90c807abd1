// SPDX-License-Identifier: Apache-2.0
// The emulator's gemm(): the same product on the host, sums in fp32 (fp64 for f64), rounded once.
#include "cuda/gemm.h"

#include <vector>

#include "blas.h"
#include "half.h"

namespace structmat::cuda {
namespace {

// Rows of the stored matrix, converted to the type of the sum.
template <class T>
std::vector<accumulator_t<T>> widened(const void* data, std::int64_t rows, std::int64_t cols,
                                      std::int64_t stride) {
  std::vector<accumulator_t<T>> out(static_cast<std::size_t>(rows * cols) + 1);
  const T* in = static_cast<const T*>(data);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < cols; ++j) out[i * cols + j] = to_float(in[i * stride + j]);
  return out;
}

template <class T, class Out>
void product(const Gemm& g) {
  using Sum = accumulator_t<T>;
  const auto a = widened<T>(g.a, g.trans_a ? g.k : g.m, g.trans_a ? g.m : g.k, g.lda);
  const auto b = widened<T>(g.b, g.trans_b ? g.n : g.k, g.trans_b ? g.k : g.n, g.ldb);
  std::vector<Sum> sum(static_cast<std::size_t>(g.m * g.n));
  const int m = static_cast<int>(g.m), n = static_cast<int>(g.n), k = static_cast<int>(g.k);
  if (k > 0)
    blas::gemm(g.trans_b ? 'T' : 'N', g.trans_a ? 'T' : 'N', n, m, k, static_cast<Sum>(g.alpha),
               b.data(), g.trans_b ? k : n, a.data(), g.trans_a ? m : k, Sum{0}, sum.data(), n);
  Out* c = static_cast<Out*>(g.c);
  const Out* bias = static_cast<const Out*>(g.bias);
  for (std::int64_t i = 0; i < g.m; ++i)
    for (std::int64_t j = 0; j < g.n; ++j) {
      Sum value = sum[i * g.n + j];
      if (g.beta != 0) value += static_cast<Sum>(g.beta) * to_float(c[i * g.ldc + j]);
      if (bias != nullptr) value += to_float(bias[j]);
      if constexpr (std::is_same_v<Out, double>)
        c[i * g.ldc + j] = value;
      else
        c[i * g.ldc + j] = from_float<Out>(static_cast<float>(value));
    }
}

}  // namespace

void gemm(const Context&, const Gemm& g, void*) {
  if (g.m == 0 || g.n == 0) return;
  dispatch_dtype(g.dtype, [&](auto element) {
    using T = decltype(element);
    if (g.out == g.dtype) return product<T, T>(g);
    if constexpr (sizeof(T) == 2) product<T, float>(g);
  });
}

}  // namespace structmat::cuda
