// SPDX-License-Identifier: Apache-2.0
// Products tiled over tokens, so that h of a tile stays in cache; 16-bit tiles are widened to fp32.
#include <algorithm>
#include <vector>

#include "blas.h"
#include "half.h"
#include "low_rank/low_rank_kernels.h"
#include "parallel.h"

namespace structmat {
namespace {

constexpr std::int64_t kTokenTile = 256;
constexpr std::int64_t kRowTile = 128;

// Rows of `a` as accumulators: the matrix itself for fp32 and fp64, else a widened copy.
template <class T>
class Widened {
 public:
  using Sum = accumulator_t<T>;
  Widened(ConstMatrixView a, std::int64_t begin, std::int64_t rows) {
    const T* data = static_cast<const T*>(a.data) + begin * a.row_stride;
    if constexpr (std::is_same_v<T, Sum>) {
      data_ = data;
      stride_ = static_cast<int>(std::max<std::int64_t>(a.row_stride, 1));
    } else {
      copy_.resize(static_cast<std::size_t>(rows * a.cols));
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < a.cols; ++j)
          copy_[i * a.cols + j] = to_float(data[i * a.row_stride + j]);
      data_ = copy_.data();
      stride_ = static_cast<int>(std::max<std::int64_t>(a.cols, 1));
    }
  }
  const Sum* data() const { return data_; }
  int stride() const { return stride_; }

 private:
  std::vector<Sum> copy_;
  const Sum* data_;
  int stride_;
};

template <class T, class Sum>
T rounded(Sum value) {
  if constexpr (std::is_same_v<T, Sum>)
    return value;
  else
    return from_float<T>(value);
}

// c (m, n) = op(a) op(b), row-major
template <class Sum>
void multiply(char ta, char tb, std::int64_t m, std::int64_t n, std::int64_t k, const Sum* a,
              int lda, const Sum* b, int ldb, Sum* c, std::int64_t ldc) {
  if (m == 0 || n == 0) return;
  if (k == 0) {
    for (std::int64_t i = 0; i < m; ++i) std::fill_n(c + i * ldc, n, Sum{0});
    return;
  }
  blas::gemm(tb, ta, static_cast<int>(n), static_cast<int>(m), static_cast<int>(k), Sum{1}, b, ldb,
             a, lda, Sum{0}, c, static_cast<int>(std::max<std::int64_t>(ldc, 1)));
}

template <class T>
void store(const accumulator_t<T>* from, std::int64_t rows, std::int64_t cols, std::int64_t begin,
           const MatrixView& to, const T* bias) {
  for (std::int64_t i = 0; i < rows; ++i) {
    T* out = static_cast<T*>(to.data) + (begin + i) * to.row_stride;
    for (std::int64_t j = 0; j < cols; ++j)
      out[j] = rounded<T>(from[i * cols + j] + (bias ? to_float(bias[j]) : 0));
  }
}

template <class T>
void forward(const Context& context, ConstMatrixView x, ConstMatrixView u, ConstMatrixView v,
             const T* bias, MatrixView y, MatrixView hidden) {
  using Sum = accumulator_t<T>;
  const std::int64_t n = x.cols, m = u.rows, r = u.cols;
  const Widened<T> wu(u, 0, m), wv(v, 0, r);
  parallel_for(context, ceil_div(x.rows, kTokenTile), [&](std::int64_t tile) {
    const std::int64_t begin = tile * kTokenTile, rows = std::min(kTokenTile, x.rows - begin);
    const Widened<T> wx(x, begin, rows);
    std::vector<Sum> h(static_cast<std::size_t>(rows * r)), out(static_cast<std::size_t>(rows * m));
    multiply('N', 'T', rows, r, n, wx.data(), wx.stride(), wv.data(), wv.stride(), h.data(), r);
    multiply('N', 'T', rows, m, r, h.data(), static_cast<int>(std::max<std::int64_t>(r, 1)),
             wu.data(), wu.stride(), out.data(), m);
    store<T>(out.data(), rows, m, begin, y, bias);
    if (hidden.data != nullptr) store<T>(h.data(), rows, r, begin, hidden, nullptr);
  });
}

template <class T>
void backward(const Context& context, ConstMatrixView dy, ConstMatrixView x, ConstMatrixView u,
              ConstMatrixView v, ConstMatrixView hidden, const LowRankGradients& grads) {
  using Sum = accumulator_t<T>;
  const std::int64_t tokens = dy.rows, m = u.rows, r = u.cols, n = v.cols;
  const int r_stride = static_cast<int>(std::max<std::int64_t>(r, 1));
  std::vector<Sum> dh;
  if (grads.x.data != nullptr || grads.v.data != nullptr) {
    dh.resize(static_cast<std::size_t>(tokens * r) + 1);
    const Widened<T> wu(u, 0, m), wv(v, 0, r);
    parallel_for(context, ceil_div(tokens, kTokenTile), [&](std::int64_t tile) {
      const std::int64_t begin = tile * kTokenTile, rows = std::min(kTokenTile, tokens - begin);
      const Widened<T> wdy(dy, begin, rows);
      multiply('N', 'N', rows, r, m, wdy.data(), wdy.stride(), wu.data(), wu.stride(),
               dh.data() + begin * r, r);
      if (grads.x.data == nullptr) return;
      std::vector<Sum> dx(static_cast<std::size_t>(rows * n));
      multiply('N', 'N', rows, n, r, dh.data() + begin * r, r_stride, wv.data(), wv.stride(),
               dx.data(), n);
      store<T>(dx.data(), rows, n, begin, grads.x, nullptr);
    });
  }
  if (grads.u.data != nullptr) {
    const Widened<T> wdy(dy, 0, tokens), wh(hidden, 0, tokens);
    parallel_for(context, ceil_div(m, kRowTile), [&](std::int64_t tile) {
      const std::int64_t begin = tile * kRowTile, rows = std::min(kRowTile, m - begin);
      std::vector<Sum> du(static_cast<std::size_t>(rows * r));
      multiply('T', 'N', rows, r, tokens, wdy.data() + begin, wdy.stride(), wh.data(), wh.stride(),
               du.data(), r);
      store<T>(du.data(), rows, r, begin, grads.u, nullptr);
    });
  }
  if (grads.v.data != nullptr) {
    const Widened<T> wx(x, 0, tokens);
    parallel_for(context, ceil_div(r, kRowTile), [&](std::int64_t tile) {
      const std::int64_t begin = tile * kRowTile, rows = std::min(kRowTile, r - begin);
      std::vector<Sum> dv(static_cast<std::size_t>(rows * n));
      multiply('T', 'N', rows, n, tokens, dh.data() + begin, r_stride, wx.data(), wx.stride(),
               dv.data(), n);
      store<T>(dv.data(), rows, n, begin, grads.v, nullptr);
    });
  }
  if (grads.bias.data != nullptr) {
    std::vector<Sum> sum(static_cast<std::size_t>(m));
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t j = 0; j < m; ++j)
        sum[j] += to_float(static_cast<const T*>(dy.data)[t * dy.row_stride + j]);
    for (std::int64_t j = 0; j < m; ++j) static_cast<T*>(grads.bias.data)[j] = rounded<T>(sum[j]);
  }
}

}  // namespace

void low_rank_linear_cpu(const Context& context, ConstMatrixView x, ConstMatrixView u,
                         ConstMatrixView v, ConstVectorView bias, MatrixView y, MatrixView hidden) {
  dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    forward<T>(context, x, u, v, static_cast<const T*>(bias.data), y, hidden);
  });
}

void low_rank_linear_backward_cpu(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                  ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                                  const LowRankGradients& grads) {
  dispatch_dtype(dy.dtype, [&](auto element) {
    backward<decltype(element)>(context, dy, x, u, v, hidden, grads);
  });
}

}  // namespace structmat
