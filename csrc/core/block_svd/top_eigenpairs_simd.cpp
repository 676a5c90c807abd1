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

double sum_of(V v) {
  double lanes[kWide];
  store(lanes, v);
  for (int k = kWide / 2; k > 0; k /= 2)
    for (int j = 0; j < k; ++j) lanes[j] += lanes[j + k];
  return lanes[0];
}
// Vectors of padded length, zero past their end.
double dot(const double* a, const double* b, std::int64_t size) {
  V sum[2] = {};
  std::int64_t i = 0;
  for (; i + 2 * kWide <= size; i += 2 * kWide)
    for (int k = 0; k < 2; ++k)
      sum[k] = fma(load(a + i + k * kWide), load(b + i + k * kWide), sum[k]);
  for (; i < size; i += kWide) sum[0] = fma(load(a + i), load(b + i), sum[0]);
  return sum_of(sum[0] + sum[1]);
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

// x[r] += s[r] v for kRows rows, with s[r] = factor (v . x[r]).
template <int kRows>
void reflect_rows(double factor, const double* v, double* x, std::int64_t stride,
                  std::int64_t size) {
  V sum[kRows] = {};
  for (std::int64_t i = 0; i < size; i += kWide) {
    const V a = load(v + i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) sum[r] = fma(a, load(x + r * stride + i), sum[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) sum[r] = broadcast(factor * sum_of(sum[r]));
  for (std::int64_t i = 0; i < size; i += kWide) {
    const V a = load(v + i);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      double* to = x + r * stride + i;
      store(to, fma(a, sum[r], load(to)));
    }
  }
}

void reflect(double* g, const double* tau, std::int64_t n, double* vectors, std::int64_t count) {
  const std::int64_t stride = padded(n);
  constexpr int kRows = 8;
  for (std::int64_t k = n - 2; k >= 0; --k) {
    if (tau[k] == 0) continue;
    double* v = g + k * stride;
    const std::int64_t begin = (k + 1) / 8 * 8;
    std::fill(v + begin, v + k + 1, 0.0);  // the diagonal and what is left of it
    std::int64_t r = 0;
    for (; r + kRows <= count; r += kRows)
      reflect_rows<kRows>(-tau[k], v + begin, vectors + r * stride + begin, stride, stride - begin);
    for (; r < count; ++r)
      reflect_rows<1>(-tau[k], v + begin, vectors + r * stride + begin, stride, stride - begin);
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

V magnitude(V x) {
  return x < V{} ? -x : x;
}
V not_tiny(V pivot, V least) {
  return magnitude(pivot) < least ? (pivot < V{} ? -least : least) : pivot;
}

// The factors of P (T - x I) = L U, of a shift x a lane: U's three diagonals, L's multipliers and
// where rows changed. Arrays of n vectors.
struct Shifted {
  double *inverse, *above, *second, *factor, *swapped;

  void factorize(const double* d, const double* e, std::int64_t n, V x, V least) const {
    V a = broadcast(d[0]) - x, b = broadcast(n > 1 ? e[0] : 0.0);
    for (std::int64_t i = 0; i + 1 < n; ++i) {
      const V c = broadcast(e[i]), under = broadcast(d[i + 1]) - x;
      const V beside = broadcast(i + 2 < n ? e[i + 1] : 0.0);
      const auto exchange = magnitude(a) < magnitude(c);
      const V reciprocal = broadcast(1.0) / not_tiny(exchange ? c : a, least);
      const V m = (exchange ? a : c) * reciprocal;
      store(inverse + i * kWide, reciprocal);
      store(above + i * kWide, exchange ? under : b);
      store(second + i * kWide, exchange ? beside : V{});
      store(factor + i * kWide, m);
      store(swapped + i * kWide, exchange ? broadcast(1.0) : V{});
      a = exchange ? b - m * under : under - m * b;
      b = exchange ? -m * beside : beside;
    }
    store(inverse + (n - 1) * kWide, broadcast(1.0) / not_tiny(a, least));
  }
  void solve(double* x, std::int64_t n, bool forward) const {
    if (forward) {
      V here = load(x);
      for (std::int64_t i = 0; i + 1 < n; ++i) {
        const V next = load(x + (i + 1) * kWide);
        const auto exchange = load(swapped + i * kWide) != V{};
        const V first = exchange ? next : here;
        store(x + i * kWide, first);
        here = fma(-load(factor + i * kWide), first, exchange ? here : next);
      }
      store(x + (n - 1) * kWide, here);
    }
    V after = {}, later = {};
    for (std::int64_t i = n - 1; i >= 0; --i) {
      V sum = load(x + i * kWide);
      if (i + 2 < n) sum = fma(-load(second + i * kWide), later, sum);
      if (i + 1 < n) sum = fma(-load(above + i * kWide), after, sum);
      later = after;
      after = sum * load(inverse + i * kWide);
      store(x + i * kWide, after);
    }
  }
};

// x -= sum_c (v_c . x) v_c over `count` rows.
void remove_rows(const double* v, std::int64_t count, std::int64_t stride, double* x) {
  constexpr int kRows = 8;
  for (std::int64_t c = 0; c < count; c += kRows) {
    const int rows = static_cast<int>(std::min<std::int64_t>(kRows, count - c));
    double sums[kRows];
    for (int r = 0; r < rows; ++r) sums[r] = dot(v + (c + r) * stride, x, stride);
    for (int r = 0; r < rows; ++r) add_scaled(-sums[r], v + (c + r) * stride, x, stride);
  }
}

// A vector a lane. Vectors from `cluster` on are those that a lane's is made orthogonal to; lanes
// stop together, so that none is orthogonal to what another no longer is.
bool inverse_iteration(const double* d, const double* e, std::int64_t n, std::int64_t count,
                       const double* values, double* vectors, double* work) {
  double norm = 0;
  for (std::int64_t i = 0; i < n; ++i)
    norm = std::max(
        norm, std::abs(d[i]) + (i > 0 ? std::abs(e[i - 1]) : 0) + (i + 1 < n ? std::abs(e[i]) : 0));
  if (!(norm > 0)) return false;
  const std::int64_t stride = padded(n), size = n * kWide;
  const Shifted t{work, work + size, work + 2 * size, work + 3 * size, work + 4 * size};
  double* lanes = work + 5 * size;
  const double close = 1e-3 * norm, unit = std::sqrt(3 / static_cast<double>(n));
  const double enough = 1 / (16 * kEps * norm * std::sqrt(static_cast<double>(n)));
  std::uint32_t random = 1;
  std::int64_t cluster[kWide] = {};
  for (std::int64_t r = 0; r < count; r += kWide) {
    const int batch = static_cast<int>(std::min<std::int64_t>(kWide, count - r));
    double shifts[kWide];
    for (int j = 0; j < kWide; ++j) shifts[j] = values[r + std::min(j, batch - 1)];
    for (int j = 0; j < batch; ++j) {
      const std::int64_t before = j > 0 ? cluster[j - 1] : cluster[kWide - 1];
      const bool apart = r + j == 0 || values[r + j - 1] - values[r + j] > close;
      cluster[j] = apart ? r + j : before;
    }
    t.factorize(d, e, n, load(shifts), broadcast(kEps * norm));
    const auto draw = [&](int j) {
      for (std::int64_t i = 0; i < n; ++i) {
        random = random * 1664525u + 1013904223u;
        lanes[i * kWide + j] = unit * (static_cast<double>(random >> 8) * 0x1p-23 - 1);
      }
    };
    for (int j = 0; j < kWide; ++j) draw(j);
    int good = 0;
    for (int step = 0; step < 8 && good < 2; ++step) {
      t.solve(lanes, n, step > 0);
      bool all = true;
      for (int j = 0; j < batch; ++j) {
        double* x = vectors + (r + j) * stride;
        for (std::int64_t i = 0; i < n; ++i) x[i] = lanes[i * kWide + j];
        std::fill(x + n, x + stride, 0.0);
        double before = std::sqrt(dot(x, x, stride)), length = before;
        for (int round = 0; round < 2 && cluster[j] < r + j; ++round) {
          remove_rows(vectors + cluster[j] * stride, r + j - cluster[j], stride, x);
          length = std::sqrt(dot(x, x, stride));
          if (round == 0 && length > 0.5 * before) break;
          before = length;
        }
        all &= length >= enough;
        if (length > 0) {
          scale(1 / length, x, stride);
          for (std::int64_t i = 0; i < n; ++i) lanes[i * kWide + j] = x[i];
        } else {
          draw(j);
        }
      }
      good = all ? good + 1 : good;
    }
    if (good < 2) return false;
  }
  return true;
}

bool top(const double* d, const double* e, std::int64_t n, std::int64_t count, double* values,
         double* squares) {
  double low = d[0], high = d[0], largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const double beside = (i > 0 ? std::abs(e[i - 1]) : 0) + (i + 1 < n ? std::abs(e[i]) : 0);
    low = std::min(low, d[i] - beside);
    high = std::max(high, d[i] + beside);
    if (i + 1 < n) {
      squares[i] = e[i] * e[i];
      largest = std::max(largest, squares[i]);
    }
  }
  const double norm = std::max(std::abs(low), std::abs(high));
  if (!(norm > 0)) return false;
  const double slack = 2 * kEps * norm * static_cast<double>(n);
  const double least = std::numeric_limits<double>::min() * std::max(1.0, largest);
  for (std::int64_t r = 0; r < count; r += kPoints)
    multisection(d, squares, n, low - slack, high + slack, kEps * norm, least, r,
                 std::min(r + kPoints, count), values);
  for (std::int64_t r = 1; r < count; ++r) values[r] = std::min(values[r], values[r - 1]);
  return true;
}

}  // namespace

namespace STRUCTMAT_SIMD {

void tridiagonalize(double* g, std::int64_t n, double* d, double* e, double* tau, double* work) {
  reduce(g, n, d, e, tau, work);
}
void apply_reflections(double* g, const double* tau, std::int64_t n, double* vectors,
                       std::int64_t count) {
  reflect(g, tau, n, vectors, count);
}
bool top_tridiagonal_values(const double* d, const double* e, std::int64_t n, std::int64_t count,
                            double* values, double* work) {
  return top(d, e, n, count, values, work);
}
bool tridiagonal_vectors(const double* d, const double* e, std::int64_t n, std::int64_t count,
                         const double* values, double* vectors, double* work) {
  return inverse_iteration(d, e, n, count, values, vectors, work);
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
