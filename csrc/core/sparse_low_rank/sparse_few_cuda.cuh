// SPDX-License-Identifier: Apache-2.0
// The product of few tokens: a warp per row of S or a few, its lanes over the entries, x in shared
// memory. With low rank one launch does it all: its blocks are on the device together, compute
// parts of h = x V^T first, their rows of S while the other parts come, and then h U^T.
#pragma once
#include <algorithm>

#include "cuda/grid_barrier.h"
#include "low_rank/low_rank_decode_cuda.cuh"
#include "sparse_low_rank/sparse_product_cuda.cuh"

namespace structmat::sparse_low_rank {

struct FewArgs {
  SparseProduct sparse;
  std::int64_t sparse_rows = 0, sparse_blocks = 0;  // blocks of rows; times those of tokens
  bool keep_sums = false;                           // y is of the type of sums
  // h = x V^T in parts, and y = h U^T + sums + bias.
  low_rank::DecodeArgs hidden{}, up{};
  std::int64_t hidden_rows = 0, hidden_splits = 0, hidden_blocks = 0;
};

template <class T, int kTokens>
struct FewTile {
  static constexpr int kBytes = kTokens * static_cast<int>(sizeof(T));
  static constexpr int kColumns =
      kBytes * sparse_slab_columns <= 65536 ? sparse_slab_columns : 65536 / kBytes;
  struct alignas(kBytes < 16 ? kBytes : 16) Word {
    T value[kTokens];
  };
  Word x[kColumns];
  unsigned bad[low_rank::kWarps];  // bit t: a number of token t is not finite
};

// The sums of `value` over the lanes: that of value[lane / (32 / kTokens)] in each lane.
template <int kTokens, class Sum>
__device__ Sum sum_over_lanes(Sum (&value)[kTokens], int lane) {
  SM_UNROLL
  for (int step = 16, left = kTokens; step > 0; step /= 2) {
    if (left > 1) {  // half of them to the other lane
      left /= 2;
      SM_UNROLL
      for (int i = 0; i < kTokens / 2; ++i) {
        if (i >= left) continue;
        const bool upper = (lane & step) != 0;
        const Sum give = upper ? value[i] : value[i + left];
        const Sum keep = upper ? value[i + left] : value[i];
        value[i] = keep + __shfl_xor_sync(~0u, give, step);
      }
    } else {
      value[0] += __shfl_xor_sync(~0u, value[0], step);
    }
  }
  return value[0];
}

// `loaded`: x is there, all of it, from the call before.
template <class T, int kTokens, int kRows>
__device__ void few_rows(const FewArgs& args, FewTile<T, kTokens>& shared, std::int64_t row_block,
                         std::int64_t token_block, bool loaded) {
  using Shared = FewTile<T, kTokens>;
  using Sum = accumulator_t<T>;
  using Word = typename Shared::Word;
  constexpr int kColumns = Shared::kColumns, kWarps = low_rank::kWarps, kThreads = kWarps * 32;
  const SparseProduct& p = args.sparse;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const std::int64_t rows = p.pattern.rows, cols = p.pattern.cols, tokens = p.x.rows;
  const std::int64_t row0 = (row_block * kWarps + warp) * kRows, token0 = token_block * kTokens;
  const auto* const columns = p.pattern.columns;
  const T* const values = static_cast<const T*>(p.values);
  const T* const x = static_cast<const T*>(p.x.data) + token0 * p.x.row_stride;

  int next[kRows] = {}, end[kRows] = {}, shift[kRows] = {};
  Sum total[kRows] = {};
  unsigned bad = 0;
  SM_ROLLED
  for (std::int64_t chunk = 0; chunk < cols; chunk += kColumns) {
    if (chunk % sparse_slab_columns == 0) {
      SM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (row0 + r >= rows) continue;
        const RowOfPattern row(p.pattern, row0 + r);
        const std::int64_t* const slab =
            p.pattern.starts + row.starts + chunk / sparse_slab_columns;
        next[r] = static_cast<int>(slab[0]), end[r] = static_cast<int>(slab[1]);
        shift[r] = row.shift;
      }
    }
    const int begin = static_cast<int>(chunk % sparse_slab_columns);
    const int width = static_cast<int>(cols - chunk < kColumns ? cols - chunk : kColumns);
    __syncthreads();
    SM_ROLLED
    for (int c = loaded ? width : thread; c < width; c += kThreads) {
      Word word;
      SM_UNROLL
      for (int t = 0; t < kTokens; ++t)
        word.value[t] = token0 + t < tokens ? x[t * p.x.row_stride + chunk + c] : T{};
      SM_UNROLL
      for (int t = 0; t < kTokens; ++t)
        if (!finite(to_float(word.value[t]))) bad |= 1u << t;
      shared.x[c] = word;
    }
    __syncthreads();
    SM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      int last = end[r];
      if (kColumns < sparse_slab_columns)
        last = first_entry_from(columns, next[r], last, begin + kColumns);
      Sum sum[kTokens] = {};
      for (int entry = next[r] + lane; entry < last; entry += 32) {
        const Sum value = to_float(values[entry + shift[r]]);
        const Word word = shared.x[static_cast<int>(columns[entry]) - begin];
        SM_UNROLL
        for (int t = 0; t < kTokens; ++t) sum[t] += value * to_float(word.value[t]);
      }
      next[r] = last;
      total[r] += sum_over_lanes<kTokens>(sum, lane);
    }
  }
  if (!loaded) {
    unsigned of_warp = 0;
    SM_UNROLL
    for (int t = 0; t < kTokens; ++t)
      if (__any_sync(~0u, static_cast<int>(bad >> t & 1u)) != 0) of_warp |= 1u << t;
    if (lane == 0) shared.bad[warp] = of_warp;
    __syncthreads();
  }
  SM_UNROLL
  for (int w = 0; w < kWarps; ++w) bad |= shared.bad[w];

  constexpr int kLanes = 32 / kTokens;  // that hold the same sum
  const std::int64_t token = token0 + lane / kLanes;
  if (lane % kLanes != 0 || token >= tokens) return;
  SM_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const std::int64_t row = row0 + r;
    if (row >= rows) continue;
    Sum sum = total[r];
    if (p.sums != nullptr) sum += static_cast<const Sum*>(p.sums)[token * p.sums_stride + row];
    if ((bad >> (lane / kLanes) & 1u) != 0) sum = not_a_number<Sum>();
    if (args.keep_sums) {
      static_cast<Sum*>(p.y.data)[token * p.y.row_stride + row] = sum;
    } else {
      if (p.bias != nullptr) sum += to_float(static_cast<const T*>(p.bias)[row]);
      static_cast<T*>(p.y.data)[token * p.y.row_stride + row] = cuda::rounded<T>(sum);
    }
  }
}

template <class T, int kTokens, int kRows>
__global__ void __launch_bounds__(low_rank::kWarps * 32, 2) few_tokens_kernel(FewArgs args) {
  using Shared = FewTile<T, kTokens>;
  SM_DYNAMIC_SHARED(Shared, shared);
  few_rows<T, kTokens, kRows>(args, *shared, blockIdx.x % args.sparse_rows,
                              blockIdx.x / args.sparse_rows, false);
}

// All blocks are on the device together; two on a multiprocessor, but that float64 would spill.
template <class T, int kTokens, int kRows>
__global__ void __launch_bounds__(low_rank::kWarps * 32, sizeof(T) == 8 && kTokens == 8 ? 1 : 2)
    few_low_rank_kernel(FewArgs args) {
  using Sum = accumulator_t<T>;
  using Shared = FewTile<T, kTokens>;
  SM_DYNAMIC_SHARED(unsigned char, shared);
  Sum* const staged = reinterpret_cast<Sum*>(shared);
  const std::int64_t blocks = gridDim.x, rows = args.hidden_rows, splits = args.hidden_splits;
  SM_ROLLED
  for (std::int64_t i = blockIdx.x; i < args.hidden_blocks; i += blocks)
    low_rank::decode_rows<T, kTokens, kRows, true>(args.hidden, staged, i % rows, i / rows % splits,
                                                   i / rows / splits);
  cuda::GridBarrier barrier;
  barrier.arrive();
  // The first rows of S are for blocks that had fewer parts of h.
  const std::int64_t first = (blockIdx.x + blocks - args.hidden_blocks % blocks) % blocks;
  const bool whole = args.sparse.pattern.cols <= Shared::kColumns;
  std::int64_t loaded = -1;  // tokens
  SM_ROLLED
  for (std::int64_t i = first; i < args.sparse_blocks; i += blocks) {
    const std::int64_t tokens = i / args.sparse_rows;
    few_rows<T, kTokens, kRows>(args, *reinterpret_cast<Shared*>(shared), i % args.sparse_rows,
                                tokens, whole && loaded == tokens);
    loaded = tokens;
  }
  barrier.wait();
  SM_ROLLED
  for (std::int64_t i = first; i < args.sparse_blocks; i += blocks)
    low_rank::decode_rows<T, kTokens, kRows, false>(args.up, staged, i % args.sparse_rows, 0,
                                                    i / args.sparse_rows);
}

// Low rank beside S: V, U, and where sums (T, m) and parts of h lie.
struct FewLowRank {
  ConstMatrixView v, u;
  low_rank::DecodePhase first;  // h = x V^T
  void *parts = nullptr, *sums = nullptr;
};

// y = x S^T + sums + bias, or y = h U^T + x S^T + sums + bias; p.sums may then be low->sums.
template <class T>
void multiply_few(const Context& context, const SparseProduct& p, const FewLowRank* low = nullptr) {
  const std::int64_t rows = p.pattern.rows, tokens = p.x.rows;
  if (rows == 0 || tokens == 0) return;
  const low_rank::DecodePhase phase = low_rank::decode_phase(tokens, rows, p.pattern.cols, false);
  const std::int64_t groups = ceil_div(tokens, phase.token_group);
  FewArgs args;
  args.sparse = p, args.sparse_rows = phase.row_blocks;
  args.sparse_blocks = phase.row_blocks * groups;
  if (low != nullptr) {
    low_rank::DecodeArgs &h = args.hidden, &up = args.up;
    h.weight = low->v.data, h.weight_stride = low->v.row_stride;
    h.rows = low->v.rows, h.cols = low->v.cols, h.tokens = tokens;
    h.in = p.x.data, h.in_stride = p.x.row_stride, h.out = low->parts;
    low_rank::prepare(low->first, sizeof(T), h);
    args.hidden_rows = low->first.row_blocks, args.hidden_splits = low->first.splits;
    args.hidden_blocks = args.hidden_rows * args.hidden_splits * groups;
    up.weight = low->u.data, up.weight_stride = low->u.row_stride;
    up.rows = rows, up.cols = low->u.cols, up.tokens = tokens;
    up.in = low->parts, up.in_splits = low->first.splits;
    up.sums = low->sums, up.bias = p.bias, up.out = p.y.data, up.out_stride = p.y.row_stride;
    low_rank::prepare(low_rank::decode_phase(tokens, rows, up.cols, false), sizeof(T), up);
    args.keep_sums = true;
    const DType type = sizeof(T) == 8 ? DType::f64 : DType::f32;
    args.sparse.y = {low->sums, type, tokens, rows, rows};
  }
  const std::int64_t blocks = std::max(args.hidden_blocks, args.sparse_blocks);
  STRUCTMAT_CHECK(blocks < std::int64_t{1} << 31,
                  "sparse_low_rank_linear: more than 2^31 tiles, which no launch takes");
  low_rank::dispatch_group(phase, [&](auto group, auto rows_of_warp) {
    constexpr int kTokens = decltype(group)::value, kRows = decltype(rows_of_warp)::value;
    constexpr int kThreads = low_rank::kWarps * 32;
    constexpr std::size_t tile = sizeof(FewTile<T, kTokens>);
    constexpr std::size_t staged = kTokens * low_rank::kChunk * sizeof(accumulator_t<T>);
    constexpr std::size_t bytes = std::max(tile, staged);
    if (low == nullptr) {
      if constexpr (tile > 48 * 1024) SM_ALLOW_SHARED((few_tokens_kernel<T, kTokens, kRows>));
      SM_LAUNCH((few_tokens_kernel<T, kTokens, kRows>), static_cast<unsigned>(blocks), kThreads,
                tile, context.stream, args);
      return;
    }
    if constexpr (bytes > 48 * 1024) SM_ALLOW_SHARED((few_low_rank_kernel<T, kTokens, kRows>));
    const int resident = SM_RESIDENT((few_low_rank_kernel<T, kTokens, kRows>), kThreads, bytes);
    SM_LAUNCH_TOGETHER((few_low_rank_kernel<T, kTokens, kRows>),
                       static_cast<unsigned>(std::min<std::int64_t>(blocks, resident)), kThreads,
                       bytes, context.stream, args);
  });
}

}  // namespace structmat::sparse_low_rank
