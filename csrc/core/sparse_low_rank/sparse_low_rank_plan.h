// SPDX-License-Identifier: Apache-2.0
// How sparse_low_rank_linear runs on a GPU: pure functions of sizes, tested without one. The
// thresholds come from the arithmetic below; none has been tuned on a GPU.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "cuda/arena.h"
#include "cuda/column_sums.h"
#include "cuda/gemm.h"
#include "low_rank/low_rank_plan.h"
#include "structmat/matrix.h"

namespace structmat::sparse_low_rank {

enum class Way : int {
  columns,  // every row has the same columns: gathered, then dense products
  few,      // few tokens: lanes over entries; two launches, h beside the sparse product
  sparse,   // a warp per row, lanes over tokens; x in shared memory
  tiles,    // tensor cores; tiles of S are scattered into shared memory
  dense     // tensor cores; W = U V + S + base is written to memory, rounded once
};

// A random support needs one number of x from shared memory per multiply-add, where a dense product
// needs tensor cores: 30 TB/s against 990 TFLOP/s (H100, 16-bit types) break even at 3 % for many
// tokens, 20 TB/s against 312 TFLOP/s (A100) at 6 %; the sparse product reaches about half of that.
// In fp32 and fp64 a dense product has no tensor cores (15 TFLOP/s of S against 60).
constexpr double half_density = 0.02, full_density = 0.25;
constexpr std::int64_t kFewTokens = 32;      // up to here the time is that of reading the weights
constexpr std::int64_t kDenseTokens = 1024;  // writing W is then a fourth of the product, n = 4096

// What a call multiplies: W (m, n) with `nnz` entries in S, one group of rows or more.
struct Product {
  std::int64_t tokens = 0, m = 0, n = 0, r = 0, nnz = 0;
  bool columns = false;  // all rows have the same
  bool base = false;
  DType dtype = DType::f32;

  bool half() const { return size_of(dtype) == 2; }
  std::int64_t sum_size() const { return dtype == DType::f64 ? 8 : 4; }
};

inline Way way_of(const Product& p) {
  if (p.columns && p.nnz > 0) return Way::columns;
  if (p.tokens <= kFewTokens) return Way::few;
  const double density =
      p.nnz == 0 ? 0
                 : static_cast<double>(p.nnz) / static_cast<double>(p.m) / static_cast<double>(p.n);
  if (density < (p.half() ? half_density : full_density)) return Way::sparse;
  if (p.tokens >= kDenseTokens) return Way::dense;
  return p.half() ? Way::tiles : Way::sparse;
}

constexpr std::int64_t whole_packs(std::int64_t count) {
  return (count + 7) / 8 * 8;
}

// Where things lie in the workspace; counted where `base` is null.
struct ForwardSpace {
  Way way;
  low_rank::DecodePhase first;  // few: h = x V^T
  void* hidden;                 // h (T, r); few: its parts (splits, T, r), of the type of sums
  void* sums;    // (T, m) of the type of sums: what other products give, unless they do so in y
  void* weight;  // W (m, n), rows of whole packs
  void *left, *right;  // [x's columns | h] and [values | U] (T or m, inner)
  void* gemm;
  std::int64_t k, inner;  // columns of S, in whole packs: first of `right`; all columns of it
  std::size_t bytes;

  ForwardSpace(const Product& p, void* base) : way(way_of(p)) {
    cuda::Arena arena(base);
    const auto take = [&](bool wanted, std::int64_t count, std::int64_t size) -> void* {
      return wanted ? arena.take<unsigned char>(count * size) : nullptr;
    };
    const auto element = static_cast<std::int64_t>(size_of(p.dtype));
    k = way == Way::columns ? whole_packs(p.nnz / p.m) : 0;
    inner = k + p.r;
    const bool columns = way == Way::columns, few = way == Way::few;
    first = low_rank::decode_phase(p.tokens, p.r, p.n, true);
    hidden = few ? take(true, first.splits * p.tokens * p.r, p.sum_size())
                 : take(!columns, p.tokens * p.r, element);
    const bool apart = few || (p.half() && (columns || way == Way::sparse));
    sums = take(apart && (p.base || (p.r > 0 && !columns)), p.tokens * p.m, p.sum_size());
    weight = take(way == Way::dense, p.m * whole_packs(p.n), element);
    left = take(columns, p.tokens * inner, element);
    right = take(columns, p.m * inner, element);
    gemm = take(true, cuda::kGemmWorkspace, 1);
    bytes = arena.used();
  }
};

// The sum over tokens of the values' gradient is cut into as many parts as give every
// multiprocessor a tile, of 256 tokens at least.
struct SampledSpace {
  std::int64_t splits = 1, split_inner = 0;
  void* partial = nullptr;  // (splits, nnz)
  void* left = nullptr;     // x's columns (T, k)
  void* gemm = nullptr;
  std::int64_t k = 0;
  std::size_t bytes = 0;

  SampledSpace(const Product& p, int multiprocessors, void* base) {
    cuda::Arena arena(base);
    if (p.columns && p.nnz > 0) {
      k = whole_packs(p.nnz / p.m);
      left = arena.take<unsigned char>(p.tokens * k * static_cast<std::int64_t>(size_of(p.dtype)));
      gemm = arena.take<unsigned char>(cuda::kGemmWorkspace);
    } else {
      const std::int64_t tile = p.half() ? 128 : 32;
      const std::int64_t tiles =
          std::max<std::int64_t>(1, (p.m + tile - 1) / tile * ((p.n + tile - 1) / tile));
      splits = std::clamp<std::int64_t>(multiprocessors / tiles, 1,
                                        std::max<std::int64_t>(1, p.tokens / 256));
      split_inner = std::max<std::int64_t>(32, ((p.tokens + splits - 1) / splits + 31) / 32 * 32);
      splits = std::max<std::int64_t>(1, (p.tokens + split_inner - 1) / split_inner);
      if (splits > 1) partial = arena.take<unsigned char>(splits * p.nnz * p.sum_size());
    }
    bytes = arena.used();
  }
};

// Of dx = dy W the weight is W^T (n, m): `way` is that of the transposed product.
struct BackwardSpace {
  Way way;
  void* hidden;   // dh = dy U (T, r)
  void* sums;     // (T, n) of the type of sums, or none where it is that of dx
  void* weight;   // W
  void* values;   // in the order of the transposed pattern
  void* columns;  // (T, k) of the type of sums: dy times the columns of S
  void* bias_partial;
  void* gemm;
  void* sampled;  // a SampledSpace
  std::int64_t k;
  std::size_t bytes;

  BackwardSpace(const Product& p, int multiprocessors, void* base) {
    Product transposed = p;
    std::swap(transposed.m, transposed.n);
    way = way_of(transposed);
    cuda::Arena arena(base);
    const auto take = [&](bool wanted, std::int64_t count, std::int64_t size) -> void* {
      return wanted ? arena.take<unsigned char>(count * size) : nullptr;
    };
    const auto element = static_cast<std::int64_t>(size_of(p.dtype));
    k = way == Way::columns ? p.nnz / p.m : 0;
    hidden = take(true, p.tokens * p.r, element);
    const bool sparse = way == Way::few || way == Way::sparse;
    sums = take(p.half() && (way == Way::columns || (sparse && (p.base || p.r > 0))),
                p.tokens * p.n, 4);
    weight = take(way == Way::dense, p.m * whole_packs(p.n), element);
    values = take(sparse || way == Way::tiles, p.nnz, element);
    columns = take(way == Way::columns, p.tokens * k, p.sum_size());
    bias_partial = arena.take<unsigned char>(
        static_cast<std::int64_t>(cuda::column_sum_bytes(p.tokens, p.m, p.dtype)));
    gemm = take(true, cuda::kGemmWorkspace, 1);
    const auto rest = static_cast<std::int64_t>(SampledSpace(p, multiprocessors, nullptr).bytes);
    sampled = arena.take<unsigned char>(rest);
    bytes = arena.used();
  }
};

}  // namespace structmat::sparse_low_rank
