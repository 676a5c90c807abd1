// SPDX-License-Identifier: Apache-2.0
// Tokens are the rows of every product and are taken in tiles whose hidden units h stay in the
// cache. The first factor's results are put where the second reads them, (block, token, unit),
// while they are in the level-1 cache; the gradient of x goes the same way back.
#include "monarch/monarch_simd.h"

#include "block_linear_simd.h"
#include "monarch/monarch_hidden_simd.h"
#include "product_simd.h"

namespace structmat {
namespace {

template <class T>
struct Monarch {
  using S = accumulator_t<T>;
  static constexpr int w = kLanes<S>;
  using F = Factor<S, T>;

  const Context& context;
  const MonarchWeights& weights;
  const Sizes s;

  // The factors as forward (w1, w2) and backward (t2, t1) multiply by them.
  F w1() const { return {weights.w1.data, k_blocks(), i_axis(), q_axis()}; }
  F w2() const { return {weights.w2.data, j_blocks(), s_axis(), l_axis()}; }
  F t1() const { return {weights.w1.data, k_blocks(), q_axis(), i_axis()}; }
  F t2() const { return {weights.w2.data, j_blocks(), l_axis(), s_axis()}; }
  Axis k_blocks() const { return Axis::of(s.K, weights.w1.strides[0]); }
  Axis q_axis() const { return Axis::of(weights.w1, 1, 2); }
  Axis i_axis() const { return Axis::of(s.I, weights.w1.strides[3]); }
  Axis j_blocks() const { return Axis::of(s.J, weights.w2.strides[0]); }
  Axis s_axis() const { return Axis::of(weights.w2, 2, 3); }
  Axis l_axis() const { return Axis::of(s.L, weights.w2.strides[1]); }

  Columns of_x() const { return {1, s.I, 0, 1}; }
  Columns of_dy() const {
    return s.interleaved_output ? Columns{s.J, 0, 1, s.J} : Columns{1, s.L, 0, 1};
  }

  // Hidden units of `tokens` tokens, of the blocks of y (h) or of x (dh).
  Hidden<S> h_of(S* data, std::int64_t tokens) const { return {data, tokens * s.S, s.S}; }
  Hidden<S> g_of(S* data, std::int64_t tokens) const { return {data, tokens * s.Q, s.Q}; }

  // Blocks [b0, b1) of rows [t0, t1), which begin at x, times a first factor; token t0 is `first`
  // of `to`.
  template <bool kForward>
  void to_hidden(const F& f, const S* x, std::int64_t ldx, const Columns& from, std::int64_t rows,
                 std::int64_t b0, std::int64_t b1, const Hidden<S>& to, std::int64_t first) const {
    static thread_local Scratch weights_memory, z_memory;
    const auto ready = f.ready(b0, b1, weights_memory);
    const std::int64_t step = round_up(f.width.size, w), ldz = (b1 - b0) * step;
    S* const z = z_memory.get<S>(kBlockRows * ldz);
    for_row_blocks(rows, [&](std::int64_t r0, int count) {
      for (std::int64_t b = b0; b < b1; ++b)
        multiply_rows(f, ready(b), Rows<S>{x + from.base(b) + r0 * ldx, ldx, from.step}, count,
                      static_cast<const S*>(nullptr), z + (b - b0) * step, ldz, true);
      for (int r = 0; r < count; ++r)
        permute<S, kForward>(s, z + r * ldz, step, b0, b1, to, first + r0 + r);
    });
  }

  // Blocks at a time: as many as a vector has lanes where units of as many blocks become
  // neighbours, else what fits half of the level-2 cache.
  std::int64_t group(const F& f, std::int64_t tasks) const {
    const std::int64_t most = std::clamp<std::int64_t>(f.block.size / tasks, 1, w);
    if (s.R == 1) return most;
    const std::int64_t fit = (std::int64_t{256} << 10) / sizeof(S) /
                             std::max<std::int64_t>(f.packed_size, 1);
    return std::clamp<std::int64_t>(fit, 1, most);
  }

  // y = out(second(first(x))) over all tokens. The hidden units are made at h (blocks of the second
  // factor, tokens, units), if it is not null.
  template <bool kForward>
  void two_products(F first, F second, const Columns& from, ConstMatrixView x,
                    const Output<S, T>& out, S* h) const {
    static thread_local Scratch first_memory, second_memory, h_memory, x_memory;
    const std::int64_t tokens = x.rows, blocks = second.block.size, units = second.depth.size,
                       groups = out.groups(blocks), threads = thread_count(context);
    const auto second_product = [&](const Hidden<S>& from_h, std::int64_t at, std::int64_t t0,
                                    std::int64_t t1, std::int64_t index) {
      out.compute(second, from_h.data + at * from_h.ld, from_h.ld, {1, from_h.block, 0, 1}, t0, t1,
                  out.range(index, blocks));
    };
    if (tokens < threads * kTokenTile / 2) {  // few: threads share the blocks
      const WideRows<S, T> rows(x, 0, tokens, x_memory);
      const Hidden<S> to{h != nullptr ? h : h_memory.get<S>(blocks * tokens * units),
                         tokens * units, units};
      const std::int64_t per = group(first, threads);
      parallel_parts(ceil_div(first.block.size, per), tokens * first.packed_size * per,
                     [&](std::int64_t part) {
                       to_hidden<kForward>(first, rows.data, rows.stride, from, tokens, part * per,
                                           std::min(first.block.size, (part + 1) * per), to, 0);
                     });
      parallel_parts(groups, tokens * second.packed_size * out.group(),
                     [&](std::int64_t index) { second_product(to, 0, 0, tokens, index); });
      return;
    }
    first.pack(context, first_memory);
    second.pack(context, second_memory);
    const std::int64_t per = group(first, 1);
    const TokenTiles tiles(tokens, threads);
    parallel_for(context, tiles.count, [&](std::int64_t tile) {
      const std::int64_t t0 = tiles.first(tile), t1 = tiles.first(tile + 1), count = t1 - t0;
      const WideRows<S, T> rows(x, t0, t1, x_memory);
      const Hidden<S> to =
          h != nullptr ? Hidden<S>{h, tokens * units, units}
                       : Hidden<S>{h_memory.get<S>(blocks * count * units), count * units, units};
      const std::int64_t at = h != nullptr ? t0 : 0;
      for (std::int64_t b = 0; b < first.block.size; b += per)
        to_hidden<kForward>(first, rows.data, rows.stride, from, count, b,
                            std::min(first.block.size, b + per), to, at);
      for (std::int64_t index = 0; index < groups; ++index)
        second_product(to, at, t0, t1, index);
    });
  }

  // body(part) for each of `parts`, several a task: a task is worth its start from 100,000
  // multiplications on.
  template <class Body>
  void parallel_parts(std::int64_t parts, std::int64_t work, Body&& body) const {
    const std::int64_t per = std::max<std::int64_t>(100000 / std::max<std::int64_t>(work, 1), 1),
                       tasks =
                           std::min<std::int64_t>(ceil_div(parts, per), 4 * thread_count(context));
    parallel_for(context, tasks, [&](std::int64_t task) {
      for (std::int64_t b = parts * task / tasks; b < parts * (task + 1) / tasks; ++b) body(b);
    });
  }

  void forward(ConstMatrixView x, const T* bias, Activation activation, MatrixView y,
               T* hidden) const {
    static thread_local Scratch bias_memory, hidden_memory;
    Output<S, T> out{y, s.L, s.interleaved_output ? s.J : 1};
    out.activation = activation;
    out.set_bias(bias, s.J, bias_memory);
    const std::int64_t rows = s.J * x.rows;
    S* h = nullptr;
    if constexpr (std::is_same_v<S, T>)
      h = hidden;
    else if (hidden != nullptr)
      h = hidden_memory.get<S>(rows * s.S);
    two_products<true>(w1(), w2(), of_x(), x, out, h);
    if (!std::is_same_v<S, T> && hidden != nullptr)
      parallel_for(context, s.J, [&](std::int64_t j) {
        convert(h + j * x.rows * s.S, hidden + j * x.rows * s.S, x.rows * s.S);
      });
  }

  void backward(ConstMatrixView dy, ConstMatrixView x, const T* hidden,
                const MonarchGradients& grads) const;
};

// Tokens of which h and dh are held at a time, for the gradients of the weights: some 8 MB, in the
// last cache.
inline std::int64_t gradient_tokens(std::int64_t hidden) {
  return std::clamp<std::int64_t>((std::int64_t{1} << 20) / std::max<std::int64_t>(hidden, 1), 96,
                                  1024);
}

template <class T>
void Monarch<T>::backward(ConstMatrixView dy, ConstMatrixView x, const T* hidden,
                          const MonarchGradients& grads) const {
  static thread_local Scratch t1_memory, t2_memory, w1_memory, h_memory, g_memory, total1_memory,
      total2_memory, bias_memory;
  static thread_local Scratch rows_memory, copy_memory, wide_memory, line_memory;
  const bool want_w1 = grads.w1 != nullptr, want_w2 = grads.w2 != nullptr,
             want_x = grads.x.data != nullptr, want_bias = grads.bias.data != nullptr;
  const Output<S, T> out{grads.x, s.I, 1};
  if (want_x && !want_w1 && !want_w2 && !want_bias)
    return two_products<false>(t2(), t1(), of_dy(), dy, out, nullptr);

  const bool want_g = want_x || want_w1, make_h = want_w2 && hidden == nullptr;
  F a1 = t1(), a2 = t2(), b1 = w1();
  if (want_x) a1.pack(context, t1_memory);
  if (want_g) a2.pack(context, t2_memory);
  if (make_h) b1.pack(context, w1_memory);
  const std::int64_t tokens = dy.rows,
                     chunk = std::clamp<std::int64_t>(tokens, 1, gradient_tokens(s.hidden())),
                     i_cols = round_up(s.I, w), l_cols = round_up(s.L, w);
  const Hidden<S> g = g_of(want_g ? g_memory.get<S>(chunk * s.hidden()) : nullptr, chunk);
  const Hidden<S> h = h_of(make_h ? h_memory.get<S>(chunk * s.hidden()) : nullptr, chunk);
  S* const total1 = want_w1 ? total1_memory.get<S>(s.K * s.Q * i_cols) : nullptr;
  S* const total2 = want_w2 ? total2_memory.get<S>(s.J * s.S * l_cols) : nullptr;
  S* const total_bias = want_bias ? bias_memory.get<S>(s.J * l_cols) : nullptr;
  const std::int64_t g_group = group(a2, 1), h_group = group(b1, 1);

  for (std::int64_t c0 = 0; c0 < tokens || c0 == 0; c0 += chunk) {
    const std::int64_t c1 = std::min(c0 + chunk, tokens), count = c1 - c0;
    const bool first = c0 == 0, last = c1 == tokens;
    const TokenTiles tiles(count, thread_count(context));
    if (want_g || make_h)
      parallel_for(context, tiles.count, [&](std::int64_t tile) {
        const std::int64_t t0 = tiles.first(tile), t1 = tiles.first(tile + 1), rows = t1 - t0;
        if (want_g) {
          const WideRows<S, T> from(dy, c0 + t0, c0 + t1, rows_memory);
          for (std::int64_t j = 0; j < s.J; j += g_group)
            to_hidden<false>(a2, from.data, from.stride, of_dy(), rows, j,
                             std::min(s.J, j + g_group), g, t0);
          for (std::int64_t k = 0; want_x && k < s.K; ++k)
            out.compute(a1, g.data + t0 * g.ld, g.ld, {1, g.block, 0, 1}, c0 + t0, c0 + t1,
                        out.range(k, s.K));
        }
        if (make_h) {
          const WideRows<S, T> from(x, c0 + t0, c0 + t1, rows_memory);
          for (std::int64_t k = 0; k < s.K; k += h_group)
            to_hidden<true>(b1, from.data, from.stride, of_x(), rows, k,
                            std::min(s.K, k + h_group), h, t0);
        }
      });
    if (want_w1)
      parallel_for(context, s.K, [&](std::int64_t k) {
        S* const block = copy_memory.get<S>(count * i_cols);
        copy_columns<S, T>(x, c0, c1, k * s.I, 1, s.I, block);
        S* const total = total1 + k * s.Q * i_cols;
        weight_gradient(count, s.Q, s.I, g.data + k * g.block, g.ld, block, i_cols, total, first);
        if (last)
          for (std::int64_t q = 0; q < s.Q; ++q)
            convert(total + q * i_cols, static_cast<T*>(grads.w1) + (k * s.Q + q) * s.I, s.I);
      });
    if (want_w2 || want_bias)
      parallel_for(context, s.J, [&](std::int64_t j) {
        S* const block = copy_memory.get<S>(count * l_cols);
        copy_columns<S, T>(dy, c0, c1, of_dy().base(j), of_dy().step, s.L, block);
        if (want_bias) {
          S* const sums = total_bias + j * l_cols;
          add_columns(block, count, l_cols, sums, first);
          for (std::int64_t l = 0; last && l < s.L; ++l)
            convert(sums + l, static_cast<T*>(grads.bias.data) + s.column(j, l), 1);
        }
        if (!want_w2) return;
        S* const total = total2 + j * s.S * l_cols;
        const S* from = h.data + j * h.block;
        if (!make_h) {
          const T* const given = hidden + (j * tokens + c0) * s.S;
          if constexpr (std::is_same_v<S, T>) {
            from = given;
          } else {
            S* const wide = wide_memory.get<S>(count * s.S);
            convert(given, wide, count * s.S);
            from = wide;
          }
        }
        weight_gradient(count, s.S, s.L, from, s.S, block, l_cols, total, first);
        if (last) {
          S* const room = line_memory.get<S>(round_up(s.S, w) * l_cols);
          std::copy_n(total, s.S * l_cols, room);
          store_transposed(room, l_cols, s.S, s.L, static_cast<T*>(grads.w2) + j * s.L * s.S, s.S);
        }
      });
  }
}

}  // namespace

namespace STRUCTMAT_SIMD {

void monarch_forward(const Context& context, ConstMatrixView x, const MonarchWeights& weights,
                     ConstVectorView bias, Activation activation, MatrixView y, void* hidden) {
  dispatch_dtype(x.dtype, [&](auto element) {
    using T = decltype(element);
    Monarch<T>{context, weights, Sizes(weights)}.forward(
        x, static_cast<const T*>(bias.data), activation, y, static_cast<T*>(hidden));
  });
}

void monarch_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                      const MonarchWeights& weights, const void* hidden,
                      const MonarchGradients& grads) {
  dispatch_dtype(dy.dtype, [&](auto element) {
    using T = decltype(element);
    Monarch<T>{context, weights, Sizes(weights)}.backward(dy, x, static_cast<const T*>(hidden),
                                                          grads);
  });
}

}  // namespace STRUCTMAT_SIMD
}  // namespace structmat
