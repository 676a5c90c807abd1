// SPDX-License-Identifier: Apache-2.0
// Tokens are the rows of every product and are taken in tiles whose hidden units h stay in the
// cache. h is stored as the first factor makes it, (token, k, q), and the second reads it through a
// table of offsets: nothing is permuted. The gradient of x goes the same way back.
#include "monarch/monarch_simd.h"

#include "block_linear_simd.h"
#include "monarch/monarch_sizes.h"
#include "product_simd.h"

namespace structmat {
namespace {

using monarch::Sizes;

// One direction: h of input block k lies at k * step of a token's row.
struct HiddenLayout {
  std::int64_t step, row;
};

template <class T>
struct Monarch {
  using S = accumulator_t<T>;
  static constexpr int w = kLanes<S>;
  using F = Factor<S, T>;

  const Context& context;
  const MonarchWeights& weights;
  const Sizes s;

  // Numbers from one block of hidden units to the next, and a token. An odd number of cache lines:
  // column j of all blocks would else share few sets of the level-1 cache.
  static std::int64_t block_step(std::int64_t units) {
    const std::int64_t step = round_up(units, w);
    return step / w % 2 == 0 && step > w ? step + w : step;
  }
  std::int64_t h_step() const { return block_step(s.Q); }
  std::int64_t g_step() const { return block_step(s.S); }
  std::int64_t h_row() const { return s.K * h_step() + w; }
  std::int64_t g_row() const { return s.J * g_step() + w; }

  // The factors as forward (w1, w2) and backward (t1, t2) multiply by them.
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

  struct Tables {
    Gather x, h, dy, dh;
  };
  // Where each product finds its inputs.
  Tables tables(Scratch& memory) const {
    const std::int64_t identity = std::max(s.I, s.J);
    const bool shared = !s.interleaved_hidden;
    std::int64_t* const to = memory.get<std::int64_t>(identity + s.L + (shared ? s.S : s.K * s.Q) +
                                                      (shared ? s.Q : s.K * s.Q));
    std::int64_t *const dy_table = to + identity, *const h_table = dy_table + s.L,
                        *const g_table = h_table + (shared ? s.S : s.K * s.Q);
    for (std::int64_t i = 0; i < identity; ++i) to[i] = i;
    for (std::int64_t l = 0; l < s.L; ++l) dy_table[l] = s.interleaved_output ? l * s.J : l;
    Tables t{{to, 0, 1, s.I, 0},
             {h_table, 0, 1, s.R, 0},
             {dy_table, 0, 1, s.interleaved_output ? 1 : s.L, 0},
             {g_table, 0, 1, s.R, 0}};
    if (shared) {  // unit (k, j, r) is r from the start of run j of block k, and of run k of block
                   // j
      for (std::int64_t u = 0; u < s.S; ++u) h_table[u] = u / s.R * h_step() + u % s.R;
      for (std::int64_t q = 0; q < s.Q; ++q) g_table[q] = q / s.R * g_step() + q % s.R;
    } else {
      for (std::int64_t k = 0; k < s.K; ++k)
        for (std::int64_t q = 0; q < s.Q; ++q) {
          const auto [j, u] = s.place(k, q);
          h_table[j * s.S + u] = k * h_step() + q;
          g_table[k * s.Q + q] = j * g_step() + u;
        }
      t.h = {h_table, s.S, 1, 0, 0};
      t.dh = {g_table, s.Q, 1, 0, 0};
    }
    return t;
  }

  // Block b of rows [t0, t1) of x times a first factor, to the hidden units at `to`.
  static void to_hidden(const F& f, const Gather& from, const S* x, std::int64_t ldx,
                        std::int64_t rows, std::int64_t b, S* to, std::int64_t step,
                        std::int64_t row) {
    static thread_local Scratch memory;
    multiply_block(f, f.get(b, memory), x + from.base(b), ldx, from.table(b), rows,
                   static_cast<const S*>(nullptr), to + b * step, row, true);
  }

  // y = out(second(first(x))) over all tokens, with hidden units laid out by step and row. The
  // hidden units of rows [t0, t1) are shown to keep(t0, t1, h) once they are there.
  template <class Keep>
  void two_products(F first, F second, const Gather& from_x, const Gather& from_h,
                    ConstMatrixView x, const Output<S, T>& out, std::int64_t step, std::int64_t row,
                    Keep&& keep) const {
    static thread_local Scratch first_memory, second_memory, h_memory, x_memory;
    const std::int64_t tokens = x.rows, groups = out.groups(second.block.size),
                       threads = thread_count(context);
    if (tokens < threads * kTokenTile / 2) {  // few: threads share the blocks
      const WideRows<S, T> rows(x, 0, tokens, x_memory);
      S* const h = h_memory.get<S>(tokens * row);
      parallel_parts(first.block.size, tokens * first.packed_size, [&](std::int64_t b) {
        to_hidden(first, from_x, rows.data, rows.stride, tokens, b, h, step, row);
      });
      keep(std::int64_t{0}, tokens, h);
      parallel_parts(groups, tokens * second.packed_size * out.group(), [&](std::int64_t group) {
        out.compute(second, from_h, h, row, 0, tokens, group);
      });
      return;
    }
    first.pack(context, first_memory);
    second.pack(context, second_memory);
    const TokenTiles tiles(tokens, threads);
    parallel_for(context, tiles.count, [&](std::int64_t tile) {
      const std::int64_t t0 = tiles.first(tile), t1 = tiles.first(tile + 1);
      const WideRows<S, T> rows(x, t0, t1, x_memory);
      S* const h = h_memory.get<S>((t1 - t0) * row);
      for (std::int64_t b = 0; b < first.block.size; ++b)
        to_hidden(first, from_x, rows.data, rows.stride, t1 - t0, b, h, step, row);
      keep(t0, t1, h);
      for (std::int64_t group = 0; group < groups; ++group)
        out.compute(second, from_h, h, row, t0, t1, group);
    });
  }

  // body(b) for each block, several blocks a task: a task is worth its start from 100,000
  // multiplications on.
  template <class Body>
  void parallel_parts(std::int64_t blocks, std::int64_t work, Body&& body) const {
    const std::int64_t per = std::max<std::int64_t>(100000 / std::max<std::int64_t>(work, 1), 1),
                       tasks =
                           std::min<std::int64_t>(ceil_div(blocks, per), 4 * thread_count(context));
    parallel_for(context, tasks, [&](std::int64_t task) {
      for (std::int64_t b = blocks * task / tasks; b < blocks * (task + 1) / tasks; ++b) body(b);
    });
  }

  void forward(ConstMatrixView x, const T* bias, Activation activation, MatrixView y,
               T* hidden) const {
    static thread_local Scratch table_memory, bias_memory;
    const Tables from = tables(table_memory);
    Output<S, T> out{y, s.L, s.interleaved_output ? s.J : 1};
    out.activation = activation;
    out.set_bias(bias, s.J, bias_memory);
    two_products(w1(), w2(), from.x, from.h, x, out, h_step(), h_row(),
                 [&](std::int64_t t0, std::int64_t t1, const S* h) {
                   if (hidden != nullptr) keep_hidden(from.h, x.rows, t0, t1, h, hidden);
                 });
  }

  void keep_hidden(const Gather& from, std::int64_t tokens, std::int64_t t0, std::int64_t t1,
                   const S* h, T* hidden) const {
    for (std::int64_t j = 0; j < s.J; ++j)
      for (std::int64_t t = t0; t < t1; ++t) {
        const S* const line = h + (t - t0) * h_row() + from.base(j);
        const std::int64_t* const table = from.table(j);
        T* const to = hidden + (j * tokens + t) * s.S;
        for (std::int64_t u = 0; u < s.S; ++u) convert(line + table[u], to + u, 1);
      }
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
  static thread_local Scratch table_memory, t1_memory, t2_memory, w1_memory, h_memory, g_memory,
      total1_memory, total2_memory, bias_memory, token_memory;
  static thread_local Scratch rows_memory, copy_memory, wide_memory, line_memory;
  const bool want_w1 = grads.w1 != nullptr, want_w2 = grads.w2 != nullptr,
             want_x = grads.x.data != nullptr, want_bias = grads.bias.data != nullptr;
  const Tables from = tables(table_memory);
  Output<S, T> out{grads.x, s.I, 1};
  if (want_x && !want_w1 && !want_w2 && !want_bias)
    return two_products(t2(), t1(), from.dy, from.dh, dy, out, g_step(), g_row(), [](auto...) {});

  const bool want_g = want_x || want_w1, make_h = want_w2 && hidden == nullptr;
  F a1 = t1(), a2 = t2(), b1 = w1();
  if (want_x) a1.pack(context, t1_memory);
  if (want_g) a2.pack(context, t2_memory);
  if (make_h) b1.pack(context, w1_memory);
  const std::int64_t tokens = dy.rows,
                     chunk = std::clamp<std::int64_t>(tokens, 1, gradient_tokens(s.hidden())),
                     i_cols = round_up(s.I, w), l_cols = round_up(s.L, w);
  S* const g = want_g ? g_memory.get<S>(chunk * g_row()) : nullptr;
  S* const h = make_h ? h_memory.get<S>(chunk * h_row()) : nullptr;
  S* const total1 = want_w1 ? total1_memory.get<S>(s.K * s.Q * i_cols) : nullptr;
  S* const total2 = want_w2 ? total2_memory.get<S>(s.J * s.S * l_cols) : nullptr;
  S* const total_bias = want_bias ? bias_memory.get<S>(s.J * l_cols) : nullptr;
  std::int64_t* const offset = token_memory.get<std::int64_t>(3 * chunk);
  for (std::int64_t t = 0; t < chunk; ++t) {
    offset[t] = t * g_row();
    offset[chunk + t] = t * h_row();
    offset[2 * chunk + t] = t * s.S;
  }

  for (std::int64_t c0 = 0; c0 < tokens || c0 == 0; c0 += chunk) {
    const std::int64_t c1 = std::min(c0 + chunk, tokens), count = c1 - c0;
    const bool first = c0 == 0, last = c1 == tokens;
    const TokenTiles tiles(count, thread_count(context));
    if (want_g || make_h)
      parallel_for(context, tiles.count, [&](std::int64_t tile) {
        const std::int64_t t0 = tiles.first(tile), t1 = tiles.first(tile + 1), rows = t1 - t0;
        if (want_g) {
          const WideRows<S, T> from_dy(dy, c0 + t0, c0 + t1, rows_memory);
          S* const to = g + t0 * g_row();
          for (std::int64_t j = 0; j < s.J; ++j)
            to_hidden(a2, from.dy, from_dy.data, from_dy.stride, rows, j, to, g_step(), g_row());
          for (std::int64_t k = 0; want_x && k < s.K; ++k)
            out.compute(a1, from.dh, to, g_row(), c0 + t0, c0 + t1, k);
        }
        if (make_h) {
          const WideRows<S, T> from_x(x, c0 + t0, c0 + t1, rows_memory);
          for (std::int64_t k = 0; k < s.K; ++k)
            to_hidden(b1, from.x, from_x.data, from_x.stride, rows, k, h + t0 * h_row(), h_step(),
                      h_row());
        }
      });
    if (want_w1)
      parallel_for(context, s.K, [&](std::int64_t k) {
        S* const block = copy_memory.get<S>(count * i_cols);
        copy_columns<S, T>(x, c0, c1, k * s.I, 1, s.I, block);
        S* const total = total1 + k * s.Q * i_cols;
        const std::int64_t* const table = from.dh.table(k);
        weight_gradient(
            count, s.Q, s.I, g + from.dh.base(k), [&](std::int64_t q) { return table[q]; }, offset,
            block, i_cols, total, first);
        if (last)
          for (std::int64_t q = 0; q < s.Q; ++q)
            convert(total + q * i_cols, static_cast<T*>(grads.w1) + (k * s.Q + q) * s.I, s.I);
      });
    if (want_w2 || want_bias)
      parallel_for(context, s.J, [&](std::int64_t j) {
        S* const block = copy_memory.get<S>(count * l_cols);
        copy_columns<S, T>(dy, c0, c1, from.dy.base(j), s.interleaved_output ? s.J : 1, s.L, block);
        if (want_bias) {
          S* const sums = total_bias + j * l_cols;
          add_columns(block, count, l_cols, sums, first);
          for (std::int64_t l = 0; last && l < s.L; ++l)
            convert(sums + l, static_cast<T*>(grads.bias.data) + s.column(j, l), 1);
        }
        if (!want_w2) return;
        S* const total = total2 + j * s.S * l_cols;
        if (make_h) {
          const std::int64_t* const table = from.h.table(j);
          weight_gradient(
              count, s.S, s.L, h + from.h.base(j), [&](std::int64_t u) { return table[u]; },
              offset + chunk, block, l_cols, total, first);
        } else {
          const T* const given = hidden + (j * tokens + c0) * s.S;
          const S* wide;
          if constexpr (std::is_same_v<S, T>) {
            wide = given;
          } else {
            S* const to = wide_memory.get<S>(count * s.S);
            convert(given, to, count * s.S);
            wide = to;
          }
          weight_gradient(
              count, s.S, s.L, wide, [](std::int64_t u) { return u; }, offset + 2 * chunk, block,
              l_cols, total, first);
        }
        if (last) {
          T* const to = static_cast<T*>(grads.w2) + j * s.L * s.S;
          S* const room = line_memory.get<S>(round_up(s.S, w) * l_cols);
          std::copy_n(total, s.S * l_cols, room);
          store_transposed(room, l_cols, s.S, s.L, to, s.S);
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
    Monarch<T>{context, weights, Sizes(weights)}.forward(x, static_cast<const T*>(bias.data),
                                                         activation, y, static_cast<T*>(hidden));
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
