// SPDX-License-Identifier: Apache-2.0
// Block (a, d) of the factor multiplies columns (a, c, d) of x for all c.
#include "kronecker_sparse/kronecker_sparse_simd.h"

#include "block_linear_simd.h"

namespace structmat {
namespace {

template <class T>
struct KroneckerSparse {
  using S = accumulator_t<T>;
  static constexpr int w = kLanes<S>;
  using F = Factor<S, T>;

  const Context& context;
  const ConstArrayView& weights;
  const std::int64_t a = weights.sizes[0], b = weights.sizes[1], c = weights.sizes[2],
                     d = weights.sizes[3];

  Axis axis(int i) const { return Axis::of(weights.sizes[i], weights.strides[i]); }
  Axis blocks() const { return Axis::of(weights, 0, 3); }

  // Block (A, D) takes columns (A, p, D), p < depth.
  Columns columns(std::int64_t depth) const { return {d, depth * d, 1, d}; }

  void product(F f, const Columns& from, ConstMatrixView x, Output<S, T> out) const {
    static thread_local Scratch weights_memory, x_memory;
    const std::int64_t blocks = a * d, tokens = x.rows, threads = thread_count(context);
    if (blocks == 0) return;
    const bool few = tokens < threads * kTokenTile / 2;  // threads share the blocks
    // Blocks side by side with weights of 128 KB: x is read along its rows.
    const std::int64_t fit = (std::int64_t{128} << 10) / sizeof(S) /
                             std::max<std::int64_t>(f.packed_size, 1);
    out.neighbours = std::clamp<std::int64_t>(
        std::min<std::int64_t>(fit, few ? blocks / (4 * threads) : 64), 1, blocks);
    const std::int64_t groups = out.groups(blocks);
    if (few) {
      const WideRows<S, T> rows(x, 0, tokens, x_memory);
      const std::int64_t work = std::max<std::int64_t>(tokens * f.packed_size * out.group(), 1),
                         tasks = std::clamp<std::int64_t>(groups * work / 100000, 1,
                                                          std::min(groups, 4 * threads));
      parallel_for(context, tasks, [&](std::int64_t task) {
        for (std::int64_t g = groups * task / tasks; g < groups * (task + 1) / tasks; ++g)
          out.compute(f, rows.data, rows.stride, from, 0, tokens, out.range(g, blocks));
      });
      return;
    }
    f.pack(context, weights_memory);
    const TokenTiles tiles(tokens, threads);
    parallel_for(context, tiles.count, [&](std::int64_t tile) {
      const std::int64_t t0 = tiles.first(tile), t1 = tiles.first(tile + 1);
      const WideRows<S, T> rows(x, t0, t1, x_memory);
      for (std::int64_t g = 0; g < groups; ++g)
        out.compute(f, rows.data, rows.stride, from, t0, t1, out.range(g, blocks));
    });
  }

  void forward(ConstMatrixView x, const T* bias, Activation activation, MatrixView y) const {
    static thread_local Scratch bias_memory;
    Output<S, T> out{y, b, d};
    out.activation = activation;
    if (d > 0) out.set_bias(bias, a * d, bias_memory);
    product({weights.data, blocks(), axis(2), axis(1)}, columns(c), x, out);
  }

  void backward(ConstMatrixView dy, ConstMatrixView x,
                const KroneckerSparseGradients& grads) const {
    if (grads.x.data != nullptr)
      product({weights.data, blocks(), axis(1), axis(2)}, columns(b), dy,
              Output<S, T>{grads.x, c, d});
    if (grads.w != nullptr) gradient_of_weights(dy, x, static_cast<T*>(grads.w));
    if (grads.bias.data != nullptr) column_sums(dy, static_cast<T*>(grads.bias.data));
  }

  void gradient_of_weights(ConstMatrixView dy, ConstMatrixView x, T* to) const {
    static thread_local Scratch total_memory, dy_memory, x_memory;
    const std::int64_t tokens = dy.rows, b_cols = round_up(b, w), c_cols = round_up(c, w),
                       chunk = std::clamp<std::int64_t>(tokens, 1, 1024);
    S* const totals = total_memory.get<S>(a * d * b * c_cols);
    for (std::int64_t c0 = 0; c0 < tokens || c0 == 0; c0 += chunk) {
      const std::int64_t c1 = std::min(c0 + chunk, tokens), count = c1 - c0;
      parallel_for(context, a * d, [&](std::int64_t block) {
        const std::int64_t A = block / d, D = block % d;
        S* const from_dy = dy_memory.get<S>(count * b_cols);
        S* const from_x = x_memory.get<S>(count * c_cols);
        copy_columns<S, T>(dy, c0, c1, A * b * d + D, d, b, from_dy);
        copy_columns<S, T>(x, c0, c1, A * c * d + D, d, c, from_x);
        S* const total = totals + block * b * c_cols;
        weight_gradient(count, b, c, from_dy, b_cols, from_x, c_cols, total, c0 == 0);
        for (std::int64_t r = 0; c1 == tokens && r < b; ++r)
          for (std::int64_t p = 0; p < c; ++p)
            convert(total + r * c_cols + p, to + ((A * b + r) * c + p) * d + D, 1);
      });
    }
  }

  // Blocks of tokens are summed apart: the rounding grows with their number's square root.
  void column_sums(ConstMatrixView dy, T* to) const {
    constexpr std::int64_t kColumns = 1024, kTokens = 256;
    parallel_for(context, ceil_div(dy.cols, kColumns), [&](std::int64_t task) {
      static thread_local Scratch memory;
      const std::int64_t first = task * kColumns, cols = std::min(kColumns, dy.cols - first),
                         ld = round_up(cols, w);
      S* const block = memory.get<S>((kTokens + 1) * ld);
      S* const sums = block + kTokens * ld;
      for (std::int64_t t = 0; t < dy.rows || t == 0; t += kTokens) {
        const std::int64_t end = std::min(t + kTokens, dy.rows);
        copy_columns<S, T>(dy, t, end, first, 1, cols, block);
        add_columns(block, end - t, ld, sums, t == 0);
      }
      convert(sums, to + first, cols);
    });
  }
};

}  // namespace

namespace STRUCTMAT_SIMD {

void kronecker_sparse_forward(const Context& context, ConstMatrixView x, const ConstArrayView& w,
                              ConstVectorView bias, Activation activation, MatrixView y) {
  dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    KroneckerSparse<T>{context, w}.forward(x, static_cast<const T*>(bias.data), activation, y);
  });
}

void kronecker_sparse_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                               const ConstArrayView& w, const KroneckerSparseGradients& grads) {
  dispatch_dtype(dy.dtype, [&](auto element) {
    KroneckerSparse<decltype(element)>{context, w}.backward(dy, x, grads);
  });
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
