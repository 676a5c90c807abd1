// SPDX-License-Identifier: Apache-2.0
#include "low_rank/low_rank_simd.h"

#include "few_rows_simd.h"
#include "product_simd.h"
#include "product_tiles_simd.h"
#include "simd.h"

namespace structmat {
namespace {

constexpr std::int64_t kHiddenNumbers = 4 << 20;  // of h at a time: tokens are taken in blocks

// kTiles: products of more than a few tokens are made by the matrix unit.
template <class T, bool kTiles = false>
struct LowRank {
  using S = accumulator_t<T>;
  // Of h and dh between two products: the matrix unit takes them rounded.
  using Hidden = std::conditional_t<kTiles, T, S>;
  // A matrix unit does as much for 16 tokens as for one. At n = 4096 it takes 1.6 of the time of
  // the kernels for few tokens for 1, 1.3 for 4, 0.85 for 8, forward and backward.
  static constexpr std::int64_t kFewTokens = kTiles ? 4 : 16;
  static constexpr bool wide = std::is_same_v<S, T>;

  template <class TA, class TB, class TC>
  static void product(const Context& context, const Product<TA, TB, TC>& g) {
#if defined(__AVX512BW__)
    if constexpr (kTiles)
      multiply_tiles(context, g);
    else
#endif
      multiply(context, g);
  }

  static Operand<T> operand(const ConstMatrixView& a, bool transposed = false) {
    return {static_cast<const T*>(a.data), a.row_stride, transposed};
  }
  static T* row(const MatrixView& a, std::int64_t i) {
    return static_cast<T*>(a.data) + i * a.row_stride;
  }
  static const T* row(const ConstMatrixView& a, std::int64_t i) {
    return static_cast<const T*>(a.data) + i * a.row_stride;
  }

  static std::int64_t token_block(std::int64_t r) {
    return std::max<std::int64_t>(2048, kHiddenNumbers / std::max<std::int64_t>(r, 1));
  }

  // Few rows in the type of the sums: in place, or a widened copy.
  struct Wide {
    const S* data;
    std::int64_t stride;
    Wide(const ConstMatrixView& a, Scratch& memory) {
      if constexpr (wide) {
        data = row(a, 0);
        stride = a.row_stride;
      } else {
        S* copy = memory.get<S>(a.rows * a.cols);
        for (std::int64_t t = 0; t < a.rows; ++t) convert(row(a, t), copy + t * a.cols, a.cols);
        data = copy;
        stride = a.cols;
      }
    }
  };

  static void few_tokens(const Context& context, ConstMatrixView x, ConstMatrixView u,
                         ConstMatrixView v, const T* bias, MatrixView y, MatrixView hidden) {
    static thread_local Scratch x_memory, h_memory;
    const std::int64_t tokens = x.rows, n = x.cols, m = u.rows, r = u.cols;
    const Wide a(x, x_memory);
    S* h = h_memory.get<S>(tokens * r);
    few_rows<S, T, S>(context, tokens, r, n, a.data, a.stride, row(v, 0), v.row_stride, nullptr, h,
                      r);
    few_rows<S, T, T>(context, tokens, m, r, h, r, row(u, 0), u.row_stride, bias, row(y, 0),
                      y.row_stride);
    if (hidden.data != nullptr)
      for (std::int64_t t = 0; t < tokens; ++t) convert(h + t * r, row(hidden, t), r);
  }

  static void forward(const Context& context, ConstMatrixView x, ConstMatrixView u,
                      ConstMatrixView v, const T* bias, MatrixView y, MatrixView hidden) {
    if (x.rows <= kFewTokens) return few_tokens(context, x, u, v, bias, y, hidden);
    static thread_local Scratch h_memory;
    const std::int64_t n = x.cols, m = u.rows, r = u.cols, block = token_block(r);
    for (std::int64_t t = 0; t < x.rows; t += block) {
      const std::int64_t tokens = std::min(block, x.rows - t);
      Hidden* h;
      std::int64_t h_stride = r;
      if (std::is_same_v<Hidden, T> && hidden.data != nullptr) {
        h = reinterpret_cast<Hidden*>(row(hidden, t));
        h_stride = hidden.row_stride;
      } else {
        h = h_memory.get<Hidden>(tokens * r);
      }
      product(context,
              Product<T, T, Hidden>{
                  tokens, r, n, {row(x, t), x.row_stride, false}, operand(v, true), h, h_stride});
      product(
          context,
          Product<Hidden, T, T>{
              tokens, m, r, {h, h_stride, false}, operand(u, true), row(y, t), y.row_stride, bias});
      if constexpr (!std::is_same_v<Hidden, T>)
        for (std::int64_t i = 0; hidden.data != nullptr && i < tokens; ++i)
          convert(h + i * r, row(hidden, t + i), r);
    }
  }

  // Two parallel regions, as each costs some microseconds: what needs dy, then what needs dh.
  static void few_tokens_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                  ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                                  const LowRankGradients& grads) {
    static thread_local Scratch dy_memory, x_memory, h_memory, dh_memory;
    const std::int64_t tokens = dy.rows, m = u.rows, r = u.cols, n = v.cols;
    const bool want_x = grads.x.data != nullptr, want_u = grads.u.data != nullptr,
               want_v = grads.v.data != nullptr, want_dh = want_x || want_v;
    const Wide dy_(dy, dy_memory), x_(x, x_memory), h_(hidden, h_memory);
    S* const dh = dh_memory.get<S>(tokens * r);
    parallel_parts(context, tokens, m * r, want_dh, want_u,
                   [&](std::int64_t part, std::int64_t parts) {
                     if (want_dh) {
                       const Part cols(r, kLanes<S>, part, parts);
                       few_times<S>(tokens, r, m, dy_.data, dy_.stride, u, dh, r, cols);
                     }
                     const Part rows(m, kLanes<S>, part, parts);
                     if (want_u)
                       outer_range<S, T>(tokens, r, dy_.data, dy_.stride, h_.data, h_.stride,
                                         row(grads.u, 0), grads.u.row_stride, rows.begin, rows.end);
                     if (grads.bias.data != nullptr)
                       column_sums(dy, rows.begin, rows.end, static_cast<T*>(grads.bias.data));
                   });
    if (want_dh)
      parallel_parts(
          context, tokens, n * r, want_x, want_v, [&](std::int64_t part, std::int64_t parts) {
            if (want_x) {
              const Part cols(n, kLanes<S>, part, parts);
              few_times<T>(tokens, n, r, dh, r, v, row(grads.x, 0), grads.x.row_stride, cols);
            }
            if (want_v) {
              const Part rows(r, kOuterRows, part, parts);
              outer_range<S, T>(tokens, n, dh, r, x_.data, x_.stride, row(grads.v, 0),
                                grads.v.row_stride, rows.begin, rows.end);
            }
          });
  }

  // [begin, end) of `size` numbers: one of `parts` of nearly equal size.
  struct Part {
    std::int64_t begin, end;
    Part(std::int64_t size, std::int64_t unit, std::int64_t part, std::int64_t parts) {
      const std::int64_t units = ceil_div(size, unit);
      begin = units * part / parts * unit;
      end = std::min(units * (part + 1) / parts * unit, size);
    }
  };
  // Columns of C (m, n) = A B. Beyond 8 rows B is packed: 16 take 0.8 of the time at n = 768, and
  // 1.07 to 1.1 at n = 4096.
  template <class TC>
  static void few_times(std::int64_t m, std::int64_t n, std::int64_t k, const S* a,
                        std::int64_t a_stride, const ConstMatrixView& b, TC* c,
                        std::int64_t c_stride, const Part& cols) {
    if (m <= 8)
      by_rows_range<S, T, TC>(m, k, a, a_stride, row(b, 0), b.row_stride, c, c_stride, cols.begin,
                              cols.end);
    else if (cols.begin < cols.end)
      multiply_range(Product<S, T, TC>{m, n, k, {a, a_stride, false}, operand(b), c, c_stride}, 0,
                     m, cols.begin, cols.end);
  }
  // body(part, parts), on as many threads as pay for a matrix of `numbers` read, written or both.
  template <class Body>
  static void parallel_parts(const Context& context, std::int64_t tokens, std::int64_t numbers,
                             bool read, bool written, Body&& body) {
    numbers *= (read ? 1 : 0) + (written ? 1 : 0);
    const std::int64_t parts =
        few_rows_tasks(context, tokens, numbers, numbers * static_cast<std::int64_t>(sizeof(T)));
    parallel_for(context, parts, [&](std::int64_t part) { body(part, parts); });
  }

  static void backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                       ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                       const LowRankGradients& grads) {
    if (dy.rows <= kFewTokens) return few_tokens_backward(context, dy, x, u, v, hidden, grads);
    static thread_local Scratch dh_memory;
    Scratch large;  // what is sized by the number of tokens goes when the call ends
    const std::int64_t tokens = dy.rows, m = u.rows, r = u.cols, n = v.cols;
    // All of dh for the gradient of V, else blocks of it.
    const bool want_x = grads.x.data != nullptr, want_v = grads.v.data != nullptr;
    const std::int64_t block = want_v ? tokens : token_block(r);
    // A stride that is no multiple of 4 KB: columns of dh are read, too.
    const std::int64_t dh_stride = r + kLanes<S>;
    if (want_x || want_v) {
      const std::int64_t numbers = std::min(block, tokens) * dh_stride;
      Hidden* dh = (numbers > 2 * kHiddenNumbers ? large : dh_memory).template get<Hidden>(numbers);
      for (std::int64_t t = 0; t < tokens; t += block) {
        const std::int64_t rows = std::min(block, tokens - t);
        product(context,
                Product<T, T, Hidden>{
                    rows, r, m, {row(dy, t), dy.row_stride, false}, operand(u), dh, dh_stride});
        if (want_x)
          product(context, Product<Hidden, T, T>{rows,
                                                 n,
                                                 r,
                                                 {dh, dh_stride, false},
                                                 operand(v),
                                                 row(grads.x, t),
                                                 grads.x.row_stride});
      }
      if (want_v)
        product(context, Product<Hidden, T, T>{r,
                                               n,
                                               tokens,
                                               {dh, dh_stride, true},
                                               operand(x),
                                               row(grads.v, 0),
                                               grads.v.row_stride});
    }
    if (grads.u.data != nullptr) {
      // dy^T h gathers dy, h^T dy stores its result transposed: against the former 0.7 to 0.9 of
      // the time where tokens are many, 2 times for 64 tokens at rank 512 of 4096. The matrix unit
      // gathers its operands anyway.
      if (kTiles || 2 * tokens <= 3 * r)
        product(context, Product<T, T, T>{m, r, tokens, operand(dy, true), operand(hidden),
                                          row(grads.u, 0), grads.u.row_stride});
      else
        product(context, Product<T, T, T>{r, m, tokens, operand(hidden, true), operand(dy),
                                          row(grads.u, 0), grads.u.row_stride, nullptr, true});
    }
    if (grads.bias.data != nullptr) {
      const bool small = tokens * m < (64 << 10);
      const std::int64_t parts = small ? 1 : thread_count(context);
      parallel_for(context, parts, [&](std::int64_t part) {
        const Part cols(m, kLanes<S>, part, parts);
        column_sums(dy, cols.begin, cols.end, static_cast<T*>(grads.bias.data));
      });
    }
  }

  // Columns [j0, j1). Blocks of tokens are summed apart: the rounding grows with their number's
  // square root.
  static void column_sums(const ConstMatrixView& a, std::int64_t j0, std::int64_t j1, T* out) {
    constexpr std::int64_t kColumns = 1024, kTokens = 256;
    for (std::int64_t j = j0; j < j1; j += kColumns) {
      const std::int64_t cols = std::min(kColumns, j1 - j);
      S total[kColumns] = {};
      for (std::int64_t t = 0; t < a.rows; t += kTokens) {
        S part[kColumns] = {};
        for (std::int64_t i = t; i < std::min(t + kTokens, a.rows); ++i) {
          S wide_row[kColumns];
          const S* numbers = wide_row;
          if constexpr (wide)
            numbers = row(a, i) + j;
          else
            convert(row(a, i) + j, wide_row, cols);
          for (std::int64_t q = 0; q < cols; ++q) part[q] += numbers[q];
        }
        for (std::int64_t q = 0; q < cols; ++q) total[q] += part[q];
      }
      convert(total, out + j, cols);
    }
  }
};

// body(whether the matrix unit multiplies), a constant
template <class T, class Body>
void with_tiles(Body&& body) {
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<T, bfloat16>)
    if (simd_level() == Simd::amx) return body(std::true_type());
#endif
  body(std::false_type());
}

}  // namespace

namespace STRUCTMAT_SIMD {

void low_rank_forward(const Context& context, ConstMatrixView x, ConstMatrixView u,
                      ConstMatrixView v, ConstVectorView bias, MatrixView y, MatrixView hidden) {
  dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    with_tiles<T>([&](auto tiles) {
      LowRank<T, tiles>::forward(context, x, u, v, static_cast<const T*>(bias.data), y, hidden);
    });
  });
}

void low_rank_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                       ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                       const LowRankGradients& grads) {
  dispatch_dtype(dy.dtype, [&](auto element) {
    using T = decltype(element);
    with_tiles<T>(
        [&](auto tiles) { LowRank<T, tiles>::backward(context, dy, x, u, v, hidden, grads); });
  });
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
