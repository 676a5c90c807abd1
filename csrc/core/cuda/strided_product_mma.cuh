// SPDX-License-Identifier: Apache-2.0
// multiply() of 16-bit types on tensor cores, sums in fp32: tiles of A and B come by asynchronous
// copies of 16 bytes, three steps ahead, or number by number where maps leave nothing side by side.
#pragma once
#include "cuda/copy.h"
#include "cuda/mma.h"
#include "cuda/strided_product_tile.cuh"

namespace structmat::cuda {

constexpr int kDepth = 32, kStages = 3;  // columns of A and B a step takes, steps under way

// How tiles of A and B get to shared memory: in packs along their columns, in packs along their
// rows and hence transposed, or by numbers.
enum class Way : int { columns, rows, numbers };

// kLines rows of A (or B) by kDepth columns. Pitches keep the eight addresses of an 8 x 8 matrix in
// different banks.
template <class T, int kLines, Way kWay, bool kTransposed>
struct Panel {
  static constexpr int kPitch = (kTransposed ? kLines : kDepth) + kPack;
  T value[(kTransposed ? kDepth : kLines) * kPitch];

  __device__ T* at(int line, int inner) {
    return value + (kTransposed ? inner * kPitch + line : line * kPitch + inner);
  }

  // What lies beyond `height` lines or `depth` columns is zero.
  template <int kThreads>
  __device__ void load(const T* from, const std::int64_t* rows, const std::int64_t* columns,
                       int height, int depth, int thread) {
    constexpr int kNumbers = kWay == Way::numbers ? 1 : kPack;
    constexpr int kAlong = kTransposed ? kLines : kDepth;
    const auto place = [](int i, int& line, int& inner) {
      const int first = i % (kAlong / kNumbers) * kNumbers, other = i / (kAlong / kNumbers);
      line = kTransposed ? first : other, inner = kTransposed ? other : first;
    };
    if constexpr (kWay == Way::numbers) {
      constexpr int kTurns = kLines * kDepth / kThreads, kAtOnce = kTurns < 8 ? kTurns : 8;
      static_assert(kLines * kDepth % kThreads == 0 && kTurns % kAtOnce == 0);
      SM_ROLLED
      for (int turn = 0; turn < kTurns; turn += kAtOnce) {
        T number[kAtOnce];  // all on their way before the first is waited for
        SM_UNROLL
        for (int e = 0; e < kAtOnce; ++e) {
          int line, inner;
          place(thread + (turn + e) * kThreads, line, inner);
          const bool in = line < height && inner < depth;
          number[e] = in ? from[rows[line] + columns[inner]] : T{};
        }
        SM_UNROLL
        for (int e = 0; e < kAtOnce; ++e) {
          int line, inner;
          place(thread + (turn + e) * kThreads, line, inner);
          *at(line, inner) = number[e];
        }
      }
    } else {
      SM_ROLLED
      for (int i = thread; i < kLines * kDepth / kPack; i += kThreads) {
        int line, inner;
        place(i, line, inner);
        const bool in = line < height && inner < depth;
        const int left = kTransposed ? height - line : depth - inner;
        copy<16>(at(line, inner), in ? from + rows[line] + columns[inner] : from,
                 in ? 2 * (left < kPack ? left : kPack) : 0);
      }
    }
  }

  // 16 lines from `line` on as A of an instruction, or as two B: b0, b1 of the first 8 come first.
  __device__ void left(unsigned (&out)[4], int line, int inner, int lane) {
    const int matrix = lane / 8, r = lane % 8;
    if constexpr (kTransposed)
      load_matrices<true>(out, at(line + matrix % 2 * 8, inner + matrix / 2 * 8 + r));
    else
      load_matrices<false>(out, at(line + matrix % 2 * 8 + r, inner + matrix / 2 * 8));
  }
  __device__ void right(unsigned (&out)[4], int line, int inner, int lane) {
    const int matrix = lane / 8, r = lane % 8;
    if constexpr (kTransposed)
      load_matrices<true>(out, at(line + matrix / 2 * 8, inner + matrix % 2 * 8 + r));
    else
      load_matrices<false>(out, at(line + matrix / 2 * 8 + r, inner + matrix % 2 * 8));
  }
};

// kRows x kCols of C by kDown x kAcross warps.
template <int kRowsOfTile, int kColsOfTile, int kWarpsDown, int kWarpsAcross>
struct Shape {
  static constexpr int kRows = kRowsOfTile, kCols = kColsOfTile, kDown = kWarpsDown,
                       kAcross = kWarpsAcross;
  static constexpr int kThreads = kDown * kAcross * 32;
  static constexpr int kA = kRows / kDown / 16, kB = kCols / kAcross / 16;  // 16 x 16 of a warp
};

template <class T, class S, Way kWayA, Way kWayB, bool kTall>
struct MmaTile {
  Addresses<S::kRows, S::kCols, kDepth> at;
  struct Stage {
    alignas(16) Panel<T, S::kRows, kWayA, kTall || kWayA == Way::rows> a;
    alignas(16) Panel<T, S::kCols, kWayB, kTall || kWayB == Way::rows> b;
  };
  union {
    Stage stage[kStages];
    SumTile<float, S::kRows, S::kCols> sums;
  };
};

// sum += A B^T of one step's panels.
template <class T, class S, class A, class B>
__device__ void multiply_panels(A& a, B& b, float (&sum)[S::kA][2 * S::kB][4], int row, int col,
                                int lane) {
  SM_UNROLL
  for (int k = 0; k < kDepth; k += 16) {
    unsigned left[S::kA][4], right[S::kB][4];
    SM_UNROLL
    for (int i = 0; i < S::kA; ++i) a.left(left[i], row + i * 16, k, lane);
    SM_UNROLL
    for (int j = 0; j < S::kB; ++j) b.right(right[j], col + j * 16, k, lane);
    SM_UNROLL
    for (int i = 0; i < S::kA; ++i) {
      SM_UNROLL
      for (int j = 0; j < S::kB; ++j) {
        multiply_16x8x16<T>(sum[i][2 * j], left[i], right[j][0], right[j][1]);
        multiply_16x8x16<T>(sum[i][2 * j + 1], left[i], right[j][2], right[j][3]);
      }
    }
  }
}

// Sums of a thread: 16 x 8 tiles of the part of its warp.
template <class S>
using WarpSums = float[S::kA][2 * S::kB][4];

// sum += A B^T over the tile's terms. The block meets before it reuses `shared`, and has met after.
template <class T, class S, Way kWayA, Way kWayB, bool kTall>
__device__ void add_product(const StridedProduct& p, const Tile& tile,
                            MmaTile<T, S, kWayA, kWayB, kTall>& shared, WarpSums<S>& sum,
                            int thread) {
  constexpr int kThreads = S::kThreads, kA = S::kA, kB = S::kB;
  const int lane = thread % 32, warp = thread / 32;
  const int row = warp / S::kAcross * kA * 16, col = warp % S::kAcross * kB * 16;
  const int steps = static_cast<int>(ceil_div(tile.inner, kDepth));
  const T* const a = operand<T>(p.a, tile.batch);
  const T* const b = operand<T>(p.b, tile.batch);
  shared.at.start(p, tile, thread, kThreads);
  SM_ROLLED
  for (int s = 0; s < kStages; ++s) shared.at.step(p, tile, s, thread);
  __syncthreads();
  const auto load = [&](int step) {
    if (step < steps) {
      const std::int64_t left = tile.inner - std::int64_t{step} * kDepth;
      const int depth = left < kDepth ? static_cast<int>(left) : kDepth;
      auto& to = shared.stage[step % kStages];
      to.a.template load<kThreads>(a, shared.at.a_row, shared.at.a_inner[step % 4], tile.height,
                                   depth, thread);
      to.b.template load<kThreads>(b, shared.at.b_row, shared.at.b_inner[step % 4], tile.width,
                                   depth, thread);
    }
    copy_commit();  // of nothing too: the count of groups is that of steps
  };
  SM_ROLLED
  for (int s = 0; s < kStages - 1; ++s) load(s);
  SM_ROLLED
  for (int step = 0; step < steps; ++step) {
    copy_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    shared.at.step(p, tile, step + kStages, thread);
    auto& now = shared.stage[step % kStages];
    multiply_panels<T, S>(now.a, now.b, sum, row, col, lane);
  }
  copy_wait<0>();
  __syncthreads();
}

template <class S, class Sums>
__device__ void share_sums(const WarpSums<S>& sum, Sums& sums, int thread) {
  const int lane = thread % 32, warp = thread / 32;
  const int row = warp / S::kAcross * S::kA * 16, col = warp % S::kAcross * S::kB * 16;
  SM_UNROLL
  for (int i = 0; i < S::kA; ++i) {
    SM_UNROLL
    for (int j = 0; j < 2 * S::kB; ++j) {
      SM_UNROLL
      for (int e = 0; e < 4; ++e)
        sums.value[row + i * 16 + lane / 4 + e / 2 * 8][col + j * 8 + lane % 4 * 2 + e % 2] =
            sum[i][j][e];
    }
  }
}

// A block takes as many batches as share packs of C; large tiles are not for such.
template <class T, class S, Way kWayA, Way kWayB, bool kTall>
__global__ void __launch_bounds__(S::kThreads, 512 / S::kThreads)
    mma_product_kernel(StridedProduct p, bool c_packs, int batches_of_pack) {
  using Shared = MmaTile<T, S, kWayA, kWayB, kTall>;
  const int shared_by = S::kRows > 64 ? 1 : batches_of_pack;
  constexpr int kThreads = S::kThreads;
  SM_DYNAMIC_SHARED(Shared, shared);
  T* const packs = reinterpret_cast<T*>(shared + 1);  // of C, where batches share them
  const int thread = threadIdx.x;
  Tile tile = tile_of_block<S::kRows, S::kCols>(p, shared_by);
  const std::int64_t first = tile.batch;
  const int run = kPack / shared_by;

  SM_ROLLED
  for (int g = 0; g < shared_by && first + g < p.batches; ++g) {
    tile.batch = first + g;
    if (g > 0) __syncthreads();
    WarpSums<S> sum = {};
    add_product<T, S, kWayA, kWayB, kTall>(p, tile, *shared, sum, thread);
    shared->at.finish(p, tile, thread, kThreads);
    share_sums<S>(sum, shared->sums, thread);
    __syncthreads();
    if (p.splits > 1) return store_part<kThreads>(p, tile, shared->sums, thread);
    finish_sums<T, kThreads>(p, tile, shared->sums, shared->at, thread);
    if (shared_by > 1)  // a pack for each row and address of columns
      for_each_sum<kThreads>(tile, shared->sums, thread, [&](int r, int c, float sum) {
        packs[(r * S::kCols + c / run * run) * shared_by + g * run + c % run] = rounded<T>(sum);
      });
    else if (c_packs)
      store_packs<T, kThreads>(p, tile, shared->sums, shared->at, thread);
    else
      store_sums<T, kThreads>(p, tile, shared->sums, shared->at, thread);
  }
  if (shared_by == 1) return;
  __syncthreads();
  const int batches =
      p.batches - first < shared_by ? static_cast<int>(p.batches - first) : shared_by;
  const int count = static_cast<int>(ceil_div(tile.width, run));
  T* const c = const_cast<T*>(operand<T>(p.c, first));
  SM_ROLLED
  for (int i = thread; i < tile.height * count; i += kThreads) {
    const int r = i / count, n = i % count * run;
    const T* from = packs + (r * S::kCols + n) * shared_by;
    T* to = c + shared->at.a_row[r] + shared->at.b_row[n];
    if (batches == shared_by && n + run <= tile.width) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      SM_ROLLED
      for (int e = 0; e < batches * run; ++e)
        if (n + e % run < tile.width) to[e] = from[e];
    }
  }
}

template <class T, class S, Way kWayA, Way kWayB, bool kTall = false>
void launch_mma(const Context& context, const StridedProduct& p) {
  const int shared_by =
      p.splits > 1 || S::kRows > 64 ? 1 : static_cast<int>(interleaved_batches(p.c));
  const bool c_packs = packs(p.c.data, p.c.col, p.c.row, p.c.batch);
  std::size_t bytes = sizeof(MmaTile<T, S, kWayA, kWayB, kTall>);
  if (shared_by > 1) bytes += std::size_t{S::kRows} * S::kCols * sizeof(T) * shared_by;
  SM_ALLOW_SHARED((mma_product_kernel<T, S, kWayA, kWayB, kTall>));
  SM_LAUNCH((mma_product_kernel<T, S, kWayA, kWayB, kTall>),
            (grid_of<S::kRows, S::kCols>(p, shared_by)), S::kThreads, bytes, context.stream, p,
            c_packs, shared_by);
}

template <class T>
void multiply_mma(const Context& context, const StridedProduct& p) {
  using Large = Shape<128, 128, 2, 4>;
  using Small = Shape<64, 64, 2, 2>;
  using Few = Shape<16, 64, 1, 4>;  // few tokens
  const auto along_rows = [](const Operand& x) { return packs(x.data, x.row, x.col, x.batch); };
  const auto along_columns = [](const Operand& x) { return packs(x.data, x.col, x.row, x.batch); };
  constexpr Way rows = Way::rows, columns = Way::columns, numbers = Way::numbers;
  const bool few = p.rows <= 16;
  if (p.tall)
    return along_rows(p.a) && along_rows(p.b)
               ? launch_mma<T, Small, rows, rows, true>(context, p)
               : launch_mma<T, Small, numbers, numbers, true>(context, p);
  const bool large = p.rows > 64 && p.cols > 64 && interleaved_batches(p.c) == 1;
  if (along_columns(p.a) && along_columns(p.b))
    return large ? launch_mma<T, Large, columns, columns>(context, p)
           : few ? launch_mma<T, Few, columns, columns>(context, p)
                 : launch_mma<T, Small, columns, columns>(context, p);
  if (along_columns(p.a) && along_rows(p.b))
    return large ? launch_mma<T, Large, columns, rows>(context, p)
           : few ? launch_mma<T, Few, columns, rows>(context, p)
                 : launch_mma<T, Small, columns, rows>(context, p);
  return few ? launch_mma<T, Few, numbers, numbers>(context, p)
             : launch_mma<T, Small, numbers, numbers>(context, p);
}

}  // namespace structmat::cuda
