// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <vector>

#include "half.h"
#include "monarch/monarch_kernels.h"
#include "monarch/monarch_sizes.h"

namespace structmat {
namespace {

using monarch::Sizes;

double get(const void* p, DType t, std::int64_t i) {
  switch (t) {
    case DType::f32:
      return static_cast<const float*>(p)[i];
    case DType::f64:
      return static_cast<const double*>(p)[i];
    case DType::bf16:
      return to_float(static_cast<const bfloat16*>(p)[i]);
    default:
      return to_float(static_cast<const float16*>(p)[i]);
  }
}
void set(void* p, DType t, std::int64_t i, double v) {
  switch (t) {
    case DType::f32:
      static_cast<float*>(p)[i] = static_cast<float>(v);
      return;
    case DType::f64:
      static_cast<double*>(p)[i] = v;
      return;
    case DType::bf16:
      static_cast<bfloat16*>(p)[i] = from_float<bfloat16>(static_cast<float>(v));
      return;
    default:
      static_cast<float16*>(p)[i] = from_float<float16>(static_cast<float>(v));
      return;
  }
}
double get(const ConstArrayView& w, std::int64_t a, std::int64_t b, std::int64_t c,
           std::int64_t d) {
  return get(w.data, w.dtype,
             a * w.strides[0] + b * w.strides[1] + c * w.strides[2] + d * w.strides[3]);
}
double get(const ConstMatrixView& x, std::int64_t i, std::int64_t j) {
  return get(x.data, x.dtype, i * x.row_stride + j);
}
double activate(double z, Activation a) {
  switch (a) {
    case Activation::relu:
      return z > 0 ? z : z == z ? 0 : z;
    case Activation::gelu:
      return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    case Activation::silu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}
double w1(const MonarchWeights& w, const Sizes& s, std::int64_t k, std::int64_t q, std::int64_t i) {
  return get(w.w1, k, q / s.R, q % s.R, i);
}
double w2(const MonarchWeights& w, const Sizes&, std::int64_t j, std::int64_t l, std::int64_t s) {
  const std::int64_t R = w.w2.sizes[3];
  return get(w.w2, j, l, s / R, s % R);
}

// h or dh (J, T, S)
std::vector<double> first(const Sizes& s, ConstMatrixView x, const MonarchWeights& w) {
  std::vector<double> h(static_cast<std::size_t>(x.rows * s.hidden()));
  for (std::int64_t t = 0; t < x.rows; ++t)
    for (std::int64_t k = 0; k < s.K; ++k)
      for (std::int64_t q = 0; q < s.Q; ++q) {
        const auto [j, u] = s.place(k, q);
        double sum = 0;
        for (std::int64_t i = 0; i < s.I; ++i) sum += w1(w, s, k, q, i) * get(x, t, k * s.I + i);
        h[(j * x.rows + t) * s.S + u] = sum;
      }
  return h;
}

}  // namespace

void monarch_linear_cpu(const Context&, ConstMatrixView x, const MonarchWeights& w,
                        ConstVectorView bias, Activation activation, MatrixView y, void* hidden) {
  const Sizes s(w);
  const std::vector<double> h = first(s, x, w);
  if (hidden != nullptr)
    for (std::size_t i = 0; i < h.size(); ++i) set(hidden, x.dtype, i, h[i]);
  for (std::int64_t t = 0; t < x.rows; ++t)
    for (std::int64_t j = 0; j < s.J; ++j)
      for (std::int64_t l = 0; l < s.L; ++l) {
        const std::int64_t c = s.column(j, l);
        double z = bias.data != nullptr ? get(bias.data, bias.dtype, c) : 0;
        for (std::int64_t u = 0; u < s.S; ++u)
          z += w2(w, s, j, l, u) * h[(j * x.rows + t) * s.S + u];
        set(y.data, y.dtype, t * y.row_stride + c, activate(z, activation));
      }
}

void monarch_linear_backward_cpu(const Context&, ConstMatrixView dy, ConstMatrixView x,
                                 const MonarchWeights& w, const void*,
                                 const MonarchGradients& grads) {
  const Sizes s(w);
  const std::int64_t T = dy.rows;
  const bool weights = grads.w1 != nullptr || grads.w2 != nullptr;
  const std::vector<double> h = weights ? first(s, x, w) : std::vector<double>();
  std::vector<double> dx(T * s.n()), d1(s.K * s.Q * s.I), d2(s.J * s.L * s.S), db(s.m());
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t j = 0; j < s.J; ++j)
      for (std::int64_t l = 0; l < s.L; ++l) {
        const double g = get(dy, t, s.column(j, l));
        db[s.column(j, l)] += g;
        for (std::int64_t u = 0; weights && u < s.S; ++u)
          d2[(j * s.L + l) * s.S + u] += g * h[(j * T + t) * s.S + u];
      }
    for (std::int64_t k = 0; k < s.K; ++k)
      for (std::int64_t q = 0; q < s.Q; ++q) {
        const auto [j, u] = s.place(k, q);
        double dh = 0;
        for (std::int64_t l = 0; l < s.L; ++l) dh += w2(w, s, j, l, u) * get(dy, t, s.column(j, l));
        for (std::int64_t i = 0; i < s.I; ++i) {
          dx[t * s.n() + k * s.I + i] += dh * w1(w, s, k, q, i);
          if (weights) d1[(k * s.Q + q) * s.I + i] += dh * get(x, t, k * s.I + i);
        }
      }
  }
  if (grads.x.data != nullptr)
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t c = 0; c < s.n(); ++c)
        set(grads.x.data, dy.dtype, t * grads.x.row_stride + c, dx[t * s.n() + c]);
  if (grads.w1 != nullptr)
    for (std::size_t i = 0; i < d1.size(); ++i) set(grads.w1, dy.dtype, i, d1[i]);
  if (grads.w2 != nullptr)
    for (std::size_t i = 0; i < d2.size(); ++i) set(grads.w2, dy.dtype, i, d2[i]);
  if (grads.bias.data != nullptr)
    for (std::size_t i = 0; i < db.size(); ++i) set(grads.bias.data, dy.dtype, i, db[i]);
}

}  // namespace structmat
