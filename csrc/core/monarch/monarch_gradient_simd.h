// SPDX-License-Identifier: Apache-2.0
// All gradients of a Monarch product: h and its gradient of a chunk of tokens, then the sums over
// them. For files under structmat_simd_sources (everything is in an anonymous namespace).
#pragma once
#include "monarch/monarch_products_simd.h"
#include "product_simd.h"

namespace structmat {
namespace {

// Tokens of which h and dh are held at a time for the gradients of the weights: those of a thread
// stay in its level-2 cache, but the sums of the weights are read and written once for as many
// tokens as a block has columns, if these are no more than 16 MB. 0.92 of the time of all that the
// last cache holds.
inline std::int64_t gradient_chunk(const Sizes& s, std::int64_t threads) {
  const std::int64_t hidden = std::max<std::int64_t>(s.hidden(), 1),
                     per_thread = std::max<std::int64_t>((80 << 10) / hidden, 32),
                     per_sum = std::min(std::max(s.I, s.L), (std::int64_t{2} << 20) / hidden);
  return round_up(std::max(threads * per_thread, per_sum), kGradientTokens);
}

// So few tokens that they are rows: the gradients of the weights are outer products, written as
// they lie.
template <class T, bool kPairs>
void Monarch<T, kPairs>::backward_of_few(ConstMatrixView dy, ConstMatrixView x,
                                         const MonarchGradients& grads) const {
  static thread_local Scratch dy_memory, x_memory, g_memory, h_memory;
  const std::int64_t tokens = dy.rows;
  const bool want_x = grads.x.data != nullptr,
             reads_x = grads.w1 != nullptr || grads.w2 != nullptr;  // else it may have no data
  const WideRows<S, T> left(dy, 0, tokens, dy_memory),
      right(reads_x ? x : ConstMatrixView(), 0, reads_x ? tokens : 0, x_memory);
  if (want_x || grads.w1 != nullptr) {
    const Hidden<S> g = hidden_of_few<false>(t2(), left, of_dy(), tokens, g_memory);
    if (want_x) second_of_few(t1(), g, tokens, {grads.x, s.I, 1});
    parallel_parts(grads.w1 != nullptr ? s.K : 0, tokens * s.Q * s.I, [&](std::int64_t k) {
      outer_range(tokens, s.I, g.data + k * g.block, g.ld, right.data + of_x().base(k),
                  right.stride, static_cast<T*>(grads.w1) + k * s.Q * s.I, s.I, 0, s.Q);
    });
  }
  if (grads.w2 != nullptr) {
    const Hidden<S> h = hidden_of_few<true>(w1(), right, of_x(), tokens, h_memory);
    parallel_parts(s.J, tokens * s.L * s.S, [&](std::int64_t j) {
      outer_range(tokens, s.S, left.data + of_dy().base(j), left.stride, h.data + j * h.block, h.ld,
                  static_cast<T*>(grads.w2) + j * s.L * s.S, s.S, 0, s.L);
    });
  }
  if (grads.bias.data != nullptr) column_sums<S>(context, dy, static_cast<T*>(grads.bias.data));
}

template <class T, bool kPairs>
void Monarch<T, kPairs>::backward(ConstMatrixView dy, ConstMatrixView x, const void* kept,
                                  const MonarchGradients& grads) const {
  const T* const hidden = static_cast<const T*>(kept);
  static thread_local Scratch t1_memory, t2_memory, w1_memory, h_memory, g_memory, total1_memory,
      total2_memory, bias_memory, wide_memory;
  const bool want_w1 = grads.w1 != nullptr, want_w2 = grads.w2 != nullptr,
             want_x = grads.x.data != nullptr, want_bias = grads.bias.data != nullptr;
  Output<S, T> out{grads.x, s.I, 1};
  if (want_x && !want_w1 && !want_w2 && !want_bias)
    return two_products<false>(t2(), t1(), of_dy(), dy, out, nullptr);
  if (dy.rows <= kFewRows && hidden == nullptr && of_dy().step == 1 && t2().reads_few(1) &&
      t1().reads_few(1) && w1().reads_few(1))
    return backward_of_few(dy, x, grads);

  const bool want_g = want_x || want_w1, make_h = want_w2 && hidden == nullptr;
  L a1 = lanes_of(t1()), a2 = lanes_of(t2()), b1 = lanes_of(w1());
  const std::int64_t tokens = dy.rows, threads = thread_count(context),
                     chunk = std::clamp<std::int64_t>(tokens, 1, gradient_chunk(s, threads)),
                     s_rows = round_up(s.S, w), ld = (ceil_div(chunk, w) | 1) * w;
  const std::int64_t g_step = block_step<S>(ld, s.Q), h_step = block_step<S>(ld, s.S);
  if (want_x) a1.prepare(context, tokens, t1_memory);
  if (want_g) a2.prepare(context, tokens, t2_memory);
  if (make_h) b1.prepare(context, tokens, w1_memory);
  const Hidden<S> g{want_g ? g_memory.get<S>(s.K * g_step) : nullptr, g_step, ld};
  const Hidden<S> h{make_h ? h_memory.get<S>(s.J * h_step) : nullptr, h_step, ld};
  WeightGradients<S, T, kPairs> d1{x, of_x(), s.I, s.Q, s.Q, nullptr},
      d2{dy, of_dy(), s.L, s.S, s_rows, nullptr};
  if (want_w1) d1.totals = total1_memory.get<S>(s.K * s.Q * d1.ld());
  if (want_w2) d2.totals = total2_memory.get<S>(s.J * s_rows * d2.ld());
  if (want_bias) d2.sums = bias_memory.get<S>(s.J * d2.ld());
  const std::int64_t group1 = d1.group(s.K, threads), group2 = d2.group(s.J, threads),
                     tasks1 = want_w1 ? ceil_div(s.K, group1) : 0,
                     tasks2 = want_w2 || want_bias ? ceil_div(s.J, group2) : 0,
                     per = read_together(of_dy());
  const auto store_w1 = [&](std::int64_t k0, std::int64_t k1) {
    for (std::int64_t q = k0 * s.Q; q < k1 * s.Q; ++q)
      convert(d1.totals + q * d1.ld(), static_cast<T*>(grads.w1) + q * s.I, s.I);
  };
  const auto store_w2 = [&](std::int64_t j0, std::int64_t j1) {  // and the bias
    for (std::int64_t j = j0; j < j1; ++j) {
      for (std::int64_t l = 0; want_bias && l < s.L; ++l)
        convert(d2.sums + j * d2.ld() + l, static_cast<T*>(grads.bias.data) + s.column(j, l), 1);
      if (want_w2)
        store_transposed(d2.totals + j * s_rows * d2.ld(), d2.ld(), s.S, s.L,
                         static_cast<T*>(grads.w2) + j * s.L * s.S, s.S);
    }
  };

  for (std::int64_t c0 = 0; c0 < tokens || c0 == 0; c0 += chunk) {
    const std::int64_t c1 = std::min(c0 + chunk, tokens), rows = c1 - c0, work = rows * s.Q * s.I;
    run(rows,
        Phase{want_g ? ceil_div(s.J, per) : 0, rows * s.S * s.L * per,
              [&](std::int64_t t0, std::int64_t t1, std::int64_t i) {
                first_product<false>(a2, dy, of_dy(), c0 + t0, c0 + t1, i * per,
                                     std::min(s.J, (i + 1) * per), g, t0);
              }},
        Phase{make_h ? s.K : 0, work,
              [&](std::int64_t t0, std::int64_t t1, std::int64_t k) {
                first_product<true>(b1, x, of_x(), c0 + t0, c0 + t1, k, k + 1, h, t0);
              }},
        Phase{want_x ? out.groups(s.K) : 0, work,
              [&](std::int64_t t0, std::int64_t t1, std::int64_t i) {
                second_product(a1, g, t0, c0 + t0, c0 + t1, out, out.range(i, s.K));
              }});
    parallel_for(context, tasks1 + tasks2, [&](std::int64_t task) {
      if (task < tasks1) {
        const std::int64_t k0 = task * group1, k1 = std::min(s.K, k0 + group1);
        d1.add(c0, c1, k0, k1, true, [&](std::int64_t k, std::int64_t t, std::int64_t) {
          return Rows<S>{g.data + k * g.block + t, g.ld, 1};
        });
        if (c1 == tokens) store_w1(k0, k1);
        return;
      }
      const std::int64_t j0 = (task - tasks1) * group2, j1 = std::min(s.J, j0 + group2);
      const bool in_place = make_h || std::is_same_v<S, T>;
      d2.add(c0, c1, j0, j1, in_place, [&](std::int64_t j, std::int64_t t, std::int64_t count) {
        if (make_h) return Rows<S>{h.data + j * h.block + t, h.ld, 1};
        const T* const given = hidden + (j * tokens + c0 + t) * s.S;
        if constexpr (std::is_same_v<S, T>) {
          return Rows<S>{given, 1, s.S};
        } else {
          S* const wide = wide_memory.get<S>(count * s.S);
          convert(given, wide, count * s.S);
          return Rows<S>{wide, 1, s.S};
        }
      });
      if (c1 == tokens) store_w2(j0, j1);
    });
  }
}

}  // namespace
}  // namespace structmat
