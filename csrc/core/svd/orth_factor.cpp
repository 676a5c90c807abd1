// SPDX-License-Identifier: Apache-2.0
#include "svd/orth_factor.h"

#include <algorithm>
#include <cmath>

#include "blas.h"
#include "svd/orth.h"
#include "svd/orth_simd.h"

namespace structmat {
namespace {

double dot(const double* a, const double* b, std::int64_t count) {
  double sum[4] = {};
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int k = 0; k < 4; ++k) sum[k] += a[i + k] * b[i + k];
  for (; i < count; ++i) sum[0] += a[i] * b[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

}  // namespace

void OrthFactor::start(std::int64_t columns) {
  n = columns;
  const auto padded = static_cast<std::size_t>(gram_stride(n)), count = static_cast<std::size_t>(n);
  minus_r.assign(padded * padded, 0.0);
  work_.resize(padded * padded);
  scale.assign(padded, 0.0);
  inverse.assign(padded, 1.0);
  pivot_.assign(count, 1.0);
  size_.assign(count, 1.0);
  left_.assign(count, 1.0);
  residual.assign(count, 0.0);
  settled_.assign(count, 0);
  done = false;
}

bool OrthFactor::cholesky(double* gram) {
  const std::int64_t stride = gram_stride(n);
  if (blas::potrf(static_cast<int>(n), gram, static_cast<int>(stride)) != 0) return false;
  for (std::int64_t j = 0; j < n; ++j)
    if (!(gram[j * stride + j] * gram[j * stride + j] >= kPivotThreshold)) return false;
  for (std::int64_t j = 0; j < n; ++j)
    std::copy_n(gram + j * stride, j + 1, work_.data() + j * stride);
  blas::trtri(static_cast<int>(n), work_.data(), static_cast<int>(stride));
  growth_ = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    const double* column = work_.data() + j * stride;
    const double square = dot(column, column, j + 1);
    if (!(square <= kMaxGrowth)) return false;
    growth_ += square;
  }
  for (std::int64_t j = 0; j < n; ++j) pivot_[static_cast<std::size_t>(j)] = gram[j * stride + j];
  return true;
}

// A row with a small pivot, or whose column of R^-1 is large, becomes one of the identity: its
// column is neither divided by noise nor subtracted from later ones. pivot_ is 0 there.
void OrthFactor::guarded_cholesky(double* gram) {
  const std::int64_t stride = gram_stride(n);
  double* solved = work_.data();  // the columns of R^-1
  for (std::int64_t j = 0; j < n; ++j) {
    double* column = gram + j * stride;
    double* w = solved + j * stride;
    std::fill_n(w, j + 1, 0.0);
    double square = column[j];
    for (std::int64_t i = 0; i < j; ++i) {
      const double pivot = pivot_[static_cast<std::size_t>(i)];
      column[i] = pivot > 0 ? (column[i] - dot(gram + i * stride, column, i)) / pivot : 0.0;
      square -= column[i] * column[i];
      const double* other = solved + i * stride;
      if (column[i] != 0)
        for (std::int64_t k = 0; k <= i; ++k) w[k] -= other[k] * column[i];
    }
    const double growth = dot(w, w, j) + 1;
    const bool small = !(square >= kPivotThreshold && growth <= kMaxGrowth * square);
    const double pivot = small ? 1.0 : std::sqrt(square);
    pivot_[static_cast<std::size_t>(j)] = small ? 0.0 : pivot;
    column[j] = pivot;
    w[j] = 1;
    for (std::int64_t k = 0; k <= j; ++k) w[k] /= pivot;
  }
}

void OrthFactor::factor(double* gram, int pass, double noise, double growth) {
  const std::int64_t stride = gram_stride(n);
  empty.clear();
  for (std::int64_t j = 0; j < n; ++j) {
    const auto k = static_cast<std::size_t>(j);
    const double square = gram[j * stride + j];
    if (pass > 0) left_[k] *= std::min(1.0, std::sqrt(square));
    const bool none = pass > 0 ? !(left_[k] > noise) : !(square > 0.0);
    if (none) {
      empty.push_back(j);
      left_[k] = 1;
    }
    if (none)
      settled_[k] = 1, residual[k] = 0;  // random from here on
    else if (pass > 0 && settled_[k] == 0)
      size_[k] *= std::sqrt(square);
    scale[k] = none ? 0.0 : 1 / std::sqrt(square);
  }
  for (std::int64_t j = 0; j < n; ++j) {
    double* column = gram + j * stride;
    for (std::int64_t i = 0; i < j; ++i)
      column[i] *= scale[static_cast<std::size_t>(i)] * scale[static_cast<std::size_t>(j)];
    column[j] = 1;
    std::copy_n(column, j, minus_r.data() + j * stride);
  }
  const bool whole = cholesky(gram);
  if (!whole) {
    for (std::int64_t j = 0; j < n; ++j) {
      std::copy_n(minus_r.data() + j * stride, j, gram + j * stride);
      gram[j * stride + j] = 1;
    }
    guarded_cholesky(gram);
  }
  for (std::int64_t j = 0; j < n; ++j) {
    const auto k = static_cast<std::size_t>(j);
    for (std::int64_t i = 0; i < n; ++i)
      minus_r[static_cast<std::size_t>(i * stride + j)] = i < j ? -gram[j * stride + i] : 0.0;
    inverse[k] = 1 / gram[j * stride + j];
    if (settled_[k] == 0 && pivot_[k] > 0) settled_[k] = 1, residual[k] = size_[k] * pivot_[k];
  }
  // R^-T (the rounding of G) R^-1 is what Q^T Q will lack.
  const double steady = static_cast<double>(n + std::min<std::int64_t>(n, 64));
  done = whole && empty.empty() && growth_ <= std::max(steady, growth);
}

}  // namespace structmat
