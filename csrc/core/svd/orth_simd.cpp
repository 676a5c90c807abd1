// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set.
#include "svd/orth_simd.h"

#include <algorithm>
#include <type_traits>

#include "ceil_div.h"
#include "scratch.h"
#include "vec.h"

namespace structmat {
namespace {

constexpr int kWide = kLanes<double>;
#if defined(__AVX512F__)
constexpr int kBlock = 8, kRowVectors = 4;  // 16 sums of 32 registers: enough to hide the latency
#else
constexpr int kBlock = 4, kRowVectors = 2;  // 8 sums of 16 registers
#endif
constexpr int kVectors = 2, kColumns = 4, kRows = kRowVectors * kWide;

template <class T>
Vec<double> widened(const T* p) {
  if constexpr (std::is_same_v<T, double>) {
    return load(p);
  } else {
    typedef float Half __attribute__((vector_size(kVecBytes / 2)));
    Half h;
    std::memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Vec<double>);
  }
}
template <class T>
void narrowed(T* p, Vec<double> v) {
  if constexpr (std::is_same_v<T, double>) {
    store(p, v);
  } else {
    typedef float Half __attribute__((vector_size(kVecBytes / 2)));
    const Half h = __builtin_convertvector(v, Half);
    std::memcpy(p, &h, sizeof h);
  }
}

// gram (kBlock x 2 vectors) += left^T right
void gram_block(const double* left, const double* right, std::int64_t stride, std::int64_t rows,
                double* gram) {
  Vec<double> sum[kBlock][kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kBlock; ++j)
    for (int v = 0; v < kVectors; ++v) sum[j][v] = Vec<double>{};  // a tile's sum, added at the end
  for (std::int64_t r = 0; r < rows; ++r) {
    Vec<double> b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = load(right + r * stride + v * kWide);
#pragma GCC unroll 8
    for (int j = 0; j < kBlock; ++j) {
      const Vec<double> a = broadcast(left[r * stride + j]);
      for (int v = 0; v < kVectors; ++v) sum[j][v] = fma(a, b[v], sum[j][v]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kBlock; ++j)
    for (int v = 0; v < kVectors; ++v) {
      double* const to = gram + j * stride + v * kWide;
      store(to, load(to) + sum[j][v]);
    }
}

template <class T>
void gram_tile(const T* y, std::int64_t row_stride, std::int64_t rows, std::int64_t cols,
               double* gram) {
  thread_local Scratch memory;
  const std::int64_t stride = gram_stride(cols);
  const std::int64_t height = std::clamp<std::int64_t>(3072 / stride, 16, 256);  // 24 KB: level 1
  double* wide = memory.get<double>(height * stride);
  for (std::int64_t r0 = 0; r0 < rows; r0 += height) {
    const std::int64_t count = std::min(height, rows - r0);
    for (std::int64_t r = 0; r < count; ++r) {
      const T* from = y + (r0 + r) * row_stride;
      double* to = wide + r * stride;
      std::int64_t j = 0;
      for (; j + kWide <= cols; j += kWide) store(to + j, widened(from + j));
      for (; j < stride; ++j) to[j] = j < cols ? static_cast<double>(from[j]) : 0.0;
    }
    for (std::int64_t j = 0; j < cols; j += kBlock)
      for (std::int64_t i = 0; i < j + kBlock; i += kVectors * kWide)
        gram_block(wide + j, wide + i, stride, count, gram + j * stride + i);
  }
}

// kRows rows, by columns: t[j * kRows + row], `cols` a multiple of kColumns.
void solve_group(double* t, std::int64_t cols, const double* minus_r, std::int64_t stride,
                 const double* inverse) {
  for (std::int64_t c = 0; c < cols; c += kColumns) {
    Vec<double> sum[kColumns][kRowVectors];
#pragma GCC unroll 4
    for (int k = 0; k < kColumns; ++k)
      for (int v = 0; v < kRowVectors; ++v) sum[k][v] = load(t + (c + k) * kRows + v * kWide);
    for (std::int64_t i = 0; i < c; ++i) {
      Vec<double> q[kRowVectors];
      for (int v = 0; v < kRowVectors; ++v) q[v] = load(t + i * kRows + v * kWide);
#pragma GCC unroll 4
      for (int k = 0; k < kColumns; ++k) {
        const Vec<double> r = broadcast(minus_r[i * stride + c + k]);
        for (int v = 0; v < kRowVectors; ++v) sum[k][v] = fma(r, q[v], sum[k][v]);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kColumns; ++k) {
      for (int i = 0; i < k; ++i) {
        const Vec<double> r = broadcast(minus_r[(c + i) * stride + c + k]);
        for (int v = 0; v < kRowVectors; ++v) sum[k][v] = fma(r, sum[i][v], sum[k][v]);
      }
      const Vec<double> scale = broadcast(inverse[c + k]);
      for (int v = 0; v < kRowVectors; ++v) {
        sum[k][v] *= scale;
        store(t + (c + k) * kRows + v * kWide, sum[k][v]);
      }
    }
  }
}

template <class T>
void solve_tile(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride,
                std::int64_t rows, std::int64_t cols, const double* minus_r, const double* scale,
                const double* inverse) {
  thread_local Scratch memory;
  const std::int64_t stride = gram_stride(cols), whole = cols / kWide * kWide;
  double* t = memory.get<double>(stride * kRows);
  for (std::int64_t r0 = 0; r0 < rows; r0 += kRows) {
    const std::int64_t count = std::min<std::int64_t>(kRows, rows - r0);
    std::fill(t + whole * kRows, t + stride * kRows, 0.0);
    if (count < kRows) std::fill(t, t + whole * kRows, 0.0);
    for (std::int64_t r = 0; r < count; r += kWide) {
      const std::int64_t last = std::min<std::int64_t>(count, r + kWide);
      if (last == r + kWide)
        for (std::int64_t j = 0; j < whole; j += kWide) {
          Vec<double> square[kWide];
#pragma GCC unroll 8
          for (int k = 0; k < kWide; ++k)
            square[k] = widened(from + (r0 + r + k) * from_stride + j);
          transpose<double>(square);
#pragma GCC unroll 8
          for (int k = 0; k < kWide; ++k)
            store(t + (j + k) * kRows + r, square[k] * broadcast(scale[j + k]));
        }
      for (std::int64_t i = r; i < last; ++i)
        for (std::int64_t j = last == r + kWide ? whole : 0; j < cols; ++j)
          t[j * kRows + i] = static_cast<double>(from[(r0 + i) * from_stride + j]) * scale[j];
    }
    solve_group(t, ceil_div(cols, kColumns) * kColumns, minus_r, stride, inverse);
    for (std::int64_t r = 0; r < count; r += kWide) {
      const std::int64_t last = std::min<std::int64_t>(count, r + kWide);
      if (last == r + kWide)
        for (std::int64_t j = 0; j < whole; j += kWide) {
          Vec<double> square[kWide];
#pragma GCC unroll 8
          for (int k = 0; k < kWide; ++k) square[k] = load(t + (j + k) * kRows + r);
          transpose<double>(square);
#pragma GCC unroll 8
          for (int k = 0; k < kWide; ++k) narrowed(to + (r0 + r + k) * to_stride + j, square[k]);
        }
      for (std::int64_t i = r; i < last; ++i)
        for (std::int64_t j = last == r + kWide ? whole : 0; j < cols; ++j)
          to[(r0 + i) * to_stride + j] = static_cast<T>(t[j * kRows + i]);
    }
  }
}

}  // namespace

namespace STRUCTMAT_SIMD {

#define STRUCTMAT_ORTH(T)                                                                  \
  void add_gram(const T* y, std::int64_t row_stride, std::int64_t rows, std::int64_t cols, \
                double* gram) {                                                            \
    gram_tile(y, row_stride, rows, cols, gram);                                            \
  }                                                                                        \
  void solve_rows(const T* from, std::int64_t from_stride, T* to, std::int64_t to_stride,  \
                  std::int64_t rows, std::int64_t cols, const double* minus_r,             \
                  const double* scale, const double* inverse) {                            \
    solve_tile(from, from_stride, to, to_stride, rows, cols, minus_r, scale, inverse);     \
  }
STRUCTMAT_ORTH(float)
STRUCTMAT_ORTH(double)

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
