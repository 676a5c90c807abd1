// SPDX-License-Identifier: Apache-2.0
// values = (dy^T x) on a support whose strips of 16 rows have the same columns (16-bit types). A
// warp takes a strip and a part of the tokens, and 64 of its columns at a time: these of x^T,
// gathered, times 16 columns of dy are a dense product for tensor cores.
//
// For n = m = 4096, 4096 tokens and 3 %, H200: 4.1 GFLOP, 7 us of mma.sync; x to x^T 14 us of
// memory; columns of x^T and dy from L2 cache 325 MB, 59 us (5.5 TB/s, a guess). Whole tiles of
// dy^T x by mma.sync, of which the support is stored, take 230 us at any density: equal at 12 %.
#pragma once
#include "sparse_low_rank/sparse_strips_cuda.cuh"

namespace structmat::sparse_low_rank {

constexpr int kSampledWarps = 4;

template <class T>
__global__ void __launch_bounds__(kTurnThreads)
    turn_kernel(ConstMatrixView x, bool x_packs, void* turned, std::int64_t stride) {
  __shared__ T shared[kTurn][kTurn + 1];
  turn<T>(x, x_packs, static_cast<T*>(turned), stride, blockIdx.x, shared);
}

template <class T>
struct SampledStage {  // 32 tokens of a warp; pitches keep rows of a matrix in different banks
  static constexpr int kTokens = 32, kColumns = 64, kStages = 3;
  alignas(16) T x[kColumns][kTokens + cuda::kPack];
  alignas(16) T dy[kTokens][kStrip + cuda::kPack];
};

// Warps of a block do not meet.
template <class T>
__global__ void __launch_bounds__(kSampledWarps * 32, 4)
    sampled_strips_kernel(ConstMatrixView dy, bool dy_packs, SparsePatternView pattern,
                          SampledSpace space, T* values) {
  using Stage = SampledStage<T>;
  constexpr int kStages = Stage::kStages, kTokens = Stage::kTokens, kColumns = Stage::kColumns;
  constexpr int kPack = cuda::kPack, kPacks = kTokens / kPack, kTurns = kColumns * kPacks / 32;
  struct Stages {
    Stage of_warp[kSampledWarps][kStages];
  };
  SM_DYNAMIC_SHARED(Stages, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, matrix = lane / 8, r = lane % 8;
  auto& stages = shared->of_warp[warp];
  const std::int64_t blocks = ceil_div(pattern.groups(), kSampledWarps);
  const std::int64_t strip = blockIdx.x % blocks * kSampledWarps + warp,
                     split = blockIdx.x / blocks;
  if (strip >= pattern.groups()) return;
  const std::int64_t slabs = pattern.slabs(), row0 = strip * kStrip;
  const std::int64_t* const starts = pattern.starts + strip * slabs;
  const std::int64_t first = starts[0], count = starts[slabs] - first;
  const int rows = static_cast<int>(pattern.rows - row0 < kStrip ? pattern.rows - row0 : kStrip);
  const std::int64_t begin = split * space.split_inner;
  const std::int64_t end =
      begin + space.split_inner < dy.rows ? begin + space.split_inner : dy.rows;
  const int steps = static_cast<int>(ceil_div(end - begin, kTokens));
  const T* const from_dy = static_cast<const T*>(dy.data) + row0;

  std::int64_t slab = 0;
  SM_ROLLED
  for (std::int64_t entry0 = 0; entry0 < count; entry0 += kColumns) {
    const T* x[kTurns];  // beyond the last entry that one again, which nobody stores
    SM_UNROLL
    for (int i = 0; i < kTurns; ++i) {
      std::int64_t entry = entry0 + lane / kPacks + i * (32 / kPacks);
      if (entry >= count) entry = count - 1;
      while (starts[slab + 1] <= first + entry) ++slab;
      x[i] = static_cast<const T*>(space.turned) +
             (slab * sparse_slab_columns + pattern.columns[first + entry]) * space.stride +
             lane % kPacks * kPack;
    }
    const auto load = [&](int step) {
      if (step < steps) {
        Stage& stage = stages[step % kStages];
        const std::int64_t token0 = begin + std::int64_t{step} * kTokens;
        const bool in = token0 + lane % kPacks * kPack < space.stride;  // whole packs
        SM_UNROLL
        for (int i = 0; i < kTurns; ++i)
          cuda::copy<16>(&stage.x[lane / kPacks + i * (32 / kPacks)][lane % kPacks * kPack],
                         in ? x[i] + token0 : x[i], in ? 16 : 0);
        const std::int64_t token = token0 + lane;
        const T* const of_token = from_dy + token * dy.row_stride;
        SM_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int left = token < end ? rows - half * kPack : 0;
          T* const to = &stage.dy[lane][half * kPack];
          if (dy_packs) {
            cuda::copy<16>(to, left > 0 ? of_token + half * kPack : from_dy,
                           left <= 0      ? 0
                           : left < kPack ? 2 * left
                                          : 16);
          } else {
            SM_UNROLL
            for (int e = 0; e < kPack; ++e) to[e] = e < left ? of_token[half * kPack + e] : T{};
          }
        }
      }
      cuda::copy_commit();
    };
    float sum[kColumns / 16][2][4] = {};
    SM_ROLLED
    for (int s = 0; s < kStages - 1; ++s) load(s);
    SM_ROLLED
    for (int step = 0; step < steps; ++step) {
      cuda::copy_wait<kStages - 2>();
      __syncwarp();
      load(step + kStages - 1);
      const Stage& stage = stages[step % kStages];
      SM_UNROLL
      for (int k = 0; k < kTokens; k += 16) {
        unsigned right[4];
        cuda::load_matrices<true>(right, &stage.dy[k + matrix % 2 * 8 + r][matrix / 2 * 8]);
        SM_UNROLL
        for (int i = 0; i < kColumns / 16; ++i) {
          unsigned left[4];
          cuda::load_matrices<false>(left,
                                     &stage.x[i * 16 + matrix % 2 * 8 + r][k + matrix / 2 * 8]);
          cuda::multiply_16x8x16<T>(sum[i][0], left, right[0], right[1]);
          cuda::multiply_16x8x16<T>(sum[i][1], left, right[2], right[3]);
        }
      }
    }
    cuda::copy_wait<0>();
    __syncwarp();
    SM_UNROLL
    for (int i = 0; i < kColumns / 16; ++i) {
      SM_UNROLL
      for (int e = 0; e < 8; ++e) {
        const std::int64_t entry = entry0 + i * 16 + lane / 4 + e / 2 % 2 * 8;
        const int row = e / 4 * 8 + lane % 4 * 2 + e % 2;
        if (entry >= count || row >= rows) continue;
        const std::int64_t at = kStrip * first + row * count + entry;
        const float value = sum[i][e / 4][e % 4];
        if (space.splits > 1)
          static_cast<float*>(space.partial)[split * pattern.nnz + at] = value;
        else
          values[at] = cuda::rounded<T>(value);
      }
    }
  }
}

template <class T>
void sample_strips(const Context& context, const ConstMatrixView& dy, const ConstMatrixView& x,
                   const SparsePatternView& pattern, const SampledSpace& space, void* values) {
  const std::int64_t tiles = turn_tiles(x.cols, space.stride);
  const std::int64_t blocks = ceil_div(pattern.groups(), kSampledWarps) * space.splits;
  STRUCTMAT_CHECK(tiles < std::int64_t{1} << 31 && blocks < std::int64_t{1} << 31,
                  "sampled_matmul: more than 2^31 tiles, which no launch takes");
  if (tiles > 0)
    SM_LAUNCH(turn_kernel<T>, static_cast<unsigned>(tiles), kTurnThreads, 0, context.stream, x,
              rows_pack(x), space.turned, space.stride);
  SM_ALLOW_SHARED((sampled_strips_kernel<T>));
  SM_LAUNCH(sampled_strips_kernel<T>, static_cast<unsigned>(blocks), kSampledWarps * 32,
            kSampledWarps * SampledStage<T>::kStages * sizeof(SampledStage<T>), context.stream, dy,
            rows_pack(dy), pattern, space, static_cast<T*>(values));
}

}  // namespace structmat::sparse_low_rank
