// SPDX-License-Identifier: Apache-2.0
// multiply() in fp32 and fp64: a thread keeps kTall x 4 sums in registers; tiles of A and B come by
// asynchronous copies, number by number, three steps ahead.
#pragma once
#include "cuda/copy.h"
#include "cuda/strided_product_tile.cuh"

namespace structmat::cuda {

template <class T, int kTall>
struct SimtTile {
  static constexpr int kThreads = 128, kDepth = 16, kStages = 3;
  static constexpr int kRows = 16 * kTall, kCols = 32;  // 16 x 8 threads
  static constexpr int kPitch = 16 / sizeof(T);         // between rows, so that banks differ
  Addresses<kRows, kCols, kDepth> at;
  struct Stage {
    alignas(16) T a[kDepth][kRows + kPitch];
    alignas(16) T b[kDepth][kCols + kPitch];
  };
  union {
    Stage stage[kStages];
    SumTile<T, kRows, kCols> sums;
  };
};

// Lines of A or B, transposed on the way; what lies beyond `height` or `depth` is zero. Threads
// side by side take numbers side by side in memory.
template <int kThreads, class T, int kDepth, int kWidth>
__device__ void copy_lines(T (&to)[kDepth][kWidth], int lines, const T* from,
                           const std::int64_t* rows, const std::int64_t* columns, int height,
                           std::int64_t depth, bool along_columns, int thread) {
  SM_ROLLED
  for (int i = thread; i < lines * kDepth; i += kThreads) {
    const int line = along_columns ? i / kDepth : i % lines;
    const int inner = along_columns ? i % kDepth : i / lines;
    const bool in = line < height && inner < depth;
    copy<sizeof(T)>(&to[inner][line], in ? from + rows[line] + columns[inner] : from,
                    in ? sizeof(T) : 0);
  }
}

// sum += A B^T over the tile's terms. The block meets before it reuses `shared`, and has met after.
template <class T, int kTall>
__device__ void add_product(const StridedProduct& p, const Tile& tile, SimtTile<T, kTall>& shared,
                            T (&sum)[kTall][4], int thread) {
  using Shared = SimtTile<T, kTall>;
  constexpr int kThreads = Shared::kThreads, kRows = Shared::kRows, kCols = Shared::kCols,
                kDepth = Shared::kDepth, kStages = Shared::kStages;
  const int row = thread / 8 * kTall, col = thread % 8 * 4;
  const T* const a = operand<T>(p.a, tile.batch);
  const T* const b = operand<T>(p.b, tile.batch);
  const int steps = static_cast<int>(ceil_div(tile.inner, kDepth));

  const auto load = [&](int step) {
    if (step < steps) {
      const std::int64_t depth = tile.inner - std::int64_t{step} * kDepth;
      typename Shared::Stage& to = shared.stage[step % kStages];
      copy_lines<kThreads>(to.a, kRows, a, shared.at.a_row, shared.at.a_inner[step % 4],
                           tile.height, depth, p.a.col.low == 1 && !p.tall, thread);
      copy_lines<kThreads>(to.b, kCols, b, shared.at.b_row, shared.at.b_inner[step % 4], tile.width,
                           depth, p.b.col.low == 1 && !p.tall, thread);
    }
    copy_commit();  // of nothing too: the count of groups is that of steps
  };

  shared.at.start(p, tile, thread, kThreads);
  SM_ROLLED
  for (int s = 0; s < kStages; ++s) shared.at.step(p, tile, s, thread);
  __syncthreads();
  SM_ROLLED
  for (int s = 0; s < kStages - 1; ++s) load(s);
  SM_ROLLED
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    shared.at.step(p, tile, step + kStages, thread);
    const typename Shared::Stage& now = shared.stage[step % kStages];
    SM_UNROLL
    for (int k = 0; k < kDepth; ++k) {
      T left[kTall], right[4];
      SM_UNROLL
      for (int i = 0; i < kTall; ++i) left[i] = now.a[k][row + i];
      SM_UNROLL
      for (int j = 0; j < 4; ++j) right[j] = now.b[k][col + j];
      SM_UNROLL
      for (int i = 0; i < kTall; ++i) {
        SM_UNROLL
        for (int j = 0; j < 4; ++j) sum[i][j] += left[i] * right[j];
      }
    }
  }
  copy_wait<0>();
  __syncthreads();
}

template <class T, int kTall, class Sums>
__device__ void share_sums(const T (&sum)[kTall][4], Sums& sums, int thread) {
  const int row = thread / 8 * kTall, col = thread % 8 * 4;
  SM_UNROLL
  for (int i = 0; i < kTall; ++i) {
    SM_UNROLL
    for (int j = 0; j < 4; ++j) sums.value[row + i][col + j] = sum[i][j];
  }
}

template <class T>
constexpr int kSimtTall = sizeof(T) == 8 ? 4 : 8;  // 32 registers of sums

template <class T, int kTall>
__global__ void __launch_bounds__(128, 4) simt_product_kernel(StridedProduct p) {
  using Shared = SimtTile<T, kTall>;
  constexpr int kThreads = Shared::kThreads;
  SM_DYNAMIC_SHARED(Shared, shared);
  const int thread = threadIdx.x;
  const Tile tile = tile_of_block<Shared::kRows, Shared::kCols>(p, 1);
  T sum[kTall][4] = {};
  add_product(p, tile, *shared, sum, thread);
  shared->at.finish(p, tile, thread, kThreads);
  share_sums(sum, shared->sums, thread);
  __syncthreads();
  if (p.splits > 1) return store_part<kThreads>(p, tile, shared->sums, thread);
  finish_sums<T, kThreads>(p, tile, shared->sums, shared->at, thread);
  store_sums<T, kThreads>(p, tile, shared->sums, shared->at, thread);
}

template <class T>
void multiply_simt(const Context& context, const StridedProduct& p) {
  constexpr int kTall = kSimtTall<T>;
  using Shared = SimtTile<T, kTall>;
  SM_LAUNCH((simt_product_kernel<T, kTall>), (grid_of<Shared::kRows, Shared::kCols>(p, 1)),
            Shared::kThreads, sizeof(Shared), context.stream, p);
}

}  // namespace structmat::cuda
