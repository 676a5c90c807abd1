// SPDX-License-Identifier: Apache-2.0
// Factors of small blocks, as those of a butterfly: tokens lie in the lanes of vectors, and x and y
// are transposed square by square in the level-1 cache. For b = c = 2 and 4096 columns 2 to 8 times
// as fast as einsum. For files under structmat_simd_sources (everything is in an anonymous
// namespace).
#pragma once
#include "block_linear_simd.h"

namespace structmat {
namespace {

// Blocks with a side of at most so many are for these kernels.
constexpr std::int64_t kSmallBlock = 4;

// Columns [col, col + count) of up to `lanes` rows of x, as vectors of tokens, zeros for no token.
template <class S, class T>
void load_columns(const ConstMatrixView& x, std::int64_t t0, int tokens, std::int64_t col,
                  std::int64_t count, S* to) {
  constexpr int w = kLanes<S>;
  for (std::int64_t i = 0; i < count; i += w) {
    const int live = static_cast<int>(std::min<std::int64_t>(w, count - i));
    Vec<S> square[w];
    for (int t = 0; t < w; ++t) {
      if (t >= tokens)
        square[t] = Vec<S>{};
      else if (live == w)
        square[t] = load_wide<S>(row_of<T>(x, t0 + t) + col + i);
      else
        square[t] = load_wide_part<S>(row_of<T>(x, t0 + t) + col + i, live);
    }
    transpose<S>(square);
    for (int s = 0; s < live; ++s) store(to + (i + s) * w, square[s]);
  }
}
template <class S, class T>
void store_columns(const S* from, const MatrixView& y, std::int64_t t0, int tokens,
                   std::int64_t col, std::int64_t count) {
  constexpr int w = kLanes<S>;
  for (std::int64_t i = 0; i < count; i += w) {
    const int live = static_cast<int>(std::min<std::int64_t>(w, count - i));
    Vec<S> square[w];
    for (int s = 0; s < w; ++s) square[s] = s < live ? load(from + (i + s) * w) : Vec<S>{};
    transpose<S>(square);
    for (int t = 0; t < tokens; ++t) {
      T* const to = row_of<T>(y, t0 + t) + col + i;
      if (std::is_same_v<S, T> && live == w) {
        store(reinterpret_cast<S*>(to), square[t]);
      } else {
        S line[w];
        store(line, square[t]);
        convert(line, to, live);
      }
    }
  }
}

// z[t,a,r,d] = sum_p W[a,r,p,d] x[t,a,p,d], W at data[a * stride_a + r * stride_r + p * stride_p +
// d].
template <class S>
struct SmallFactor {
  std::int64_t a, rows, depth, d;
  const S* data;
  std::int64_t stride_a, stride_r, stride_p;

  // The columns are taken in units: a vector's width of d for one a, or with smaller d some a.
  std::int64_t d_step() const { return std::min<std::int64_t>(d, kLanes<S>); }
  std::int64_t a_step() const {
    if (d >= kLanes<S>) return 1;
    const std::int64_t least = std::max<std::int64_t>(std::min(rows, depth) * d, 1);
    return std::min(ceil_div(kLanes<S>, least), a);
  }
  std::int64_t units() const { return ceil_div(a, a_step()) * ceil_div(d, d_step()); }

  struct Unit {
    std::int64_t a0, a1, d0, d1;
  };
  Unit unit(std::int64_t index) const {
    const std::int64_t per = ceil_div(d, d_step()), a0 = index / per * a_step(),
                       d0 = index % per * d_step();
    return {a0, std::min(a0 + a_step(), a), d0, std::min(d0 + d_step(), d)};
  }

  // move(column, count, place) for the runs of a unit's columns where each a has `lines` times d;
  // column (a, line, d) goes to place ((a - a0) * lines + line) * (d1 - d0) + d - d0.
  template <class Move>
  void for_runs(const Unit& u, std::int64_t lines, Move&& move) const {
    const std::int64_t width = u.d1 - u.d0;
    if (width == d) return move(u.a0 * lines * d, (u.a1 - u.a0) * lines * d, std::int64_t{0});
    for (std::int64_t line = 0; line < lines; ++line)
      move((u.a0 * lines + line) * d + u.d0, width, line * width);
  }

  template <class T>
  void product(const Unit& u, const ConstMatrixView& x, const T* bias, Activation activation,
               const MatrixView& y, std::int64_t t0, int tokens) const {
    constexpr int w = kLanes<S>;
    static thread_local Scratch memory;
    const std::int64_t width = u.d1 - u.d0, count = u.a1 - u.a0;
    S* const from = memory.get<S>(count * (depth + rows) * width * w);
    S* const to = from + count * depth * width * w;
    for_runs(u, depth, [&](std::int64_t col, std::int64_t cols, std::int64_t at) {
      load_columns<S, T>(x, t0, tokens, col, cols, from + at * w);
    });
    for (std::int64_t i = u.a0; i < u.a1; ++i)
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t e = 0; e < width; ++e) {
          const S* weight = data + i * stride_a + r * stride_r + u.d0 + e;
          const S* in = from + ((i - u.a0) * depth * width + e) * w;
          Vec<S> sum{};
          for (std::int64_t p = 0; p < depth; ++p, weight += stride_p, in += width * w)
            sum = fma(broadcast(*weight), load(in), sum);
          if (bias != nullptr)
            sum = sum + broadcast(S(to_float(bias[(i * rows + r) * d + u.d0 + e])));
          store(to + (((i - u.a0) * rows + r) * width + e) * w, sum);
        }
    activate(activation, to, count * rows * width * w);
    for_runs(u, rows, [&](std::int64_t col, std::int64_t cols, std::int64_t at) {
      store_columns<S, T>(to + at * w, y, t0, tokens, col, cols);
    });
  }

  template <class T>
  void product(const Context& context, const ConstMatrixView& x, const T* bias,
               Activation activation, const MatrixView& y) const {
    constexpr int w = kLanes<S>;
    const std::int64_t all = units(), tiles = ceil_div(x.rows, w),
                       work = x.rows * a * rows * (depth + 4) * d,
                       tasks = work < 100000 ? 1 : thread_count(context) * 4,
                       parts = std::min(ceil_div(tasks, std::max<std::int64_t>(tiles, 1)), all);
    parallel_for(context, tiles * parts, [&](std::int64_t task) {
      const std::int64_t part = task % parts, t0 = task / parts * w;
      const int tokens = static_cast<int>(std::min<std::int64_t>(w, x.rows - t0));
      for (std::int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i)
        product(unit(i), x, bias, activation, y, t0, tokens);
    });
  }

  // W[a,r,p,d] <- sum_t dy[t,a,r,d] x[t,a,p,d], contiguous. Each lane sums every w-th token.
  template <class T>
  void gradient(const Context& context, const ConstMatrixView& dy, const ConstMatrixView& x,
                T* out) const {
    constexpr int w = kLanes<S>;
    constexpr std::int64_t kUnits = 16;  // a task: whole pages of x are read at a time
    const std::int64_t all = units(), pairs = rows * depth, largest = a_step() * d_step();
    parallel_for(context, ceil_div(all, kUnits), [&](std::int64_t task) {
      static thread_local Scratch memory, sum_memory;
      const std::int64_t first = task * kUnits, last = std::min(all, first + kUnits),
                         size = pairs * largest * w;
      S* const sums = sum_memory.get<S>(kUnits * size);
      std::fill_n(sums, (last - first) * size, S{0});
      S* const from = memory.get<S>(largest * (depth + rows) * w);
      S* const left = from + largest * depth * w;
      for (std::int64_t t0 = 0; t0 < x.rows; t0 += w) {
        const int tokens = static_cast<int>(std::min<std::int64_t>(w, x.rows - t0));
        for (std::int64_t index = first; index < last; ++index) {
          const Unit u = unit(index);
          const std::int64_t width = u.d1 - u.d0;
          for_runs(u, depth, [&](std::int64_t col, std::int64_t cols, std::int64_t at) {
            load_columns<S, T>(x, t0, tokens, col, cols, from + at * w);
          });
          for_runs(u, rows, [&](std::int64_t col, std::int64_t cols, std::int64_t at) {
            load_columns<S, T>(dy, t0, tokens, col, cols, left + at * w);
          });
          S* sum = sums + (index - first) * size;
          for (std::int64_t i = 0; i < u.a1 - u.a0; ++i)
            for (std::int64_t r = 0; r < rows; ++r)
              for (std::int64_t p = 0; p < depth; ++p)
                for (std::int64_t e = 0; e < width; ++e, sum += w)
                  store(sum, fma(load(left + ((i * rows + r) * width + e) * w),
                                 load(from + ((i * depth + p) * width + e) * w), load(sum)));
        }
      }
      for (std::int64_t index = first; index < last; ++index) {
        const Unit u = unit(index);
        const S* sum = sums + (index - first) * size;
        for (std::int64_t i = u.a0; i < u.a1; ++i)
          for (std::int64_t line = 0; line < pairs; ++line)
            for (std::int64_t e = u.d0; e < u.d1; ++e, sum += w) {
              S total{0};
              for (int lane = 0; lane < w; ++lane) total += sum[lane];
              convert(&total, out + (i * pairs + line) * d + e, 1);
            }
      }
    });
  }
};

}  // namespace
}  // namespace structmat
