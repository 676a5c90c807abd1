// SPDX-License-Identifier: Apache-2.0
// multiply() of 16-bit types on tensor cores, sums in fp32: tiles of A and B come by asynchronous
// copies of 16 bytes, three steps ahead, or number by number where maps leave nothing side by side.
#pragma once
#include "cuda/copy.h"
#include "cuda/mma.h"
#include "cuda/strided_product_tile.cuh"

namespace structmat::cuda {

// How a tile of A or B gets to shared memory.
enum class Way : int { numbers, inner_packs, row_packs };
struct Ways {
  Way a, b;
  bool c_packs;             // C is written in packs along its columns
  std::int64_t interleaved;  // batches of a block, whose packs of C are shared
};

constexpr int kDepth = 32, kStages = 3;  // columns of A and B a step takes, steps under way

// kLines rows of A (or B) by kDepth columns: as they are, or transposed where packs run along rows.
// Pitches keep the eight addresses of an 8 x 8 matrix in different banks.
template <class T, int kLines, bool kTransposed>
struct Panel {
  static constexpr int kPitch = (kTransposed ? kLines : kDepth) + kPack;
  T value[(kTransposed ? kDepth : kLines) * kPitch];

  __device__ T* at(int line, int inner) {
    return value + (kTransposed ? inner * kPitch + line : line * kPitch + inner);
  }

  // Lines from `line` on, columns from `inner` to `end`; what lies beyond is zero.
  template <int kThreads>
  __device__ void load(Way way, const T* from, const std::int64_t* lines,
                       const std::int64_t* columns, std::int64_t line, std::int64_t line_end,
                       std::int64_t inner, std::int64_t end, int thread) {
    const std::int64_t left_lines = line_end - line, left = end - inner;
    if (way == Way::numbers) {
      for (int i = thread; i < kLines * kDepth; i += kThreads) {
        const int l = kTransposed ? i % kLines : i / kDepth, c = kTransposed ? i / kLines : i % kDepth;
        *at(l, c) = l < left_lines && c < left ? from[lines[l] + columns[c]] : T{};
      }
      return;
    }
    SM_UNROLL
    for (int i = thread; i < kLines * kDepth / kPack; i += kThreads) {
      constexpr int kPacks = (kTransposed ? kLines : kDepth) / kPack;
      const int pack = i % kPacks * kPack;
      const int l = kTransposed ? pack : i / kPacks, c = kTransposed ? i / kPacks : pack;
      const std::int64_t along = kTransposed ? left_lines - l : left - c;
      const bool in = l < left_lines && c < left;
      const int count = !in ? 0 : along < kPack ? static_cast<int>(along) : kPack;
      copy_16(at(l, c), in ? from + lines[l] + columns[c] : from, count * 2);
    }
  }

  // The 16 lines from `line` on as A of an instruction; 16 lines as two B's: b0, b1 of the first 8.
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

template <class T, int kRows, int kCols, bool kTransA, bool kTransB>
struct MmaTile {
  Addresses<kRows, kCols, kDepth> at;
  struct Stage {
    alignas(16) Panel<T, kRows, kTransA> a;
    alignas(16) Panel<T, kCols, kTransB> b;
  };
  // Then, in their place, C: a row's numbers side by side or, with interleaved batches, packs of
  // kPack numbers that share their column's address.
  Stage stage[kStages];

  static constexpr int kPitchC = kCols + kPack;
  static std::size_t bytes(std::int64_t interleaved) {
    const std::size_t staged =
        interleaved == 1 ? kRows * kPitchC : static_cast<std::size_t>(interleaved) * kRows * kCols;
    return offsetof(MmaTile, stage) + sizeof stage +
           (interleaved == 1 ? 0 : staged * sizeof(T));
  }
  static_assert(kRows * kPitchC * sizeof(T) <= sizeof stage, "C fits where A and B were");
};

template <class T, int kRows, int kCols, int kWarpRows, int kWarpCols, bool kTransA, bool kTransB>
__global__ void __launch_bounds__(kWarpRows* kWarpCols * 32)
    mma_product_kernel(StridedProduct p, Ways ways) {
  using Shared = MmaTile<T, kRows, kCols, kTransA, kTransB>;
  constexpr int kThreads = kWarpRows * kWarpCols * 32;
  constexpr int kA = kRows / kWarpRows / 16, kB = kCols / kWarpCols / 16;  // 16 x 16 tiles of a warp
  SM_DYNAMIC_SHARED(Shared, shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row = warp / kWarpCols * kA * 16, col = warp % kWarpCols * kB * 16;
  const int group = static_cast<int>(ways.interleaved);
  Tile tile = tile_of_block<kRows, kCols>(p, group);
  const std::int64_t first_batch = tile.batch;
  const int steps = static_cast<int>(tiles_of(tile.end - tile.begin, kDepth));
  T* const c = static_cast<T*>(const_cast<void*>(p.c.data));
  // C of interleaved batches gathers behind the stages.
  T* const staged = group == 1 ? reinterpret_cast<T*>(shared->stage)
                               : reinterpret_cast<T*>(shared->stage + kStages);
  const int run = kPack / group;  // of one batch's numbers in a pack
  const int batches =
      static_cast<int>(p.batches - first_batch < group ? p.batches - first_batch : group);

  for (int g = 0; g < batches; ++g) {
    tile.batch = first_batch + g;
    const T* const a = operand<T>(p.a, tile.batch);
    const T* const b = operand<T>(p.b, tile.batch);
    if (g > 0) __syncthreads();
    shared->at.start(p, tile, thread, kThreads);
    SM_UNROLL
    for (int s = 0; s < kStages; ++s) shared->at.step(p, tile, s, thread);
    __syncthreads();
    const auto load = [&](int step) {
      if (step < steps) {
        const std::int64_t inner = tile.begin + std::int64_t{step} * kDepth;
        typename Shared::Stage& to = shared->stage[step % kStages];
        to.a.template load<kThreads>(ways.a, a, shared->at.a_row, shared->at.a_inner[step % 4],
                                     tile.row, p.rows, inner, tile.end, thread);
        to.b.template load<kThreads>(ways.b, b, shared->at.b_row, shared->at.b_inner[step % 4],
                                     tile.col, p.cols, inner, tile.end, thread);
      }
      copy_commit();  // of nothing too: the count of groups is that of steps
    };
    SM_UNROLL
    for (int s = 0; s < kStages - 1; ++s) load(s);

    float sum[kA][2 * kB][4] = {};
    SM_ROLLED
    for (int step = 0; step < steps; ++step) {
      copy_wait<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);
      shared->at.step(p, tile, step + kStages, thread);
      typename Shared::Stage& now = shared->stage[step % kStages];
      SM_UNROLL
      for (int k = 0; k < kDepth; k += 16) {
        unsigned left[kA][4], right[kB][4];
        SM_UNROLL
        for (int i = 0; i < kA; ++i) now.a.left(left[i], row + i * 16, k, lane);
        SM_UNROLL
        for (int j = 0; j < kB; ++j) now.b.right(right[j], col + j * 16, k, lane);
        SM_UNROLL
        for (int i = 0; i < kA; ++i) {
          SM_UNROLL
          for (int j = 0; j < kB; ++j) {
            multiply_16x8x16<T>(sum[i][2 * j], left[i], right[j][0], right[j][1]);
            multiply_16x8x16<T>(sum[i][2 * j + 1], left[i], right[j][2], right[j][3]);
          }
        }
      }
    }
    copy_wait<0>();
    __syncthreads();

    float* const part = p.splits == 1 ? nullptr
                                      : static_cast<float*>(p.partial) +
                                            (tile.split * p.batches + tile.batch) * p.rows * p.cols;
    if (part == nullptr) {
      shared->at.finish(p, tile, thread, kThreads);
      __syncthreads();
    }
    SM_UNROLL
    for (int j = 0; j < 2 * kB; ++j) {
      SM_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int in = col + j * 8 + lane % 4 * 2 + e;
        if (tile.col + in >= p.cols) continue;
        float bias = 0;
        if (p.bias != nullptr)
          bias = to_float(operand<T>({p.bias, p.c.batch, {}, {}}, tile.batch)[shared->at.b_row[in]]);
        SM_UNROLL
        for (int i = 0; i < kA; ++i) {
          SM_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int down = row + i * 16 + half * 8 + lane / 4;
            if (tile.row + down >= p.rows) continue;
            const float z = sum[i][j][half * 2 + e];
            if (part != nullptr) {
              part[(tile.row + down) * p.cols + tile.col + in] = z;
              continue;
            }
            const T value = from_float<T>(activated(z + bias, p.activation));
            if (group == 1)
              staged[down * Shared::kPitchC + in] = value;
            else
              staged[(down * kCols + in / run * run) * group + g * run + in % run] = value;
          }
        }
      }
    }
    if (part != nullptr) return;
  }
  __syncthreads();

  T* const origin = c + p.c.batch.at(0, first_batch);
  const int columns = static_cast<int>(p.cols - tile.col < kCols ? p.cols - tile.col : kCols);
  const int rows = static_cast<int>(p.rows - tile.row < kRows ? p.rows - tile.row : kRows);
  if (group > 1) {  // a pack per row and address of columns
    const int packs = (columns + run - 1) / run;
    for (int i = thread; i < rows * packs; i += kThreads) {
      const int r = i / packs, pack = i % packs;
      const T* from = staged + (r * kCols + pack * run) * group;
      T* to = origin + shared->at.a_row[r] + shared->at.b_row[pack * run];
      if (batches == group && (pack + 1) * run <= columns)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      else
        for (int n = 0; n < batches * run; ++n)
          if (pack * run + n % run < columns) to[n] = from[n];
    }
  } else if (ways.c_packs) {
    const int packs = (columns + kPack - 1) / kPack;
    for (int i = thread; i < rows * packs; i += kThreads) {
      const int r = i / packs, n = i % packs * kPack;
      const T* from = staged + r * Shared::kPitchC + n;
      T* to = origin + shared->at.a_row[r] + shared->at.b_row[n];
      if (n + kPack <= columns)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      else
        for (int e = 0; n + e < columns; ++e) to[e] = from[e];
    }
  } else {
    for (int i = thread; i < rows * columns; i += kThreads) {
      const int r = i / columns, n = i % columns;
      origin[shared->at.a_row[r] + shared->at.b_row[n]] = staged[r * Shared::kPitchC + n];
    }
  }
}

template <class T, int kRows, int kCols, int kWarpRows, int kWarpCols, bool kTransA, bool kTransB>
void launch_mma(const Context& context, const StridedProduct& p, const Ways& ways) {
  const std::size_t bytes = MmaTile<T, kRows, kCols, kTransA, kTransB>::bytes(ways.interleaved);
  if (bytes > 48 * 1024)
    SM_ALLOW_SHARED((mma_product_kernel<T, kRows, kCols, kWarpRows, kWarpCols, kTransA, kTransB>),
                    static_cast<int>(bytes));
  SM_LAUNCH((mma_product_kernel<T, kRows, kCols, kWarpRows, kWarpCols, kTransA, kTransB>), (grid_of<kRows, kCols>(p, ways.interleaved)), kWarpRows * kWarpCols * 32, bytes,
            context.stream, p, ways);
}

template <class T>
void multiply_mma(const Context& context, const StridedProduct& p) {
  const auto way = [&](const Operand& x) {
    if (!p.tall && packs(x.data, x.col, x.row, x.batch)) return Way::inner_packs;
    return packs(x.data, x.row, x.col, x.batch) ? Way::row_packs : Way::numbers;
  };
  Ways ways{way(p.a), way(p.b), packs(p.c.data, p.c.col, p.c.row, p.c.batch), 1};
  if (p.tall) return launch_mma<T, 64, 64, 2, 2, true, true>(context, p, ways);
  if (ways.a == Way::row_packs) ways.a = Way::numbers;
  if (p.splits == 1) ways.interleaved = interleaved_batches(p.c);
  const bool transposed = ways.b == Way::row_packs;
  const bool large = p.rows > 64 && p.cols > 64 && ways.interleaved == 1, few = p.rows <= 16;
  if (large && transposed) return launch_mma<T, 128, 128, 2, 4, false, true>(context, p, ways);
  if (large) return launch_mma<T, 128, 128, 2, 4, false, false>(context, p, ways);
  if (few && transposed) return launch_mma<T, 16, 64, 1, 4, false, true>(context, p, ways);
  if (few) return launch_mma<T, 16, 64, 1, 4, false, false>(context, p, ways);
  if (transposed) return launch_mma<T, 64, 64, 2, 2, false, true>(context, p, ways);
  launch_mma<T, 64, 64, 2, 2, false, false>(context, p, ways);
}

}  // namespace structmat::cuda
