// SPDX-License-Identifier: Apache-2.0
// multiply() in fp32 and fp64: a thread keeps kMine x kMine sums in registers; tiles of A and B
// pass through registers to shared memory, the next while this one is multiplied.
#pragma once
#include "cuda/strided_product_tile.cuh"

namespace structmat::cuda {

template <class T, int kMine>
struct SimtTile {
  static constexpr int kThreads = 128, kDepth = 16;
  static constexpr int kRows = 16 * kMine, kCols = 8 * kMine;  // 16 x 8 threads
  static constexpr int kPitch = 16 / sizeof(T);                // between rows, so that banks differ
  Addresses<kRows, kCols, kDepth> at;
  alignas(16) T a[kDepth][kRows + kPitch];
  alignas(16) T b[kDepth][kCols + kPitch];
};

// A tile's element that falls to a thread: along whichever index lies side by side in memory.
template <int kLines, int kDepth>
struct Element {
  int line, inner;
  __device__ Element(int i, bool along_inner)
      : line(along_inner ? i / kDepth : i % kLines), inner(along_inner ? i % kDepth : i / kLines) {}
};

template <class T, int kMine>
__global__ void __launch_bounds__(128) simt_product_kernel(StridedProduct p) {
  using Shared = SimtTile<T, kMine>;
  constexpr int kThreads = Shared::kThreads, kRows = Shared::kRows, kCols = Shared::kCols,
                kDepth = Shared::kDepth;
  constexpr int kA = kRows * kDepth / kThreads, kB = kCols * kDepth / kThreads;
  SM_DYNAMIC_SHARED(Shared, shared);
  const int thread = threadIdx.x, row = thread / 8 * kMine, col = thread % 8 * kMine;
  const Tile tile = tile_of_block<kRows, kCols>(p, 1);
  const T* const a = operand<T>(p.a, tile.batch);
  const T* const b = operand<T>(p.b, tile.batch);
  const bool a_inner = p.a.col.low == 1 && !p.tall, b_inner = p.b.col.low == 1 && !p.tall;
  const int steps = static_cast<int>(tiles_of(tile.end - tile.begin, kDepth));

  T next_a[kA], next_b[kB];
  const auto load = [&](int step) {
    const std::int64_t first = tile.begin + std::int64_t{step} * kDepth;
    SM_UNROLL
    for (int i = 0; i < kA; ++i) {
      const Element<kRows, kDepth> e(thread + i * kThreads, a_inner);
      const bool in = tile.row + e.line < p.rows && first + e.inner < tile.end;
      next_a[i] = in ? a[shared->at.a_row[e.line] + shared->at.a_inner[step % 4][e.inner]] : T{0};
    }
    SM_UNROLL
    for (int i = 0; i < kB; ++i) {
      const Element<kCols, kDepth> e(thread + i * kThreads, b_inner);
      const bool in = tile.col + e.line < p.cols && first + e.inner < tile.end;
      next_b[i] = in ? b[shared->at.b_row[e.line] + shared->at.b_inner[step % 4][e.inner]] : T{0};
    }
  };

  shared->at.start(p, tile, thread, kThreads);
  shared->at.step(p, tile, 0, thread);
  shared->at.step(p, tile, 1, thread);
  __syncthreads();
  if (steps > 0) load(0);
  T sum[kMine][kMine] = {};
  for (int step = 0; step < steps; ++step) {
    __syncthreads();
    SM_UNROLL
    for (int i = 0; i < kA; ++i) {
      const Element<kRows, kDepth> e(thread + i * kThreads, a_inner);
      shared->a[e.inner][e.line] = next_a[i];
    }
    SM_UNROLL
    for (int i = 0; i < kB; ++i) {
      const Element<kCols, kDepth> e(thread + i * kThreads, b_inner);
      shared->b[e.inner][e.line] = next_b[i];
    }
    if (step + 2 < steps) shared->at.step(p, tile, step + 2, thread);
    __syncthreads();
    if (step + 1 < steps) load(step + 1);
    SM_UNROLL
    for (int k = 0; k < kDepth; ++k) {
      T left[kMine], right[kMine];
      SM_UNROLL
      for (int i = 0; i < kMine; ++i) left[i] = shared->a[k][row + i];
      SM_UNROLL
      for (int j = 0; j < kMine; ++j) right[j] = shared->b[k][col + j];
      SM_UNROLL
      for (int i = 0; i < kMine; ++i) {
        SM_UNROLL
        for (int j = 0; j < kMine; ++j) sum[i][j] += left[i] * right[j];
      }
    }
  }
  __syncthreads();
  shared->at.finish(p, tile, thread, kThreads);
  __syncthreads();

  T* const part = p.splits == 1 ? nullptr
                                : static_cast<T*>(p.partial) +
                                      (tile.split * p.batches + tile.batch) * p.rows * p.cols;
  const std::int64_t origin = p.c.batch.at(0, tile.batch);
  SM_UNROLL
  for (int j = 0; j < kMine; ++j) {
    const std::int64_t c = tile.col + col + j;
    if (c >= p.cols) break;
    const std::int64_t at = origin + shared->at.b_row[col + j];
    const T bias = p.bias != nullptr ? static_cast<const T*>(p.bias)[at] : T{0};
    SM_UNROLL
    for (int i = 0; i < kMine; ++i) {
      const std::int64_t r = tile.row + row + i;
      if (r >= p.rows) break;
      if (part != nullptr)
        part[r * p.cols + c] = sum[i][j];
      else
        static_cast<T*>(const_cast<void*>(p.c.data))[at + shared->at.a_row[row + i]] =
            activated(sum[i][j] + bias, p.activation);
    }
  }
}

template <class T>
void multiply_simt(const Context& context, const StridedProduct& p) {
  constexpr int kMine = sizeof(T) == 8 ? 4 : 8;  // 64 registers of sums
  using Shared = SimtTile<T, kMine>;
  SM_LAUNCH((simt_product_kernel<T, kMine>), (grid_of<Shared::kRows, Shared::kCols>(p, 1)),
            Shared::kThreads, sizeof(Shared), context.stream, p);
}

}  // namespace structmat::cuda
