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

  // From one block of hidden units to the next: an odd number of cache lines, as a vector of a
  // token's units goes to as many blocks at once. 0.55 of the time of a power of two.
  static std::int64_t block_step(std::int64_t tokens, std::int64_t units) {
    return (ceil_div(tokens * units, w) | 1) * w;
  }

  // Blocks [b0, b1) of rows [t0, t1), which begin at x, times a first factor; token t0 is `first`
  // of `to`.
  template <bool kForward>
  void to_hidden(const F& f, const S* x, std::int64_t ldx, const Columns& from, std::int64_t rows,
                 std::int64_t b0, std::int64_t b1, const Hidden<S>& to, std::int64_t first) const {
    static thread_local Scratch weights_memory, z_memory;
    const auto ready = f.ready(b0, b1, from.step == 1 ? rows : kFewRows + 1, weights_memory);
    const std::int64_t step = round_up(f.width.size, w), ldz = (b1 - b0) * step;
    S* const z = z_memory.get<S>(kBlockRows * ldz);
    for_row_blocks(rows, [&](std::int64_t r0, int count) {
      for (std::int64_t b = b0; b < b1; ++b) {
        const Rows<S> a{x + from.base(b) + r0 * ldx, ldx, from.step};
        if (r0 + count < rows) fetch_ahead(a, count, f.depth.size);
        multiply_rows<S, T>(ready, b, a, count, static_cast<const S*>(nullptr), z + (b - b0) * step,
                            ldz, true);
      }
      for (int r = 0; r < count; ++r)
        permute<S, kForward>(s, z + r * ldz, step, b0, b1, to, first + r0 + r);
    });
  }

  // Blocks at a time: as many as a vector has lanes where units of as many blocks become
  // neighbours, else what fits half of the level-2 cache.
  std::int64_t group(const F& f, std::int64_t tasks) const {
    const std::int64_t most = std::clamp<std::int64_t>(f.block.size / tasks, 1, w);
    return s.R == 1 ? most : std::min(neighbours_of(f), most);
  }

  // y = out(second(first(x))) over all tokens. `hidden` (blocks of the second factor, tokens,
  // units) receives the hidden units, if it is not null.
  template <bool kForward>
  void two_products(F first, F second, const Columns& from, ConstMatrixView x, Output<S, T> out,
                    T* hidden) const {
    static thread_local Scratch first_memory, second_memory, h_memory, x_memory;
    const std::int64_t tokens = x.rows, blocks = second.block.size, units = second.depth.size,
                       threads = thread_count(context);
    std::int64_t groups = out.groups(blocks);
    S* h = nullptr;  // where they are made: in `hidden` itself, or in a tile
    if constexpr (std::is_same_v<S, T>) h = hidden;
    const auto keep = [&](const Hidden<S>& made, std::int64_t b, std::int64_t t0, std::int64_t t1) {
      if (h == nullptr && hidden != nullptr)
        convert(made.data + b * made.block, hidden + (b * tokens + t0) * units, (t1 - t0) * units);
    };
    const auto second_product = [&](const Hidden<S>& from_h, std::int64_t at, std::int64_t t0,
                                    std::int64_t t1, std::int64_t index) {
      out.compute(second, from_h.data + at * from_h.ld, from_h.ld, {1, from_h.block, 0, 1}, t0, t1,
                  out.range(index, blocks));
    };
    if (tokens < threads * kTokenTile / 2) {  // few: threads share the blocks
      const WideRows<S, T> rows(x, 0, tokens, x_memory);
      const std::int64_t step = h != nullptr ? tokens * units : block_step(tokens, units);
      const Hidden<S> to{h != nullptr ? h : h_memory.get<S>(blocks * step), step, units};
      const std::int64_t per = group(first, threads);
      parallel_parts(ceil_div(first.block.size, per), tokens * first.packed_size * per,
                     [&](std::int64_t part) {
                       to_hidden<kForward>(first, rows.data, rows.stride, from, tokens, part * per,
                                           std::min(first.block.size, (part + 1) * per), to, 0);
                     });
      parallel_parts(blocks, tokens * units, [&](std::int64_t b) { keep(to, b, 0, tokens); });
      parallel_parts(groups, tokens * second.packed_size * out.group(),
                     [&](std::int64_t index) { second_product(to, 0, 0, tokens, index); });
      return;
    }
    out.neighbours = std::min(neighbours_of(second), blocks);
    groups = out.groups(blocks);
    first.pack(context, first_memory);
    second.pack(context, second_memory);
    const std::int64_t per = group(first, 1);
    const TokenTiles tiles(tokens, threads);
    parallel_for(context, tiles.count, [&](std::int64_t tile) {
      const std::int64_t t0 = tiles.first(tile), t1 = tiles.first(tile + 1), count = t1 - t0;
      const WideRows<S, T> rows(x, t0, t1, x_memory);
      const std::int64_t step = h != nullptr ? tokens * units : block_step(count, units);
      const Hidden<S> to{h != nullptr ? h : h_memory.get<S>(blocks * step), step, units};
      const std::int64_t at = h != nullptr ? t0 : 0;
      for (std::int64_t b = 0; b < first.block.size; b += per)
        to_hidden<kForward>(first, rows.data, rows.stride, from, count, b,
                            std::min(first.block.size, b + per), to, at);
      for (std::int64_t b = 0; b < blocks; ++b) keep(to, b, t0, t1);
      for (std::int64_t index = 0; index < groups; ++index) second_product(to, at, t0, t1, index);
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
    static thread_local Scratch bias_memory;
    Output<S, T> out{y, s.L, s.interleaved_output ? s.J : 1};
    out.activation = activation;
    out.set_bias(bias, s.J, bias_memory);
    two_products<true>(w1(), w2(), of_x(), x, out, hidden);
  }

  void backward(ConstMatrixView dy, ConstMatrixView x, const T* hidden,
                const MonarchGradients& grads) const;
};

// Tokens of which h and dh are held at a time for the gradients of the weights: with x, dy and dx
// some 16 MB, in the last cache.
inline std::int64_t gradient_chunk(std::int64_t hidden, std::int64_t threads) {
  const std::int64_t fit = (std::int64_t{768} << 10) / std::max<std::int64_t>(hidden, 1);
  return round_up(std::max(std::min(fit, std::int64_t{16} << 10), threads * kTokenTile),
                  kGradientTokens);
}

template <class T>
void Monarch<T>::backward(ConstMatrixView dy, ConstMatrixView x, const T* hidden,
                          const MonarchGradients& grads) const {
  static thread_local Scratch t1_memory, t2_memory, w1_memory, h_memory, g_memory, total1_memory,
      total2_memory, bias_memory;
  static thread_local Scratch rows_memory, wide_memory;
  const bool want_w1 = grads.w1 != nullptr, want_w2 = grads.w2 != nullptr,
             want_x = grads.x.data != nullptr, want_bias = grads.bias.data != nullptr;
  Output<S, T> out{grads.x, s.I, 1};
  if (want_x && !want_w1 && !want_w2 && !want_bias)
    return two_products<false>(t2(), t1(), of_dy(), dy, out, nullptr);

  const bool want_g = want_x || want_w1, make_h = want_w2 && hidden == nullptr;
  F a1 = t1(), a2 = t2(), b1 = w1();
  if (want_x) a1.pack(context, t1_memory);
  if (want_g) a2.pack(context, t2_memory);
  if (make_h) b1.pack(context, w1_memory);
  const std::int64_t tokens = dy.rows, threads = thread_count(context),
                     chunk =
                         std::clamp<std::int64_t>(tokens, 1, gradient_chunk(s.hidden(), threads)),
                     s_rows = round_up(s.S, w);
  const std::int64_t g_step = block_step(chunk, s.Q), h_step = block_step(chunk, s.S);
  const Hidden<S> g{want_g ? g_memory.get<S>(s.K * g_step) : nullptr, g_step, s.Q};
  const Hidden<S> h{make_h ? h_memory.get<S>(s.J * h_step) : nullptr, h_step, s.S};
  WeightGradients<S, T> d1{x, of_x(), s.I, s.Q, s.Q, nullptr},
      d2{dy, of_dy(), s.L, s.S, s_rows, nullptr};
  if (want_w1) d1.totals = total1_memory.get<S>(s.K * s.Q * d1.ld());
  if (want_w2) d2.totals = total2_memory.get<S>(s.J * s_rows * d2.ld());
  if (want_bias) d2.sums = bias_memory.get<S>(s.J * d2.ld());
  out.neighbours = std::min(neighbours_of(a1), s.K);
  const std::int64_t a_group = group(a2, 1), b_group = group(b1, 1),
                     group1 = d1.group(s.K, threads), group2 = d2.group(s.J, threads),
                     tasks1 = want_w1 ? ceil_div(s.K, group1) : 0,
                     tasks2 = want_w2 || want_bias ? ceil_div(s.J, group2) : 0;

  for (std::int64_t c0 = 0; c0 < tokens || c0 == 0; c0 += chunk) {
    const std::int64_t c1 = std::min(c0 + chunk, tokens);
    const TokenTiles tiles(c1 - c0, threads);
    if (want_g || make_h)
      parallel_for(context, tiles.count, [&](std::int64_t tile) {
        const std::int64_t t0 = tiles.first(tile), t1 = tiles.first(tile + 1), rows = t1 - t0;
        if (want_g) {
          const WideRows<S, T> from(dy, c0 + t0, c0 + t1, rows_memory);
          for (std::int64_t j = 0; j < s.J; j += a_group)
            to_hidden<false>(a2, from.data, from.stride, of_dy(), rows, j,
                             std::min(s.J, j + a_group), g, t0);
          for (std::int64_t i = 0; want_x && i < out.groups(s.K); ++i)
            out.compute(a1, g.data + t0 * g.ld, g.ld, {1, g.block, 0, 1}, c0 + t0, c0 + t1,
                        out.range(i, s.K));
        }
        if (make_h) {
          const WideRows<S, T> from(x, c0 + t0, c0 + t1, rows_memory);
          for (std::int64_t k = 0; k < s.K; k += b_group)
            to_hidden<true>(b1, from.data, from.stride, of_x(), rows, k, std::min(s.K, k + b_group),
                            h, t0);
        }
      });
    parallel_for(context, tasks1 + tasks2, [&](std::int64_t task) {
      if (task < tasks1) {
        const std::int64_t k0 = task * group1, k1 = std::min(s.K, k0 + group1);
        d1.add(c0, c1, k0, k1, [&](std::int64_t k, std::int64_t t, std::int64_t) {
          return Rows<S>{g.data + k * g.block + t * g.ld, 1, g.ld};
        });
        return;
      }
      const std::int64_t j0 = (task - tasks1) * group2, j1 = std::min(s.J, j0 + group2);
      d2.add(c0, c1, j0, j1, [&](std::int64_t j, std::int64_t t, std::int64_t count) {
        if (make_h) return Rows<S>{h.data + j * h.block + t * h.ld, 1, h.ld};
        const T* const given = hidden + (j * tokens + c0 + t) * s.S;
        if constexpr (std::is_same_v<S, T>) {
          return Rows<S>{given, 1, s.S};
        } else {
          S* const wide = wide_memory.get<S>(count * s.S);
          convert(given, wide, count * s.S);
          return Rows<S>{wide, 1, s.S};
        }
      });
    });
  }
  parallel_for(context, tasks1 + tasks2, [&](std::int64_t task) {
    if (task < tasks1) {
      const std::int64_t q1 = std::min(s.K, (task + 1) * group1) * s.Q;
      for (std::int64_t q = task * group1 * s.Q; q < q1; ++q)
        convert(d1.totals + q * d1.ld(), static_cast<T*>(grads.w1) + q * s.I, s.I);
      return;
    }
    const std::int64_t j1 = std::min(s.J, (task - tasks1 + 1) * group2);
    for (std::int64_t j = (task - tasks1) * group2; j < j1; ++j) {
      for (std::int64_t l = 0; want_bias && l < s.L; ++l)
        convert(d2.sums + j * d2.ld() + l, static_cast<T*>(grads.bias.data) + s.column(j, l), 1);
      if (want_w2)
        store_transposed(d2.totals + j * s_rows * d2.ld(), d2.ld(), s.S, s.L,
                         static_cast<T*>(grads.w2) + j * s.L * s.S, s.S);
    }
  });
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
