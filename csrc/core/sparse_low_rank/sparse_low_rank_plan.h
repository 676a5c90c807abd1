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
  few,      // few tokens: lanes over entries; one launch, h beside the sparse product
  sparse,   // a warp per row, lanes over tokens; x in shared memory
  strips,   // tensor cores; strips of 16 rows have the same columns, which are gathered
  spread,   // tensor cores; strips of 16 columns have the same rows: sums are spread over these
  tiles,    // tensor cores; tiles of S are scattered into shared memory
  dense     // tensor cores; W = U V + S + base is written to memory, rounded once
};

// A random support needs one number of x from shared memory per multiply-add, where a dense product
// needs tensor cores: 30 TB/s against 990 TFLOP/s (H100, 16-bit types) break even at 3 % for many
// tokens, 20 TB/s against 312 TFLOP/s (A100) at 6 %; the sparse product reaches about half of that.
// In fp32 and fp64 a dense product has no tensor cores (15 TFLOP/s of S against 60).
constexpr double half_density = 0.02, full_density = 0.25;
// A strip of 16 rows fetches its columns for itself, 2 / 16 bytes of L2 cache per multiply-add:
// 4096 tokens of n = m = 4096 take 16 us per percent and 14 us for x^T, a dense product 139 us.
//
// The transpose of vectors (but not of blocks) has no strips. There 16 rows of a strip times an
// entry give one sum for each token, to be added where the entry's column lies: 8 bytes of shared
// memory per 16 multiply-adds, 119 TFLOP/s at best, 35 us at 3 %. With what else a step takes it is
// 71 us, 130 at 6 %, and some 25 us beside S (r = 128); written out, W takes 154 us. On an A100 130
// us and 210 against 460, so that it would pay up to 10 % and more.
constexpr double strip_density = 0.105;  // a drawn 10 % is a little more or less
constexpr double spread_density = 0.063;
constexpr std::int64_t kStrip = 16;
constexpr std::int64_t kFewTokens = 32;      // up to here the time is that of reading the weights
constexpr std::int64_t kDenseTokens = 1024;  // writing W is then a fourth of the product, n = 4096

// What a call multiplies: W (m, n) with `nnz` entries in S, one group of rows or more.
struct Product {
  std::int64_t tokens = 0, m = 0, n = 0, r = 0, nnz = 0;
  bool columns = false;        // all rows have the same
  bool row_strips = false;     // strips of kStrip rows have the same columns
  bool column_strips = false;  // strips of kStrip columns have the same rows
  bool base = false;
  DType dtype = DType::f32;

  bool half() const { return size_of(dtype) == 2; }
  std::int64_t sum_size() const { return dtype == DType::f64 ? 8 : 4; }
  Product transposed() const {
    Product out = *this;
    std::swap(out.m, out.n), std::swap(out.row_strips, out.column_strips);
    return out;
  }
};

// Which gradients are wanted.
struct Wanted {
  bool x = true, u = true, v = true, values = true, bias = true;
};

inline Way way_of(const Product& p) {
  if (p.columns && p.nnz > 0) return Way::columns;
  if (p.tokens <= kFewTokens) return Way::few;
  const double density =
      p.nnz == 0 ? 0
                 : static_cast<double>(p.nnz) / static_cast<double>(p.m) / static_cast<double>(p.n);
  // With a base the product is dense anyway.
  if (p.half() && p.row_strips && p.nnz > 0 && !p.base && density <= strip_density)
    return Way::strips;
  if (p.half() && p.column_strips && p.nnz > 0 && !p.base && p.tokens >= kDenseTokens &&
      density <= spread_density)
    return Way::spread;
  if (density < (p.half() ? half_density : full_density)) return Way::sparse;
  if (p.tokens >= kDenseTokens) return Way::dense;
  return p.half() ? Way::tiles : Way::sparse;
}

constexpr std::int64_t whole_packs(std::int64_t count) {
  return ceil_div(count, 8) * 8;
}

// Of Way::strips. The steps of strip s, 16 columns each, begin at (k before it) / 16 + s, where k
// are the columns of the strips before: none of them needs to know how the others are rounded.
struct StripSpace {
  void* turned = nullptr;   // x^T (n, stride): tokens in whole packs
  void* columns = nullptr;  // (steps, 16) of int32
  void* values = nullptr;   // (steps, 16 columns, 16 rows), as lanes hold them
  std::int64_t stride = 0, steps = 0;

  StripSpace() = default;
  StripSpace(const Product& p, cuda::Arena& arena) : stride(whole_packs(p.tokens)) {
    const std::int64_t strips = ceil_div(p.m, kStrip);
    // The last strip may have fewer rows, hence more columns than entries / 16.
    steps = p.nnz / (kStrip * kStrip) + strips + (p.m % kStrip == 0 ? 0 : ceil_div(p.n, kStrip));
    turned = arena.take<std::uint16_t>(p.n * stride);
    columns = arena.take<std::int32_t>(steps * kStrip);
    values = arena.take<std::uint16_t>(steps * kStrip * kStrip);
  }
};

// Of Way::spread. A warp has the sums of kSpreadTokens tokens and `width` columns, a piece, in
// shared memory, which a block takes whole: four warps, of two pieces, which have the same numbers
// of dy, and two groups of tokens, which have the same entries.
constexpr std::int64_t kSpreadTokens = 32, kSpreadWarps = 4, kSpreadAcross = 2;

// 448 columns at most on Hopper, 320 where a block has 163 KB, 192 where it has 99 KB, and
// no more than 16 bits tell apart: as few pairs of pieces as there can be, alike.
constexpr std::int64_t spread_width(std::int64_t columns, std::int64_t shared_bytes) {
  const std::int64_t room =
      std::min<std::int64_t>(shared_bytes / (kSpreadWarps * kSpreadTokens * 4) / 8 * 8, 504);
  const std::int64_t pairs = std::max<std::int64_t>(1, ceil_div(columns, kSpreadAcross * room));
  return whole_packs(ceil_div(std::max<std::int64_t>(1, columns), kSpreadAcross * pairs));
}

struct SpreadSpace {
  void* turned = nullptr;  // V^T (n, stride)
  void* bounds = nullptr;  // (pieces, strips): which entries of the strip lie there, from and to
  void* places = nullptr;  // (entries): where the sums of its column lie, 16 bits
  void* values = nullptr;  // (entries, 16 rows)
  std::int64_t stride = 0, strips = 0, width = 0, pieces = 0;

  SpreadSpace() = default;
  // S (m, n) has the strips. The last may have fewer rows, hence more columns than entries / 16.
  SpreadSpace(const Product& p, std::int64_t shared_bytes, cuda::Arena& arena)
      : stride(ceil_div(p.r, kStrip) * kStrip),
        strips(ceil_div(p.m, kStrip)),
        width(spread_width(p.n, shared_bytes)),
        pieces(ceil_div(p.n, width)) {
    const std::int64_t entries = p.nnz / kStrip + (p.m % kStrip == 0 ? 0 : p.n);
    turned = arena.take<std::uint16_t>(p.n * stride);
    bounds = arena.take<std::int64_t>(pieces * strips);
    places = arena.take<std::uint16_t>(entries);
    values = arena.take<std::uint16_t>(entries * kStrip);
  }
};

// Where things lie in the workspace; counted where `base` is null.
struct ForwardSpace {
  Way way;
  low_rank::DecodePhase first;  // few: h = x V^T
  void* hidden;                 // h (T, r); few: its parts (splits, T, r), of the type of sums
  void* sums;    // (T, m) of the type of sums: what other products give, unless they do so in y
  void* weight;  // W (m, n), rows of whole packs
  void *left, *right;  // [x's columns | h] and [values | U] (T or m, inner)
  StripSpace strips;
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
    if (way == Way::strips) strips = StripSpace(p, arena);
    gemm = take(true, cuda::kGemmWorkspace, 1);
    bytes = arena.used();
  }
};

inline bool strips_sampled(const Product& p) {
  return p.half() && p.row_strips && p.nnz > 0 &&
         static_cast<double>(p.nnz) <=
             strip_density * static_cast<double>(p.m) * static_cast<double>(p.n);
}

// The sum over tokens of the values' gradient is cut into as many parts as give every
// multiprocessor a tile or eight strips, of 256 tokens at least.
struct SampledSpace {
  bool strips = false;
  std::int64_t splits = 1, split_inner = 0;
  void* partial = nullptr;  // (splits, nnz)
  void* left = nullptr;     // x's columns (T, k)
  void* turned = nullptr;   // strips: x^T (n, stride), tokens in whole packs
  void* gemm = nullptr;
  std::int64_t k = 0, stride = 0;
  std::size_t bytes = 0;

  SampledSpace(const Product& p, int multiprocessors, void* base) : strips(strips_sampled(p)) {
    cuda::Arena arena(base);
    if (p.columns && p.nnz > 0) {
      k = whole_packs(p.nnz / p.m);
      left = arena.take<unsigned char>(p.tokens * k * static_cast<std::int64_t>(size_of(p.dtype)));
      gemm = arena.take<unsigned char>(cuda::kGemmWorkspace);
    } else {
      const std::int64_t tile = p.half() ? 128 : 32;
      const std::int64_t tiles =
          strips ? ceil_div(p.m, 8 * kStrip)
                 : std::max<std::int64_t>(1, ceil_div(p.m, tile) * ceil_div(p.n, tile));
      splits = std::clamp<std::int64_t>(multiprocessors / tiles, 1,
                                        std::max<std::int64_t>(1, p.tokens / 256));
      split_inner = std::max<std::int64_t>(32, ceil_div(ceil_div(p.tokens, splits), 32) * 32);
      splits = std::max<std::int64_t>(1, ceil_div(p.tokens, split_inner));
      if (splits > 1) partial = arena.take<unsigned char>(splits * p.nnz * p.sum_size());
      if (strips) stride = whole_packs(p.tokens), turned = arena.take<std::uint16_t>(p.n * stride);
    }
    bytes = arena.used();
  }
};

// Of dx = dy W the weight is W^T (n, m): `way` is that of the transposed product. Only what the
// wanted gradients need is there.
struct BackwardSpace {
  Way way;
  void* hidden;   // dh = dy U (T, r)
  void* sums;     // (T, n) of the type of sums, or none where it is that of dx
  void* weight;   // W
  void* values;   // in the order of the transposed pattern
  void* columns;  // (T, k) of the type of sums: dy times the columns of S
  StripSpace strips;
  SpreadSpace spread;
  void* bias_partial;
  void* gemm;
  void* sampled;  // a SampledSpace
  std::int64_t k;
  std::size_t bytes;

  BackwardSpace(const Product& p, const Wanted& wanted, int multiprocessors,
                std::int64_t shared_bytes, void* base)
      : way(way_of(p.transposed())) {
    cuda::Arena arena(base);
    const auto take = [&](bool needed, std::int64_t count, std::int64_t size) -> void* {
      return needed ? arena.take<unsigned char>(count * size) : nullptr;
    };
    const auto element = static_cast<std::int64_t>(size_of(p.dtype));
    k = way == Way::columns ? p.nnz / p.m : 0;
    hidden = take(wanted.x || wanted.v, p.tokens * p.r, element);
    const bool sparse = way == Way::few || way == Way::sparse;
    sums = take(wanted.x && p.half() && (way == Way::columns || (sparse && (p.base || p.r > 0))),
                p.tokens * p.n, 4);
    weight = take(wanted.x && way == Way::dense, p.m * whole_packs(p.n), element);
    values = take(wanted.x && (sparse || way == Way::tiles), p.nnz, element);
    columns = take(wanted.x && way == Way::columns, p.tokens * k, p.sum_size());
    if (wanted.x && way == Way::strips) strips = StripSpace(p.transposed(), arena);
    if (wanted.x && way == Way::spread) spread = SpreadSpace(p, shared_bytes, arena);
    bias_partial = take(
        wanted.bias, static_cast<std::int64_t>(cuda::column_sum_bytes(p.tokens, p.m, p.dtype)), 1);
    gemm = take(wanted.x || wanted.u || wanted.v, cuda::kGemmWorkspace, 1);
    const auto rest = static_cast<std::int64_t>(SampledSpace(p, multiprocessors, nullptr).bytes);
    sampled = take(wanted.values, rest, 1);
    bytes = arena.used();
  }
};

}  // namespace structmat::sparse_low_rank
