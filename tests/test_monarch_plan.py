# SPDX-License-Identifier: Apache-2.0
"""How Monarch products run on a GPU: pure functions of sizes and of facts about the device."""

from collections.abc import Callable

PLAN = r"""
#include "monarch/monarch_maps_cuda.h"
#include "monarch/monarch_plan.h"
#include <cassert>
#include <vector>
using namespace structmat;
using namespace structmat::monarch;
using structmat::cuda::Axis;

const DeviceFacts h100{132, 227 * 1024}, small{84, 99 * 1024};
const std::int64_t big = std::int64_t{1} << 33;

MonarchWeights weights(std::int64_t K, std::int64_t J, std::int64_t R, std::int64_t I,
                       std::int64_t L, bool interleaved_output = false) {
  MonarchWeights w;
  w.w1 = {nullptr, DType::bf16, {K, J, R, I}, {J * R * I, R * I, I, 1}};
  w.w2 = {nullptr, DType::bf16, {J, L, K, R}, {L * K * R, K * R, R, 1}};
  w.interleaved_output = interleaved_output;
  return w;
}
MonarchWeights interleaved(std::int64_t K, std::int64_t Q, std::int64_t I, std::int64_t J,
                           std::int64_t L, std::int64_t S) {
  MonarchWeights w;
  w.w1 = {nullptr, DType::bf16, {K, 1, Q, I}, {Q * I, Q * I, I, 1}};
  w.w2 = {nullptr, DType::bf16, {J, L, 1, S}, {L * S, S, S, 1}};
  w.interleaved_hidden = true;
  return w;
}
ForwardPlan plan(MonarchWeights w, std::int64_t tokens, const DeviceFacts& device,
                 DType dtype = DType::bf16, bool hidden = false) {
  w.w1.dtype = w.w2.dtype = dtype;
  const ForwardPlan p = forward_plan(w, tokens, hidden, device);
  if (p.fused) {
    assert(p.hidden_bytes == 0 && p.tile.shared_bytes <= device.shared_bytes);
    assert(p.tile.blocks > 0 && p.tile.pitch % 64 == 8 && p.tile.units % 8 == 0);
  }
  return p;
}

void choices() {
  const MonarchWeights n1024 = weights(16, 16, 4, 64, 64), n4096 = weights(64, 64, 1, 64, 64),
                       wide = weights(16, 16, 16, 256, 256), four = weights(4, 4, 64, 256, 256);
  // Small factors: one launch, as many tokens at once as fit; some of the output blocks where
  // memory or tokens are few.
  assert(plan(n1024, 65536, h100).fused && plan(n1024, 65536, h100).tile.tokens == 96);
  assert(plan(n1024, 65536, h100).tile.blocks == 16);
  assert(plan(n1024, 65536, small).fused && plan(n1024, 65536, small).tile.blocks < 16);
  assert(plan(n1024, 4096, h100).fused && plan(n1024, 4096, h100).tile.blocks < 16);
  assert(plan(n1024, 65536, h100).workspace_bytes == 0);
  // Large ones: two, with h in the work space.
  assert(!plan(wide, 4096, h100).fused && plan(wide, 4096, h100).hidden_bytes == 4096 * 4096 * 2);
  // Never in fp32, nor where h is kept.
  assert(!plan(n1024, 65536, h100, DType::f32).fused);
  assert(!plan(n1024, 65536, h100, DType::bf16, true).fused);
  assert(plan(n1024, 65536, h100, DType::bf16, true).workspace_bytes == 0);
  // Few tokens: one launch of a block for each output block, where that reads few weights.
  assert(plan(n4096, 1, h100).fused && plan(n4096, 1, h100).tile.blocks == 1);
  assert(plan(n4096, 32, h100).tile.tokens == 32 && plan(n4096, 16, h100).tile.tokens == 16);
  assert(!plan(four, 1, h100).fused && !plan(wide, 32, h100).fused);
  // Nothing to do, and sizes beyond 2^31.
  assert(!plan(n1024, 0, h100).fused && plan(n1024, 0, h100).workspace_bytes == 0);
  assert(!plan(weights(3, 2, 0, 5, 7), 9, h100).fused);
  assert(plan(wide, big, h100).hidden_bytes == static_cast<std::size_t>(big) * 4096 * 2);
  assert(!plan(weights(1, 1, 1 << 20, 64, 64), 4096, h100).fused);
  // One launch moves packs of weights and of y, or few tokens: what decides is known without x.
  MonarchWeights other = n1024;
  other.interleaved_output = true;
  assert(!plan(other, 4096, h100).fused && plan(other, 32, h100).fused);
  assert(plan(other, 4096, h100).workspace_bytes == 4096 * 1024 * 2);
  assert(plan(weights(1, 1, 64, 64, 64, true), 65536, h100).fused);  // of one block
  for (const MonarchWeights& odd : {weights(16, 16, 4, 63, 64), weights(15, 16, 4, 64, 63),
                                    weights(15, 17, 3, 64, 64)})
    assert(!plan(odd, 4096, h100).fused && plan(odd, 32, h100).fused);
  other = n1024, other.w2.strides[1] += 1;  // rows begin anywhere
  assert(!plan(other, 4096, h100).fused && plan(other, 32, h100).fused);
  other = n1024, other.w2.strides[2] = 1, other.w2.strides[3] = 16;  // rows are no progressions
  assert(!plan(other, 4096, h100).fused && !plan(other, 32, h100).fused);
  // J does not divide Q: two launches.
  assert(!plan(interleaved(4, 6, 8, 8, 8, 3), 4096, h100).fused);
  assert(run_of(Sizes(interleaved(4, 6, 8, 3, 8, 8))) == 2);
}

void sums() {
  const BackwardPlan p = backward_plan(Sizes(weights(64, 64, 1, 64, 64)), 65536, DType::bf16, h100);
  assert(p.w1.split.count > 1 && p.w1.split.inner % 32 == 0);
  assert(p.w1.split.count * p.w1.split.inner >= 65536);
  assert((p.w1.split.count - 1) * p.w1.split.inner < 65536);
  assert(p.partial_bytes >= static_cast<std::size_t>(p.w1.split.count) * 4096 * 64 * 4);
  for (const std::int64_t inner : {std::int64_t{0}, std::int64_t{1}, std::int64_t{511},
                                   std::int64_t{512}, std::int64_t{100003}, big})
    for (const std::int64_t batches : {1, 7, 1000}) {
      const cuda::Split s = cuda::split_sum(batches, 65, 3, inner, 132);
      assert(s.count >= 1 && s.inner % 32 == 0 && s.count * s.inner >= inner);
      assert(s.count == 1 || (s.count - 1) * s.inner < inner);
      assert(inner >= 512 || s.count == 1);
    }
}

// Every element of an operand has its own address, where it is written.
void one_to_one(const cuda::StridedProduct& p) {
  std::vector<char> seen(static_cast<std::size_t>(p.batches * p.rows * p.cols));
  for (std::int64_t b = 0; b < p.batches; ++b)
    for (std::int64_t r = 0; r < p.rows; ++r)
      for (std::int64_t c = 0; c < p.cols; ++c) {
        const std::int64_t at = p.c.batch.at(0, b) + p.c.row.at(b, r) + p.c.col.at(b, c);
        assert(at >= 0 && at < static_cast<std::int64_t>(seen.size()) && seen[at]++ == 0);
      }
}
// B, a weight of `count` numbers, is read to the last one and no further.
void every_number(const cuda::StridedProduct& p, std::int64_t count) {
  std::vector<char> seen(static_cast<std::size_t>(count));
  for (std::int64_t b = 0; b < p.batches; ++b)
    for (std::int64_t c = 0; c < p.cols; ++c)
      for (std::int64_t i = 0; i < p.inner; ++i) {
        const std::int64_t at = p.b.batch.at(0, b) + p.b.row.at(b, c) + p.b.col.at(b, i);
        assert(at >= 0 && at < count && seen[at]++ == 0);
      }
  assert(p.batches * p.cols * p.inner == count);
}
void maps() {
  for (const MonarchWeights& w : {weights(3, 2, 4, 5, 7), weights(3, 2, 4, 5, 7, true),
                                  interleaved(4, 6, 5, 3, 7, 8), interleaved(4, 6, 5, 8, 7, 3),
                                  interleaved(4, 3, 2, 2, 2, 6), interleaved(6, 2, 5, 4, 3, 3)}) {
    const Sizes s(w);
    const std::int64_t T = 3;
    const Maps m(w, T, DType::bf16);
    const ConstMatrixView x(nullptr, DType::bf16, T, s.n(), s.n()),
        dy(nullptr, DType::bf16, T, s.m(), s.m());
    const cuda::StridedProduct h = m.hidden(x, nullptr);
    one_to_one(h);
    one_to_one(m.output(nullptr, {nullptr, DType::bf16, T, s.m(), s.m()}));
    one_to_one(m.hidden_gradient(dy, nullptr));
    one_to_one(m.input_gradient(nullptr, {nullptr, DType::bf16, T, s.n(), s.n()}));
    // Of W1 (K, Q, I) and W2 (J, L, S), which lie in one piece.
    every_number(h, s.K * s.Q * s.I);
    every_number(m.output(nullptr, {nullptr, DType::bf16, T, s.m(), s.m()}), s.m() * s.S);
    every_number(m.hidden_gradient(dy, nullptr), s.m() * s.S);
    one_to_one(m.w1_gradient(nullptr, x, nullptr));
    one_to_one(m.w2_gradient(dy, nullptr, nullptr));
    if (s.interleaved_hidden)
      for (std::int64_t k = 0; k < s.K; ++k)
        for (std::int64_t q = 0; q < s.Q && s.Q % s.J != 0; ++q) {
          const auto [j, u] = s.place(k, q);
          assert(h.c.batch.at(0, k) + h.c.row.at(k, 2) + h.c.col.at(k, q) == (j * T + 2) * s.S + u);
        }
  }
  // Numbers of divisions beyond 32 bits.
  const Axis wide = Axis::split(3, 100, 1);
  assert(wide.at(0, 2 * big + 1) == (2 * big + 1) / 3 * 100 + (2 * big + 1) % 3);
  assert(Axis::split(4, 4, 1).divisor == 0 && Axis::split(1, 9, 5).low == 9);
}

void packs_of_several_batches() {
  const auto of = [](std::int64_t R, std::int64_t T, std::int64_t S) {
    return cuda::interleaved_batches(
        {nullptr, Axis::linear(R), Axis::linear(S), Axis::split(R, T * S, 1)});
  };
  assert(of(1, 5, 64) == 8 && of(2, 5, 64) == 4 && of(4, 5, 64) == 2);
  assert(of(8, 5, 64) == 1 && of(3, 5, 64) == 1 && of(1, 5, 63) == 1);
}

int main() {
  choices();
  sums();
  maps();
  packs_of_several_batches();
}
"""


def test_monarch_plan(run_on_the_core: Callable[[str], None]) -> None:
    run_on_the_core(PLAN)
