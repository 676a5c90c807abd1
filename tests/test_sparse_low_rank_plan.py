# SPDX-License-Identifier: Apache-2.0
"""How sparse-plus-low-rank products run on a GPU: pure functions of sizes."""

from collections.abc import Callable

PLAN = r"""
#include "sparse_low_rank/sparse_low_rank_plan.h"
#include <cassert>
using namespace structmat;
using namespace structmat::sparse_low_rank;

const std::int64_t big = std::int64_t{1} << 33, gemm = cuda::kGemmWorkspace,
                   hopper = 227 * 1024;

Product product(std::int64_t tokens, double density, DType dtype = DType::bf16,
                std::int64_t m = 4096, std::int64_t n = 4096) {
  Product p;
  p.tokens = tokens, p.m = m, p.n = n, p.r = 128, p.dtype = dtype;
  p.nnz = static_cast<std::int64_t>(density * static_cast<double>(m * n));
  return p;
}
Product columns(std::int64_t tokens, std::int64_t k, DType dtype = DType::bf16) {
  Product p = product(tokens, 0, dtype);
  p.nnz = p.m * k, p.columns = true;
  return p;
}

void choices() {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    for (const std::int64_t tokens : {0, 1, 32}) {
      assert(way_of(product(tokens, 0.03, dtype)) == Way::few);
      assert(way_of(columns(tokens, 123, dtype)) == Way::columns);
    }
  // 16-bit types: tensor cores from 2 % on; written out for many tokens.
  assert(way_of(product(33, 0.03)) == Way::tiles && way_of(product(1023, 0.03)) == Way::tiles);
  assert(way_of(product(1024, 0.03)) == Way::dense && way_of(product(big, 0.03)) == Way::dense);
  assert(way_of(product(33, 0.01)) == Way::sparse && way_of(product(big, 0.01)) == Way::sparse);
  // Strips, but where they are dense or the product is dense anyway.
  Product p = product(33, 0.03);
  p.row_strips = true;
  assert(way_of(p) == Way::strips && p.transposed().column_strips);
  assert(way_of(p.transposed()) == Way::tiles);
  p.tokens = 4096;
  // Their transposes spread sums where W would be written.
  assert(way_of(p) == Way::strips && way_of(p.transposed()) == Way::spread);
  p.tokens = 1024;
  assert(way_of(p.transposed()) == Way::spread);
  p.tokens = 1023;
  assert(way_of(p.transposed()) == Way::tiles);
  p = product(4096, 0.01), p.row_strips = true;
  assert(way_of(p.transposed()) == Way::spread);
  p.nnz = 0;
  assert(way_of(p.transposed()) == Way::sparse);
  p = product(4096, 0.07), p.row_strips = true;
  assert(way_of(p) == Way::strips && way_of(p.transposed()) == Way::dense);
  p = product(4096, 0.03, DType::f32), p.row_strips = true;
  assert(way_of(p.transposed()) == Way::sparse);
  p = product(4096, 0.03), p.row_strips = true;
  p.column_strips = true;
  assert(way_of(p.transposed()) == Way::strips);
  p.base = true;
  assert(way_of(p) == Way::dense);
  p.column_strips = false;
  assert(way_of(p.transposed()) == Way::dense);
  p = product(4096, 0.2), p.row_strips = true;
  assert(way_of(p) == Way::dense && way_of(p.transposed()) == Way::dense);
  p = product(64, 0.03, DType::f32), p.row_strips = true;
  assert(way_of(p) == Way::sparse);
  // No tensor cores: sparse up to a fourth.
  for (const DType dtype : {DType::f32, DType::f64}) {
    assert(way_of(product(128, 0.5, dtype)) == Way::sparse);
    assert(way_of(product(4096, 0.1, dtype)) == Way::sparse);
    assert(way_of(product(4096, 0.5, dtype)) == Way::dense);
  }
  // Nothing in S, or nothing at all.
  assert(way_of(product(4096, 0)) == Way::sparse && way_of(columns(4096, 0)) == Way::sparse);
  assert(way_of(product(64, 1, DType::bf16, 0, 5)) == Way::sparse);
}

void spaces() {
  // W is written only for many tokens, once, in whole packs.
  Product p = product(4096, 0.03);
  p.n = 4095, p.nnz -= 1;
  const auto weight = static_cast<std::size_t>(4096 * 4096 * 2);
  const auto rest = static_cast<std::size_t>(4096 * 128 * 2 + gemm);
  assert(ForwardSpace(p, nullptr).bytes == weight + rest);
  p.tokens = 512;
  assert(ForwardSpace(p, nullptr).bytes == 512 * 128 * 2 + gemm);
  // Few tokens: parts of h, and the sums of y.
  p = product(1, 0.03);
  const ForwardSpace few(p, nullptr);
  assert(few.first.splits == 4 && few.bytes == 4 * 128 * 4 + 4096 * 4 + gemm);
  p.r = 0;
  assert(ForwardSpace(p, nullptr).bytes == static_cast<std::size_t>(gemm));
  // fp32 sums of other products lie in y.
  assert(ForwardSpace(product(512, 0.03, DType::f32), nullptr).sums == nullptr);
  // Pieces follow one another, aligned.
  char* const at = reinterpret_cast<char*>(std::intptr_t{1} << 20);
  const ForwardSpace joined(columns(4096, 123), at);
  assert(joined.k == 128 && joined.inner == 256 && joined.left == at);
  assert(static_cast<char*>(joined.right) == at + 4096 * 256 * 2);
  // The gradient of x is a product with the transpose; its values are put in order.
  const Wanted all;
  const BackwardSpace back(product(512, 0.03, DType::bf16, 64, 4096), all, 132, hopper, at);
  assert(back.way == Way::tiles && back.values != nullptr && back.weight == nullptr);
  const BackwardSpace written(product(4096, 0.03), all, 132, hopper, at);
  assert(written.way == Way::dense && written.values == nullptr && written.weight != nullptr);
  const BackwardSpace few_back(product(8, 0.03), all, 132, hopper, at);
  assert(few_back.way == Way::few && few_back.values != nullptr && few_back.sums != nullptr);
  // Only what is wanted.
  const Wanted x{true, false, false, false, false}, bias{false, false, false, false, true};
  assert(BackwardSpace(product(512, 0.03), x, 132, hopper, nullptr).bytes ==
         512 * 128 * 2 + static_cast<std::size_t>(gemm) +
             low_rank::aligned(static_cast<std::size_t>(product(512, 0.03).nnz) * 2));
  assert(BackwardSpace(product(512, 0.03), bias, 132, hopper, nullptr).bytes ==
         low_rank::aligned(cuda::column_sum_bytes(512, 4096, DType::bf16)));
  // Strips: x^T, places and values by steps of 16 columns.
  Product strips = product(509, 0, DType::bf16, 4096, 4000);
  strips.nnz = 4096 * 117, strips.r = 0, strips.row_strips = true;
  const std::size_t steps = 4096 * 117 / 256 + 256;
  assert(ForwardSpace(strips, nullptr).bytes == 4000 * 512 * 2 + steps * (64 + 512) + gemm);
}

// What a block of spread sums has: pairs of pieces that cover the columns, alike, in whole packs.
void pieces() {
  static_assert(kDenseTokens >= kSpreadTokens);  // there are whole groups of tokens
  for (const std::int64_t shared : {std::int64_t{99} * 1024, std::int64_t{163} * 1024, hopper, big})
    for (const std::int64_t n : {1, 7, 16, 300, 896, 897, 4096, 4200, 11008, 100003}) {
      const std::int64_t width = spread_width(n, shared), count = (n + width - 1) / width;
      assert(width % 8 == 0 && width * 128 <= 65536);  // places of 16 bits
      assert(4 * width * 128 <= shared && (count % 2 == 0 || count * width - n < 2 * width));
    }
  assert(spread_width(4096, hopper) == 416 && spread_width(4096, 163 * 1024) == 296);
  Product p = product(4096, 0, DType::bf16, 4090, 4096);
  p.nnz = 4090 * 123, p.r = 100, p.row_strips = true;
  const Wanted x{true, false, false, false, false};
  const BackwardSpace back(p, x, 132, hopper, nullptr);
  assert(back.way == Way::spread && back.values == nullptr && back.weight == nullptr);
  assert(back.spread.stride == 112 && back.spread.strips == 256 && back.spread.pieces == 10);
  const std::size_t entries = 4090 * 123 / 16 + 4096;  // at most
  assert(back.bytes == 4096 * 100 * 2 + 4096 * 112 * 2 + 10 * 256 * 8 +
                           low_rank::aligned(entries * 2) + low_rank::aligned(entries * 32) + gemm);
}

void sums() {
  // Tiles enough: one part. A small matrix: parts of 256 tokens or more, none of them empty.
  assert(SampledSpace(product(65536, 0.03), 132, nullptr).bytes == 0);
  for (const std::int64_t tokens : {std::int64_t{0}, std::int64_t{1}, std::int64_t{511},
                                    std::int64_t{100003}, big}) {
    const Product p = product(tokens, 0.1, DType::bf16, 200, 300);
    const SampledSpace s(p, 132, nullptr);
    assert(s.splits >= 1 && s.split_inner % 32 == 0 && s.splits * s.split_inner >= tokens);
    assert(s.splits == 1 || (s.splits - 1) * s.split_inner < tokens);
    assert(tokens >= 512 || s.splits == 1);
    assert(tokens < 100003 || s.splits > 1);
    if (s.splits > 1) assert(s.bytes >= static_cast<std::size_t>(s.splits * p.nnz * 4));
  }
  // Strips: x^T; four parts, as 256 strips are those of 32 multiprocessors.
  Product strips = product(4090, 0, DType::bf16);
  strips.nnz = 4096 * 123, strips.row_strips = true;
  const SampledSpace s(strips, 132, nullptr);
  assert(s.strips && s.splits == 4 && s.split_inner == 1024 && s.stride == 4096);
  assert(s.bytes == 4 * 4096 * 123 * 4 + 4096 * 4096 * 2);
  strips.dtype = DType::f32;
  assert(!SampledSpace(strips, 132, nullptr).strips);
  strips.dtype = DType::bf16, strips.nnz = 4096 * 500;
  assert(!SampledSpace(strips, 132, nullptr).strips);
  const SampledSpace gathered(columns(4096, 123), 132, nullptr);
  assert(gathered.k == 128 && gathered.bytes == 4096 * 128 * 2 + gemm);
}

int main() {
  choices();
  spaces();
  pieces();
  sums();
}
"""


def test_sparse_low_rank_plan(run_on_the_core: Callable[[str], None]) -> None:
    run_on_the_core(PLAN)
