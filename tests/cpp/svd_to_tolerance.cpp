// SPDX-License-Identifier: Apache-2.0
// A program that uses structmat/svd.h: the least rank for a tolerance, of a matrix less its mean.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

#include "structmat/structmat.h"

int main() {
  // Three directions and small noise about a mean a thousand times as large.
  const std::int64_t m = 200, n = 150;
  std::vector<float> a(m * n);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      double value = 1000 + static_cast<double>(j);
      for (int k = 1; k <= 3; ++k) value += std::sin(0.1 * k * i) * std::cos(0.2 * k * j);
      value += 1e-3 * std::sin(static_cast<double>(i * i + 3 * j * j));
      a[i * n + j] = static_cast<float>(value);
    }
  structmat::SvdOptions options;
  options.center = true;
  const structmat::Context context;
  const structmat::ConstMatrixView view(a.data(), m, n);
  structmat::SvdToTolerance found(context, view, 0.01, options);
  structmat::SvdToTolerance moved = std::move(found);
  const std::int64_t k = moved.rank();
  std::vector<float> u(m * k), s(k), vh(k * n);
  structmat::SvdInfo info{};
  moved.factors({u.data(), m, k}, {s.data(), k}, {vh.data(), k, n}, &info);

  double left = 0, all = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    double mean = 0;
    for (std::int64_t i = 0; i < m; ++i) mean += static_cast<double>(a[i * n + j]) / m;
    for (std::int64_t i = 0; i < m; ++i) {
      const double centred = a[i * n + j] - mean;
      double rest = centred;
      for (std::int64_t l = 0; l < k; ++l)
        rest -= static_cast<double>(u[i * k + l]) * s[l] * vh[l * n + j];
      left += rest * rest;
      all += centred * centred;
    }
  }
  const double error = std::sqrt(left / all);
  std::printf("rank %d error %.3g reported %.3g converged %g\n", static_cast<int>(k), error,
              info.error, info.converged);
  bool good = k == 3 && error <= 0.01 && info.converged == 1 && info.error <= 0.01;

  for (const double rtol : {0.0, 1.0, std::nan("")}) try {
      structmat::SvdToTolerance(context, view, rtol);
      good = false;
    } catch (const structmat::Error&) {
    }
  try {
    moved.factors({u.data(), m, k + 1}, {s.data(), k}, {vh.data(), k, n}, &info);
    good = false;
  } catch (const structmat::Error&) {
  }
  a[7] = std::nanf("");
  try {
    structmat::SvdToTolerance(context, view, 0.01);
    good = false;
  } catch (const structmat::LinAlgError&) {
  }
  return good ? 0 : 1;
}
