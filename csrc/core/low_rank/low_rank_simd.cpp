// SPDX-License-Identifier: Apache-2.0
#include "low_rank/low_rank_simd.h"

#include "few_rows_simd.h"
#include "product_simd.h"

namespace structmat {
namespace {

constexpr std::int64_t kFewTokens = 16;
constexpr std::int64_t kHiddenNumbers = 4 << 20;  // of h at a time: tokens are taken in blocks

template <class T>
struct LowRank {
  using S = accumulator_t<T>;
  static constexpr bool wide = std::is_same_v<S, T>;

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
      S* h;
      std::int64_t h_stride = r;
      if (wide && hidden.data != nullptr) {
        h = reinterpret_cast<S*>(row(hidden, t));
        h_stride = hidden.row_stride;
      } else {
        h = h_memory.get<S>(tokens * r);
      }
      multiply(context,
               Product<T, T, S>{
                   tokens, r, n, {row(x, t), x.row_stride, false}, operand(v, true), h, h_stride});
      multiply(
          context,
          Product<S, T, T>{
              tokens, m, r, {h, h_stride, false}, operand(u, true), row(y, t), y.row_stride, bias});
      if (!wide && hidden.data != nullptr)
        for (std::int64_t i = 0; i < tokens; ++i) convert(h + i * r, row(hidden, t + i), r);
    }
  }

  static void backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                       ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                       const LowRankGradients& grads) {
    static thread_local Scratch dh_memory;
    Scratch large;  // what is sized by the number of tokens goes when the call ends
    const std::int64_t tokens = dy.rows, m = u.rows, r = u.cols, n = v.cols;
    // All of dh for the gradient of V, else blocks of it.
    const bool want_x = grads.x.data != nullptr, want_v = grads.v.data != nullptr;
    const std::int64_t block = want_v ? std::max<std::int64_t>(tokens, 1) : token_block(r);
    // A stride that is no multiple of 4 KB: columns of dh are read, too.
    const std::int64_t dh_stride = r + kLanes<S>;
    if (want_x || want_v) {
      const std::int64_t numbers = std::min(block, tokens) * dh_stride;
      S* dh = (numbers > 2 * kHiddenNumbers ? large : dh_memory).get<S>(numbers);
      if (tokens <= kFewTokens) {
        static thread_local Scratch dy_memory;
        const Wide a(dy, dy_memory);
        few_rows_by_rows<S, T, S>(context, tokens, r, m, a.data, a.stride, row(u, 0), u.row_stride,
                                  dh, dh_stride);
        if (want_x)
          few_rows_by_rows<S, T, T>(context, tokens, n, r, dh, dh_stride, row(v, 0), v.row_stride,
                                    row(grads.x, 0), grads.x.row_stride);
      }
      for (std::int64_t t = tokens <= kFewTokens ? tokens : 0; t < tokens; t += block) {
        const std::int64_t rows = std::min(block, tokens - t);
        multiply(context,
                 Product<T, T, S>{
                     rows, r, m, {row(dy, t), dy.row_stride, false}, operand(u), dh, dh_stride});
        if (want_x)
          multiply(context, Product<S, T, T>{rows,
                                             n,
                                             r,
                                             {dh, dh_stride, false},
                                             operand(v),
                                             row(grads.x, t),
                                             grads.x.row_stride});
      }
      if (want_v)
        multiply(context, Product<S, T, T>{r,
                                           n,
                                           tokens,
                                           {dh, dh_stride, true},
                                           operand(x),
                                           row(grads.v, 0),
                                           grads.v.row_stride});
    }
    if (grads.u.data != nullptr) {
      // A thin h^T times dy, the result transposed, packs dy once; for a wide h the result is the
      // larger part of the work, and is better stored as it comes.
      if (tokens > kFewTokens && r < 128)
        multiply(context, Product<T, T, T>{r, m, tokens, operand(hidden, true), operand(dy),
                                           row(grads.u, 0), grads.u.row_stride, nullptr, true});
      else
        multiply(context, Product<T, T, T>{m, r, tokens, operand(dy, true), operand(hidden),
                                           row(grads.u, 0), grads.u.row_stride});
    }
    if (grads.bias.data != nullptr) column_sums(context, dy, static_cast<T*>(grads.bias.data));
  }

  // Blocks of tokens are summed apart: the rounding grows with their number's square root.
  static void column_sums(const Context& context, ConstMatrixView a, T* out) {
    constexpr std::int64_t kColumns = 4 * kLanes<S>, kTokens = 256;
    const bool small = a.rows * a.cols < (64 << 10);
    const std::int64_t blocks = ceil_div(a.cols, kColumns);
    const std::int64_t tasks = small ? 1 : std::min<std::int64_t>(blocks, thread_count(context));
    parallel_for(context, tasks, [&](std::int64_t task) {
      for (std::int64_t block = blocks * task / tasks; block < blocks * (task + 1) / tasks;
           ++block) {
        const std::int64_t j = block * kColumns, cols = std::min(kColumns, a.cols - j);
        S total[kColumns] = {};
        for (std::int64_t t = 0; t < a.rows; t += kTokens) {
          S part[kColumns] = {};
          for (std::int64_t i = t; i < std::min(t + kTokens, a.rows); ++i) {
            S wide_row[kColumns];
            convert(row(a, i) + j, wide_row, cols);
            for (std::int64_t q = 0; q < cols; ++q) part[q] += wide_row[q];
          }
          for (std::int64_t q = 0; q < cols; ++q) total[q] += part[q];
        }
        convert(total, out + j, cols);
      }
    });
  }
};

}  // namespace

namespace STRUCTMAT_SIMD {

void low_rank_forward(const Context& context, ConstMatrixView x, ConstMatrixView u,
                      ConstMatrixView v, ConstVectorView bias, MatrixView y, MatrixView hidden) {
  dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    LowRank<T>::forward(context, x, u, v, static_cast<const T*>(bias.data), y, hidden);
  });
}

void low_rank_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                       ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                       const LowRankGradients& grads) {
  dispatch_dtype(dy.dtype, [&](auto element) {
    LowRank<decltype(element)>::backward(context, dy, x, u, v, hidden, grads);
  });
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
