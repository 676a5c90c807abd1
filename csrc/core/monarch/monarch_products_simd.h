// SPDX-License-Identifier: Apache-2.0
// Tokens lie in the lanes of vectors and are taken in tiles whose hidden units h stay in the cache.
// The first factor's results are put where the second reads them, (block, unit, token): each vector
// of them has its address. The gradient of x goes the same way back. A handful of tokens would
// leave lanes empty; they are rows of products that read the weights along what is contiguous. For
// files under structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include "block_lanes_simd.h"
#include "block_linear_simd.h"
#include "monarch/monarch_hidden_simd.h"

namespace structmat {
namespace {

// kPairs: bfloat16 by the machine's own products of pairs.
template <class T, bool kPairs = false>
struct Monarch {
  using S = accumulator_t<T>;
  static constexpr int w = kLanes<S>;
  using F = Factor<S, T>;
  using L = LaneWeights<S, T, kPairs>;

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

  static L lanes_of(const F& f) { return {f.data, f.block, f.depth, f.width}; }

  // Where unit u of block b of the factor that is applied first lies, from token 0 on.
  template <bool kForward>
  S* place(const Hidden<S>& h, std::int64_t b, std::int64_t u) const {
    if (!s.interleaved_hidden && s.R == 1) return h.data + u * h.block + b * h.ld;
    if constexpr (kForward) {
      const auto [j, at] = s.place(b, u);
      return h.data + j * h.block + at * h.ld;
    } else {
      const auto [k, q] = s.place_back(b, u);
      return h.data + k * h.block + q * h.ld;
    }
  }

  // Rows [t0, t1) of x, blocks [b0, b1), times the factor that is applied first; t0 is token `at`
  // of `to`, in which a unit's tokens lie side by side.
  template <bool kForward>
  void first_product(const L& f, ConstMatrixView x, const Columns& from, std::int64_t t0,
                     std::int64_t t1, std::int64_t b0, std::int64_t b1, const Hidden<S>& to,
                     std::int64_t at) const {
    static thread_local Scratch memory;
    const std::int64_t lanes = round_up(t1 - t0, w), step = f.words() * lanes;
    S* const panels = memory.get<S>((b1 - b0) * step);
    load_panels<S, T, kPairs>(row_of<T>(x, t0), x.row_stride, t1 - t0, from, b0, b1, f.depth.size,
                              panels, lanes, step);
    for (std::int64_t b = b0; b < b1; ++b) {
      const bool more = from.step == 1 && b + 1 < f.block.size;
      const auto ahead = Ahead<false>::of(row_of<T>(x, t0) + (more ? from.base(b + 1) : 0),
                                          x.row_stride, more ? t1 - t0 : 0, f.depth.size);
      lanes_product<S, T, kPairs>(f, b, panels + (b - b0) * step, lanes, lanes, nullptr, true,
                                  ahead,
                                  [&](std::int64_t u) { return place<kForward>(to, b, u) + at; });
    }
  }

  void second_product(const L& f, const Hidden<S>& h, std::int64_t at, std::int64_t t0,
                      std::int64_t t1, const Output<S, T>& out,
                      const typename Output<S, T>::Range& blocks) const {
    static thread_local Scratch pair_memory;
    lanes_output(f, t0, t1, out, blocks, [&](std::int64_t b, std::int64_t lanes) {
      const S* const panel = h.data + b * h.block + at;
      if constexpr (kPairs) {
        S* const pairs = pair_memory.get<S>(f.words() * lanes);
        pair_lines(panel, f.depth.size, h.ld, lanes, pairs);
        return Panel<S>{pairs, lanes};
      } else {
        return Panel<S>{panel, h.ld};
      }
    });
  }

  // body(t0, t1, index) for tiles of tokens and each index < parts
  template <class Body>
  struct Phase {
    std::int64_t parts, work;  // multiplications of a part
    Body body;
  };
  template <class Body>
  Phase(std::int64_t, std::int64_t, Body) -> Phase<Body>;

  // Each phase is done for all of a tile's tokens before the next. Few tokens: threads share the
  // parts, and a part's weights meet all tiles.
  bool is_few(std::int64_t tokens) const {
    return tokens <= thread_count(context) * kTokenTile / 2;
  }
  template <class... Phases>
  void run(std::int64_t tokens, const Phases&... phases) const {
    const LaneTiles tiles(tokens, is_few(tokens) ? 1 : thread_count(context), w);
    const auto of_few = [&](const auto& phase) {
      parallel_parts(phase.parts, phase.work, [&](std::int64_t index) {
        for (std::int64_t i = 0; i < tiles.count; ++i)
          phase.body(tiles.first(i), tiles.first(i + 1), index);
      });
    };
    if (is_few(tokens)) return (of_few(phases), ...);
    parallel_for(context, tiles.count, [&](std::int64_t i) {
      const auto of_tile = [&](const auto& phase) {
        for (std::int64_t index = 0; index < phase.parts; ++index)
          phase.body(tiles.first(i), tiles.first(i + 1), index);
      };
      (of_tile(phases), ...);
    });
  }

  // Blocks of x that are read together.
  static std::int64_t read_together(const Columns& from) { return from.step == 1 ? 1 : w; }

  // y = out(second(first(x))) over all tokens. `hidden` (blocks of the second factor, tokens,
  // units) receives the hidden units, if it is not null.
  template <bool kForward>
  void two_products(const F& f1, const F& f2, const Columns& from, ConstMatrixView x,
                    Output<S, T> out, T* hidden) const {
    static thread_local Scratch first_memory, second_memory, h_memory;
    const std::int64_t tokens = x.rows, blocks = f2.block.size, units = f2.depth.size;
    if (tokens <= kFewRows && f1.reads_few(from.step) && f2.reads_few(1))
      return of_few_tokens<kForward>(f1, f2, from, x, out, hidden);
    L first = lanes_of(f1), second = lanes_of(f2);
    first.prepare(context, tokens, first_memory);
    second.prepare(context, tokens, second_memory);
    const bool few = is_few(tokens);
    const std::int64_t ld = few ? round_up(tokens, w) : kTokenTile, step = block_step<S>(ld, units),
                       per = read_together(from), groups = out.groups(blocks);
    S* const shared = few ? h_memory.get<S>(blocks * step) : nullptr;
    const auto h_of = [&] {
      return Hidden<S>{few ? shared : h_memory.get<S>(blocks * step), step, ld};
    };
    run(tokens,
        Phase{ceil_div(f1.block.size, per), tokens * f1.depth.size * f1.width.size * per,
              [&](std::int64_t t0, std::int64_t t1, std::int64_t i) {
                first_product<kForward>(first, x, from, t0, t1, i * per,
                                        std::min(f1.block.size, (i + 1) * per), h_of(),
                                        few ? t0 : 0);
              }},
        Phase{hidden != nullptr ? blocks : 0, tokens * units,
              [&](std::int64_t t0, std::int64_t t1, std::int64_t b) {
                const Hidden<S> h = h_of();
                store_panels<S, T>(h.data + b * h.block + (few ? t0 : 0), h.ld, 0, t1 - t0,
                                   {1, 0, 0, 1}, b, b + 1, units,
                                   hidden + (b * tokens + t0) * units, units, false);
              }},
        Phase{groups, tokens * units * out.width * out.group(),
              [&](std::int64_t t0, std::int64_t t1, std::int64_t i) {
                second_product(second, h_of(), few ? t0 : 0, t0, t1, out, out.range(i, blocks));
              }});
  }

  // So few that they are rows: blocks are shared by the threads.
  template <bool kForward>
  void of_few_tokens(const F& first, const F& second, const Columns& from, ConstMatrixView x,
                     const Output<S, T>& out, T* hidden) const {
    static thread_local Scratch h_memory, x_memory;
    const std::int64_t tokens = x.rows, blocks = second.block.size, units = second.depth.size;
    const Hidden<S> h = hidden_of_few<kForward>(first, WideRows<S, T>(x, 0, tokens, x_memory), from,
                                                tokens, h_memory);
    parallel_parts(hidden != nullptr ? blocks : 0, tokens * units, [&](std::int64_t b) {
      convert(h.data + b * h.block, hidden + b * tokens * units, tokens * units);
    });
    second_of_few(second, h, tokens, out);
  }

  // Unit u of block b of the second factor and token t at data[b * block + t * ld + u].
  template <bool kForward>
  Hidden<S> hidden_of_few(const F& first, const WideRows<S, T>& x, const Columns& from,
                          std::int64_t tokens, Scratch& memory) const {
    const std::int64_t blocks = kForward ? s.J : s.K, units = kForward ? s.S : s.Q,
                       step = block_step<S>(tokens, units);
    const Hidden<S> h{memory.get<S>(blocks * step), step, units};
    const std::int64_t most =
                           std::clamp<std::int64_t>(first.block.size / thread_count(context), 1, w),
                       per = s.R == 1 ? most : 1;
    parallel_parts(ceil_div(first.block.size, per), tokens * first.packed_size * per,
                   [&](std::int64_t part) {
                     rows_to_hidden<kForward>(first, x.data, x.stride, from, tokens, part * per,
                                              std::min(first.block.size, (part + 1) * per), h);
                   });
    return h;
  }

  void second_of_few(const F& second, const Hidden<S>& h, std::int64_t tokens,
                     const Output<S, T>& out) const {
    const std::int64_t blocks = second.block.size;
    parallel_parts(
        out.groups(blocks), tokens * second.packed_size * out.group(), [&](std::int64_t i) {
          out.compute(second, h.data, h.ld, {1, h.block, 0, 1}, 0, tokens, out.range(i, blocks));
        });
  }

  // Blocks [b0, b1) of rows of x times the factor that is applied first, a unit's neighbours being
  // those of its token.
  template <bool kForward>
  void rows_to_hidden(const F& f, const S* x, std::int64_t ldx, const Columns& from,
                      std::int64_t tokens, std::int64_t b0, std::int64_t b1,
                      const Hidden<S>& to) const {
    static thread_local Scratch weights_memory, z_memory;
    const auto ready = f.ready(b0, b1, from.step == 1 ? tokens : kFewRows + 1, weights_memory);
    const std::int64_t step = round_up(f.width.size, w), ldz = (b1 - b0) * step;
    S* const z = z_memory.get<S>(kFewRows * ldz);
    for_row_blocks(tokens, [&](std::int64_t r0, int count) {
      for (std::int64_t b = b0; b < b1; ++b)
        multiply_rows<S, T>(ready, b, {x + from.base(b) + r0 * ldx, ldx, from.step}, count,
                            static_cast<const S*>(nullptr), z + (b - b0) * step, ldz, true);
      if constexpr (std::is_same_v<T, bfloat16>)
        for (std::int64_t i = 0; i < count * ldz; i += w)
          store(z + i, round_to_bfloat16(load(z + i)));
      for (int r = 0; r < count; ++r)
        permute<S, kForward>(s, z + r * ldz, step, b0, b1, to, r0 + r);
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

  void forward(ConstMatrixView x, const void* bias, Activation activation, MatrixView y,
               void* hidden) const {
    static thread_local Scratch bias_memory;
    Output<S, T> out{y, s.L, s.interleaved_output ? s.J : 1};
    out.activation = activation;
    out.set_bias(static_cast<const T*>(bias), s.J, bias_memory);
    two_products<true>(w1(), w2(), of_x(), x, out, static_cast<T*>(hidden));
  }

  void backward(ConstMatrixView dy, ConstMatrixView x, const void* kept,
                const MonarchGradients& grads) const;
  void backward_of_few(ConstMatrixView dy, ConstMatrixView x, const MonarchGradients& grads) const;
};

}  // namespace
}  // namespace structmat
