// SPDX-License-Identifier: Apache-2.0
// For now loops in double.
#include <algorithm>
#include <vector>

#include "half.h"
#include "sparse_low_rank/sparse_low_rank_kernels.h"
#include "structmat/error.h"

namespace structmat {
namespace {

using Doubles = std::vector<double>;

double get(const void* data, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::f64:
      return static_cast<const double*>(data)[i];
    case DType::f32:
      return static_cast<const float*>(data)[i];
    case DType::bf16:
      return to_float(static_cast<const bfloat16*>(data)[i]);
    default:
      return to_float(static_cast<const float16*>(data)[i]);
  }
}
void set(void* data, DType dtype, std::int64_t i, double value) {
  switch (dtype) {
    case DType::f64:
      static_cast<double*>(data)[i] = value;
      break;
    case DType::f32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case DType::bf16:
      static_cast<bfloat16*>(data)[i] = from_float<bfloat16>(static_cast<float>(value));
      break;
    default:
      static_cast<float16*>(data)[i] = from_float<float16>(static_cast<float>(value));
  }
}
double at(const ConstMatrixView& a, std::int64_t i, std::int64_t j) {
  return get(a.data, a.dtype, i * a.row_stride + j);
}
void put(const MatrixView& a, std::int64_t i, std::int64_t j, double value) {
  set(a.data, a.dtype, i * a.row_stride + j, value);
}

template <class Visit>
void entries(const SparsePatternView& p, Visit&& visit) {
  const std::int64_t slabs = p.slabs();
  for (std::int64_t g = 0; g < p.groups(); ++g) {
    const std::int64_t first = p.starts[g * slabs], k = p.starts[(g + 1) * slabs] - first;
    for (std::int64_t i = 0; i < std::min(p.group, p.rows - g * p.group); ++i)
      for (std::int64_t s = 0; s < slabs; ++s)
        for (std::int64_t e = p.starts[g * slabs + s]; e < p.starts[g * slabs + s + 1]; ++e)
          visit(g * p.group + i, s * sparse_slab_columns + p.columns[e],
                p.group * first + i * k + (e - first));
  }
}

}  // namespace

void sparse_low_rank_linear_cpu(const Context&, ConstMatrixView x,
                                const SparseLowRankWeights& weights, ConstVectorView bias,
                                MatrixView y, MatrixView hidden) {
  const std::int64_t m = weights.pattern.rows, n = weights.pattern.cols, r = weights.u.cols;
  for (std::int64_t t = 0; t < x.rows; ++t) {
    double zero = 0;
    for (std::int64_t j = 0; j < n; ++j) zero += 0.0 * at(x, t, j);
    Doubles out(static_cast<std::size_t>(m), zero), h(static_cast<std::size_t>(r), 0.0);
    for (std::int64_t k = 0; k < r; ++k) {
      double& sum = h[static_cast<std::size_t>(k)];
      for (std::int64_t j = 0; j < n; ++j) sum += at(weights.v, k, j) * at(x, t, j);
      if (hidden.data != nullptr) put(hidden, t, k, sum);
    }
    for (std::int64_t i = 0; i < m; ++i) {
      double& sum = out[static_cast<std::size_t>(i)];
      if (bias.data != nullptr) sum += get(bias.data, bias.dtype, i);
      for (std::int64_t k = 0; k < r; ++k)
        sum += at(weights.u, i, k) * h[static_cast<std::size_t>(k)];
      if (weights.base.data != nullptr)
        for (std::int64_t j = 0; j < n; ++j) sum += at(weights.base, i, j) * at(x, t, j);
    }
    entries(weights.pattern, [&](std::int64_t i, std::int64_t j, std::int64_t e) {
      out[static_cast<std::size_t>(i)] += get(weights.values.data, x.dtype, e) * at(x, t, j);
    });
    for (std::int64_t i = 0; i < m; ++i) put(y, t, i, out[static_cast<std::size_t>(i)]);
  }
}

void sparse_low_rank_linear_backward_cpu(const Context& context, ConstMatrixView dy,
                                         ConstMatrixView x, const SparseLowRankWeights& weights,
                                         const SparseTransposeView&, ConstMatrixView hidden,
                                         const SparseLowRankGradients& grads) {
  const std::int64_t m = weights.pattern.rows, n = weights.pattern.cols, r = weights.u.cols;
  const auto at_dh = [&](std::int64_t t, std::int64_t k) {
    double sum = 0;
    for (std::int64_t i = 0; i < m; ++i) sum += at(dy, t, i) * at(weights.u, i, k);
    return sum;
  };
  if (grads.x.data != nullptr)
    for (std::int64_t t = 0; t < dy.rows; ++t) {
      double zero = 0;
      for (std::int64_t i = 0; i < m; ++i) zero += 0.0 * at(dy, t, i);
      Doubles out(static_cast<std::size_t>(n), zero);
      for (std::int64_t k = 0; k < r; ++k) {
        const double dh = at_dh(t, k);
        for (std::int64_t j = 0; j < n; ++j)
          out[static_cast<std::size_t>(j)] += dh * at(weights.v, k, j);
      }
      if (weights.base.data != nullptr)
        for (std::int64_t i = 0; i < m; ++i)
          for (std::int64_t j = 0; j < n; ++j)
            out[static_cast<std::size_t>(j)] += at(dy, t, i) * at(weights.base, i, j);
      entries(weights.pattern, [&](std::int64_t i, std::int64_t j, std::int64_t e) {
        out[static_cast<std::size_t>(j)] += get(weights.values.data, dy.dtype, e) * at(dy, t, i);
      });
      for (std::int64_t j = 0; j < n; ++j) put(grads.x, t, j, out[static_cast<std::size_t>(j)]);
    }
  const auto product = [&](const MatrixView& out, auto&& left, auto&& right) {
    if (out.data == nullptr) return;
    for (std::int64_t i = 0; i < out.rows; ++i)
      for (std::int64_t j = 0; j < out.cols; ++j) {
        double sum = 0;
        for (std::int64_t t = 0; t < dy.rows; ++t) sum += left(t, i) * right(t, j);
        put(out, i, j, sum);
      }
  };
  const auto at_dy = [&](std::int64_t t, std::int64_t i) { return at(dy, t, i); };
  product(grads.u, at_dy, [&](std::int64_t t, std::int64_t k) { return at(hidden, t, k); });
  product(grads.v, at_dh, [&](std::int64_t t, std::int64_t j) { return at(x, t, j); });
  if (grads.values.data != nullptr)
    sampled_matmul_cpu(context, dy, x, weights.pattern, grads.values);
  if (grads.bias.data != nullptr)
    for (std::int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (std::int64_t t = 0; t < dy.rows; ++t) sum += at(dy, t, i);
      set(grads.bias.data, dy.dtype, i, sum);
    }
}

void sampled_matmul_cpu(const Context&, ConstMatrixView dy, ConstMatrixView x,
                        const SparsePatternView& pattern, VectorView values) {
  entries(pattern, [&](std::int64_t i, std::int64_t j, std::int64_t e) {
    double sum = 0;
    for (std::int64_t t = 0; t < dy.rows; ++t) sum += at(dy, t, i) * at(x, t, j);
    set(values.data, values.dtype, e, sum);
  });
}

}  // namespace structmat
