// SPDX-License-Identifier: Apache-2.0
// x S^T for joined_kernel where S is any support: a tile of S is zeros in shared memory with its
// few entries written over them. S is read once per tile of tokens in its own few bytes; nothing
// but y is written.
#pragma once
#include "sparse_low_rank/sparse_joined_cuda.cuh"

namespace structmat::sparse_low_rank {

// Four lanes follow a row of S from step to step, each row of a thread kThreads / 4 below the last.
template <class T, int kRows, int kThreads>
class RowCursors {
 public:
  static constexpr int kOfThread = kRows * 4 / kThreads;
  static_assert(kOfThread * kThreads == kRows * 4);

  __device__ RowCursors(const SparsePatternView& pattern, const T* values, std::int64_t row0,
                        int thread)
      : columns_(pattern.columns), values_(values), row_(thread / 4), lane_(thread % 4) {
    SM_UNROLL
    for (int q = 0; q < kOfThread; ++q) {
      const std::int64_t row = row0 + row_ + q * (kThreads / 4);
      if (row >= pattern.rows) continue;
      const RowOfPattern where(pattern, row);
      slab_[q] = pattern.starts + where.starts;
      shift_[q] = where.shift;
    }
  }

  // Writes the entries of the kDepth columns from `column` on to a panel of zeros, and asks for
  // those of the next step.
  template <class Panel>
  __device__ void scatter(Panel& panel, std::int64_t column) {
    const int begin = static_cast<int>(column % sparse_slab_columns);
    if (begin == 0) {
      SM_UNROLL
      for (int q = 0; q < kOfThread; ++q) {
        if (slab_[q] != nullptr) {
          next_[q] = static_cast<int>(slab_[q][0]), end_[q] = static_cast<int>(slab_[q][1]);
          ++slab_[q];
        }
        fetch(q);
      }
    }
    SM_UNROLL
    for (int q = 0; q < kOfThread; ++q) {
      for (bool more = true; more;) {
        const bool inside = column_[q] - begin < cuda::kDepth;  // as columns ascend
        if (inside) *panel.at(row_ + q * (kThreads / 4), column_[q] - begin) = value_[q];
        const unsigned all = __ballot_sync(~0u, inside);
        const int count = __popc(all >> (threadIdx.x % 32 & ~3u) & 15u);
        next_[q] += count;
        if (count > 0) fetch(q);
        more = __any_sync(~0u, count == 4) != 0;
      }
    }
  }

 private:
  __device__ void fetch(int q) {
    const int entry = next_[q] + lane_;
    column_[q] = 2 * static_cast<int>(sparse_slab_columns);  // beyond any step
    if (entry >= end_[q]) return;
    column_[q] = columns_[entry];
    value_[q] = values_[entry + shift_[q]];
  }

  const std::uint16_t* columns_;
  const T* values_;
  int row_, lane_;
  const std::int64_t* slab_[kOfThread] = {};
  int next_[kOfThread] = {}, end_[kOfThread] = {}, shift_[kOfThread] = {}, column_[kOfThread] = {};
  T value_[kOfThread] = {};
};

struct Scattered {
  using Large = cuda::Shape<128, 128, 2, 4>;
  using Small = cuda::Shape<64, 64, 2, 2>;
  static constexpr int kDense = 2;

  SparsePatternView pattern;
  const void* values = nullptr;

  template <class T, class S, cuda::Way kWay>
  struct Stages {
    cuda::Addresses<S::kRows, S::kCols, cuda::kDepth> at;
    struct Stage {
      alignas(16) cuda::Panel<T, S::kRows, kWay, false> x;
      alignas(16) cuda::Panel<T, S::kCols, cuda::Way::columns, false> s;
    };
    Stage stage[cuda::kStages];
  };

  // sum += x S^T over the tile. One meeting a step: while panels k are multiplied, entries of step
  // k + 1 go to a panel that was cleared during step k - 1, and that of step k - 1 is cleared.
  template <class T, class S, class Stages>
  __device__ void add(const StridedProduct& p, const cuda::Tile& tile, Stages& shared,
                      cuda::WarpSums<S>& sum, int thread) const {
    using cuda::kDepth;
    using cuda::kStages;
    constexpr int kThreads = S::kThreads;
    static_assert(kStages == 3);
    const int lane = thread % 32, warp = thread / 32;
    const int row = warp / S::kAcross * S::kA * 16, col = warp % S::kAcross * S::kB * 16;
    const int steps = static_cast<int>(ceil_div(tile.inner, kDepth));
    const T* const x = cuda::operand<T>(p.a, 0);
    RowCursors<T, S::kCols, kThreads> cursors(pattern, static_cast<const T*>(values), tile.col,
                                              thread);
    const auto clear = [&](int step) {
      auto* const packs = reinterpret_cast<uint4*>(&shared.stage[step % kStages].s);
      constexpr int kCount = sizeof(shared.stage[0].s) / sizeof(uint4);
      SM_ROLLED
      for (int i = thread; i < kCount; i += kThreads) packs[i] = uint4{0, 0, 0, 0};
    };
    const auto load = [&](int step) {
      if (step < steps) {
        const std::int64_t left = tile.inner - std::int64_t{step} * kDepth;
        shared.stage[step % kStages].x.template load<kThreads>(
            x, shared.at.a_row, shared.at.a_inner[step % 4], tile.height,
            left < kDepth ? static_cast<int>(left) : kDepth, thread);
      }
      cuda::copy_commit();
    };
    shared.at.start(p, tile, thread, kThreads);
    SM_ROLLED
    for (int s = 0; s < kStages; ++s) shared.at.step(p, tile, s, thread);
    clear(0);
    clear(1);
    __syncthreads();
    SM_ROLLED
    for (int s = 0; s < kStages - 1; ++s) load(s);
    cursors.scatter(shared.stage[0].s, 0);
    SM_ROLLED
    for (int step = 0; step < steps; ++step) {
      cuda::copy_wait<kStages - 2>();
      __syncthreads();
      load(step + kStages - 1);
      shared.at.step(p, tile, step + kStages, thread);
      clear(step + 2);
      if (step + 1 < steps)
        cursors.scatter(shared.stage[(step + 1) % kStages].s, std::int64_t{step + 1} * kDepth);
      auto& now = shared.stage[step % kStages];
      cuda::multiply_panels<T, S>(now.x, now.s, sum, row, col, lane);
    }
    cuda::copy_wait<0>();
  }
};

// y = h u^T + x base^T + x S^T + bias. `transposed`: u and base are given as their transposes.
template <class T>
void multiply_scattered(const Context& context, const SparseProduct& s, const ConstMatrixView& h,
                        const ConstMatrixView& u, const ConstMatrixView& base, bool transposed) {
  multiply_joined<T>(context, s, h, u, base, transposed, Scattered{s.pattern, s.values});
}

}  // namespace structmat::sparse_low_rank
