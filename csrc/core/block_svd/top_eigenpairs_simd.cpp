// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set.
#include "block_svd/top_eigenpairs_simd.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "vec.h"

namespace structmat {
namespace {

using V = Vec<double>;
constexpr int kWide = kLanes<double>;
constexpr double kEps = std::numeric_limits<double>::epsilon();

// Vectors of padded length, zero past their end.
double dot(const double* a, const double* b, std::int64_t size) {
  V sum[2] = {};
  std::int64_t i = 0;
  for (; i + 2 * kWide <= size; i += 2 * kWide)
    for (int k = 0; k < 2; ++k)
      sum[k] = fma(load(a + i + k * kWide), load(b + i + k * kWide), sum[k]);
  for (; i < size; i += kWide) sum[0] = fma(load(a + i), load(b + i), sum[0]);
  double lanes[kWide], total = 0;
  store(lanes, sum[0] + sum[1]);
  for (int k = kWide / 2; k > 0; k /= 2)
    for (int j = 0; j < k; ++j) lanes[j] += lanes[j + k];
  total = lanes[0];
  return total;
}
void add_scaled(double s, const double* a, double* b, std::int64_t size) {
  const V factor = broadcast(s);
  for (std::int64_t i = 0; i < size; i += kWide)
    store(b + i, fma(factor, load(a + i), load(b + i)));
}
void scale(double s, double* a, std::int64_t size) {
  for (std::int64_t i = 0; i < size; i += kWide) store(a + i, s * load(a + i));
}

// A -= v w^T + w v^T and y = A next over kVectors vectors of columns and rows [first, n): a step's
// update and the next one's product in one pass over A.
template <int kVectors>
void update_and_multiply(double* a, std::int64_t stride, std::int64_t first, std::int64_t n,
                         const double* v, const double* w, const double* next, double* y,
                         std::int64_t column) {
  V vs[kVectors], ws[kVectors], sum[kVectors];
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) {
    vs[k] = load(v + column + k * kWide);
    ws[k] = load(w + column + k * kWide);
    sum[k] = V{};
  }
  for (std::int64_t i = first; i < n; ++i) {
    const V vi = broadcast(-v[i]), wi = broadcast(-w[i]), ni = broadcast(next[i]);
    double* row = a + i * stride + column;
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
      const V x = fma(vi, ws[k], fma(wi, vs[k], load(row + k * kWide)));
      store(row + k * kWide, x);
      sum[k] = fma(ni, x, sum[k]);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < kVectors; ++k) store(y + column + k * kWide, sum[k]);
}

void reduce(double* g, std::int64_t n, double* d, double* e, double* tau, double* work) {
  const std::int64_t stride = padded(n);
  double *v = work, *w = v + stride, *next = w + stride, *y = next + stride;
  std::fill(work, work + 4 * stride, 0.0);
  // What is so far below G's norm is left out: the square of 1e-160 has no digits, and a reflection
  // made of it would not be orthogonal.
  double trace = 0;
  for (std::int64_t k = 0; k < n; ++k) trace += g[k * stride + k];
  const double nothing = 1e-20 * trace * (1e-20 * trace);
  for (std::int64_t k = 0; k < n; ++k) {
    double* row = g + k * stride;
    const std::int64_t begin = (k + 1) / 8 * 8;  // of the columns of what is left, aligned
    add_scaled(-v[k], w + k / 8 * 8, row + k / 8 * 8, stride - k / 8 * 8);
    add_scaled(-w[k], v + k / 8 * 8, row + k / 8 * 8, stride - k / 8 * 8);
    d[k] = row[k];
    tau[k] = 0;
    if (k + 1 == n) break;
    // H = I - tau next next^T takes the rest of the row to (e, 0, ...); next[k + 1] = 1.
    std::fill(next + k / 8 * 8, next + k + 1, 0.0);
    std::copy(row + k + 1, row + stride, next + k + 1);
    const double head = next[k + 1];
    next[k + 1] = 0;
    const double rest = dot(next + begin, next + begin, stride - begin);
    if (rest > nothing) {
      const double length =
          head > 0 ? -std::sqrt(head * head + rest) : std::sqrt(head * head + rest);
      e[k] = length;
      tau[k] = (length - head) / length;
      scale(1 / (head - length), next + begin, stride - begin);
    } else {
      e[k] = head;
    }
    next[k + 1] = 1;
    std::copy(next + k + 1, next + stride, row + k + 1);
    std::int64_t column = begin;
    constexpr int kMost = kWide == 8 ? 8 : 4;
    for (; column + kMost * kWide <= stride; column += kMost * kWide)
      update_and_multiply<kMost>(g, stride, k + 1, n, v, w, next, y, column);
    for (; column + 2 * kWide <= stride; column += 2 * kWide)
      update_and_multiply<2>(g, stride, k + 1, n, v, w, next, y, column);
    for (; column < stride; column += kWide)
      update_and_multiply<1>(g, stride, k + 1, n, v, w, next, y, column);
    // w = tau (y - tau / 2 (y . next) next)
    std::fill(y + begin, y + k + 1, 0.0);
    const double half = -0.5 * tau[k] * dot(y + begin, next + begin, stride - begin);
    add_scaled(half, next + begin, y + begin, stride - begin);
    scale(tau[k], y + begin, stride - begin);
    std::swap(w, y);
    std::swap(v, next);
  }
}

void reflect(const double* g, const double* tau, std::int64_t n, double* vectors,
             std::int64_t count) {
  const std::int64_t stride = padded(n);
  for (std::int64_t k = n - 2; k >= 0; --k) {
    if (tau[k] == 0) continue;
    // Its first lanes may hold the diagonal and what is left of it: only from k + 1 on is it one.
    const double* v = g + k * stride;
    const std::int64_t begin = std::min((k + 8) / 8 * 8, stride);
    for (std::int64_t r = 0; r < count; ++r) {
      double* x = vectors + r * stride;
      double sum = dot(v + begin, x + begin, stride - begin);
      for (std::int64_t i = k + 1; i < std::min(begin, n); ++i) sum += v[i] * x[i];
      sum *= -tau[k];
      for (std::int64_t i = k + 1; i < std::min(begin, n); ++i) x[i] += sum * v[i];
      add_scaled(sum, v + begin, x + begin, stride - begin);
    }
  }
}

constexpr int kPoints = 16;  // two vectors of AVX-512: one hides the other's divisions

// below[j]: how many eigenvalues of T are less than x[j]. `squares` are those of e.
void sturm_counts(const double* d, const double* squares, std::int64_t n, double least,
                  const double* x, std::int64_t* below) {
  using Index = VecOf<double>::index;
  constexpr int kVectors = kPoints / kWide;
  V at[kVectors], q[kVectors];
  Index count[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    at[k] = load(x + k * kWide);
    q[k] = broadcast(1.0);
    count[k] = Index{};
  }
  const V tiny = broadcast(least), minus_tiny = broadcast(-least);
  for (std::int64_t i = 0; i < n; ++i) {
    const V diagonal = broadcast(d[i]), square = broadcast(i > 0 ? squares[i - 1] : 0.0);
#pragma GCC unroll 8
    for (int k = 0; k < kVectors; ++k) {
      const V pivot = (diagonal - at[k]) - square / q[k];
      q[k] = (pivot < tiny) & (pivot > minus_tiny) ? minus_tiny : pivot;
      count[k] -= q[k] < V{};  // true is -1
    }
  }
  for (int k = 0; k < kVectors; ++k)
    for (int j = 0; j < kWide; ++j) below[k * kWide + j] = count[k][j];
}

// values[r], r in [first, last): the eigenvalue that n - 1 - r others are below, to `width`.
void multisection(const double* d, const double* squares, std::int64_t n, double low, double high,
                  double width, double least, std::int64_t first, std::int64_t last,
                  double* values) {
  const int group = static_cast<int>(last - first), per = kPoints / group;
  double lo[kPoints], hi[kPoints], x[kPoints];
  std::int64_t below[kPoints];
  std::fill_n(lo, kPoints, low);
  std::fill_n(hi, kPoints, high);
  std::fill_n(x, kPoints, high);
  for (int pass = 0; pass < 2000; ++pass) {
    bool open = false;
    for (int g = 0; g < group; ++g) {
      const double step = (hi[g] - lo[g]) / (per + 1);
      open |= hi[g] - lo[g] > width;
      for (int j = 0; j < per; ++j) x[g * per + j] = lo[g] + (j + 1) * step;
    }
    if (!open) break;
    sturm_counts(d, squares, n, least, x, below);
    for (int g = 0; g < group; ++g) {
      const std::int64_t wanted = n - 1 - (first + g);
      for (int j = 0; j < kPoints; ++j) {
        if (below[j] <= wanted)
          lo[g] = std::max(lo[g], std::min(x[j], hi[g]));
        else
          hi[g] = std::min(hi[g], std::max(x[j], lo[g]));
      }
    }
  }
  for (int g = 0; g < group; ++g) values[first + g] = lo[g] + (hi[g] - lo[g]) / 2;
}

// The factors of P (T - x I) = L U: U's three diagonals, L's multipliers and where rows changed.
struct Shifted {
  double *inverse, *above, *second, *factor;
  double* swapped;

  void factorize(const double* d, const double* e, std::int64_t n, double x, double least) const {
    double a = d[0] - x, b = n > 1 ? e[0] : 0;
    for (std::int64_t i = 0; i + 1 < n; ++i) {
      const double c = e[i], under = d[i + 1] - x, beside = i + 2 < n ? e[i + 1] : 0;
      const bool exchange = std::abs(a) < std::abs(c);
      double pivot = exchange ? c : a;
      if (std::abs(pivot) < least) pivot = pivot < 0 ? -least : least;
      inverse[i] = 1 / pivot;
      const double m = (exchange ? a : c) * inverse[i];
      above[i] = exchange ? under : b;
      second[i] = exchange ? beside : 0;
      factor[i] = m;
      swapped[i] = exchange;
      a = exchange ? b - m * under : under - m * b;
      b = exchange ? -m * beside : beside;
    }
    if (std::abs(a) < least) a = a < 0 ? -least : least;
    inverse[n - 1] = 1 / a;
  }
  void solve(double* x, std::int64_t n, bool forward) const {
    for (std::int64_t i = 0; forward && i + 1 < n; ++i) {
      const double first = swapped[i] != 0 ? x[i + 1] : x[i];
      const double other = swapped[i] != 0 ? x[i] : x[i + 1];
      x[i] = first;
      x[i + 1] = other - factor[i] * first;
    }
    double after = 0, later = 0;
    for (std::int64_t i = n - 1; i >= 0; --i) {
      double sum = x[i];
      if (i + 1 < n) sum -= above[i] * after;
      if (i + 2 < n) sum -= second[i] * later;
      later = after;
      after = x[i] = sum * inverse[i];
    }
  }
};

bool inverse_iteration(const double* d, const double* e, std::int64_t n, double norm,
                       std::int64_t count, const double* values, double* vectors, double* work) {
  const std::int64_t stride = padded(n);
  const Shifted t{work, work + stride, work + 2 * stride, work + 3 * stride, work + 4 * stride};
  const double close = 1e-3 * norm;
  const double enough = 1 / (16 * kEps * norm * std::sqrt(static_cast<double>(n)));
  std::uint32_t random = 1;
  std::int64_t cluster = 0;
  for (std::int64_t r = 0; r < count; ++r) {
    double* x = vectors + r * stride;
    if (r > 0 && values[r - 1] - values[r] > close) cluster = r;
    t.factorize(d, e, n, values[r], kEps * norm);
    std::fill(x, x + stride, 0.0);
    const auto draw = [&] {
      for (std::int64_t i = 0; i < n; ++i) {
        random = random * 1664525u + 1013904223u;
        x[i] = static_cast<double>(random >> 8) * 0x1p-23 - 1;
      }
    };
    draw();
    int good = 0;
    for (int step = 0; step < 8 && good < 2; ++step) {
      scale(1 / std::sqrt(dot(x, x, stride)), x, stride);
      t.solve(x, n, step > 0);
      double before = std::sqrt(dot(x, x, stride));
      for (int round = 0; round < 2 && cluster < r; ++round) {
        for (std::int64_t c = cluster; c < r; ++c)
          add_scaled(-dot(vectors + c * stride, x, stride), vectors + c * stride, x, stride);
        const double left = std::sqrt(dot(x, x, stride));
        if (round == 0 && left > 0.5 * before) break;
        before = left;
      }
      const double growth = std::sqrt(dot(x, x, stride));
      if (growth >= enough) {
        ++good;
      } else if (!(growth > 0)) {
        draw();
      }
    }
    if (good < 2) return false;
    scale(1 / std::sqrt(dot(x, x, stride)), x, stride);
  }
  return true;
}

bool top(const double* d, const double* e, std::int64_t n, std::int64_t count, double* values,
         double* vectors, double* work) {
  double norm = 0, low = d[0], high = d[0], largest = 0;
  double* squares = work;
  for (std::int64_t i = 0; i < n; ++i) {
    const double beside = (i > 0 ? std::abs(e[i - 1]) : 0) + (i + 1 < n ? std::abs(e[i]) : 0);
    low = std::min(low, d[i] - beside);
    high = std::max(high, d[i] + beside);
    if (i + 1 < n) {
      squares[i] = e[i] * e[i];
      largest = std::max(largest, squares[i]);
    }
  }
  norm = std::max(std::abs(low), std::abs(high));
  if (!(norm > 0)) return false;
  const double slack = 2 * kEps * norm * static_cast<double>(n);
  const double least = std::numeric_limits<double>::min() * std::max(1.0, largest);
  for (std::int64_t r = 0; r < count; r += kPoints)
    multisection(d, squares, n, low - slack, high + slack, kEps * norm, least, r,
                 std::min(r + kPoints, count), values);
  for (std::int64_t r = 1; r < count; ++r) values[r] = std::min(values[r], values[r - 1]);
  return inverse_iteration(d, e, n, norm, count, values, vectors, work + padded(n));
}

}  // namespace

namespace STRUCTMAT_SIMD {

void tridiagonalize(double* g, std::int64_t n, double* d, double* e, double* tau, double* work) {
  reduce(g, n, d, e, tau, work);
}
void apply_reflections(const double* g, const double* tau, std::int64_t n, double* vectors,
                       std::int64_t count) {
  reflect(g, tau, n, vectors, count);
}
bool top_tridiagonal(const double* d, const double* e, std::int64_t n, std::int64_t count,
                     double* values, double* vectors, double* work) {
  return top(d, e, n, count, values, vectors, work);
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
