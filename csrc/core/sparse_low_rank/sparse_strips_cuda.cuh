// SPDX-License-Identifier: Apache-2.0
// x S^T for joined_kernel where strips of 16 rows of S have the same columns (16-bit types). A warp
// takes a strip and up to 128 tokens: its k columns of x, gathered, times the strip's k x 16 values
// are a dense product for tensor cores. It reads x token by token side by side, x^T, so that a
// column is a run of packs, and values as lanes hold them; another launch puts both in order.
//
// For n = m = 4096, 4096 tokens and 3 %, H200: 4.1 GFLOP, 7 us of mma.sync; x to x^T 67 MB, 14 us
// of memory; a column is fetched by each strip that has it, 258 MB, 47 us between L2 cache and
// multiprocessors (5.5 TB/s, a guess), 9 us through shared memory. A dense product takes 139 us.
#pragma once
#include "sparse_low_rank/sparse_joined_cuda.cuh"

namespace structmat::sparse_low_rank {

// A pattern whose rows come in strips: in groups of 16, or one by one, where those of a strip have
// the same columns all the same (the transpose of blocks).
struct Strips {
  SparsePatternView pattern;
  const void* values = nullptr;
  const std::int32_t* permutation = nullptr;  // value e is values[permutation[e]]; or none

  std::int64_t count() const { return ceil_div(pattern.rows, kStrip); }
};

struct Strip {
  std::int64_t starts, first;  // in pattern.starts; entry of the strip's first row
  std::int64_t values;         // where its values begin; row by row, `count` of a row
  std::int64_t step;           // where its steps of 16 columns begin: see StripSpace
  int count;

  // No more steps than `space` has, whatever the index says.
  __device__ Strip(const SparsePatternView& pattern, std::int64_t strip, const StripSpace& space) {
    const std::int64_t slabs = pattern.slabs();
    starts = strip * (kStrip / pattern.group) * slabs;
    first = pattern.starts[starts];
    count = static_cast<int>(pattern.starts[starts + slabs] - first);
    values = pattern.group * first;
    step = values / (kStrip * kStrip) + strip;
    const std::int64_t room = (space.steps - step) * kStrip;
    if (count > room) count = static_cast<int>(room > 0 ? room : 0);
  }
  __device__ int steps() const { return static_cast<int>(ceil_div(count, kStrip)); }
};

// Whether `numbers` 16-bit numbers of a row are one access, wherever a multiple of them begins.
template <class View>
bool rows_pack(const View& a, std::int64_t numbers = cuda::kPack) {
  return reinterpret_cast<std::uintptr_t>(a.data) % (2 * numbers) == 0 &&
         a.row_stride % numbers == 0;
}

constexpr int kTurn = 64, kTurnThreads = 256;

// Of `turn`.
constexpr std::int64_t turn_tiles(std::int64_t cols, std::int64_t stride) {
  return ceil_div(cols, kTurn) * ceil_div(stride, kTurn);
}

// x^T (n, T), rows of whole packs with zeros behind T. A tile of a block.
template <class T>
__device__ void turn(const ConstMatrixView& x, bool x_packs, T* turned, std::int64_t stride,
                     std::int64_t tile, T (&shared)[kTurn][kTurn + 1]) {
  constexpr int kPack = cuda::kPack, kPacks = kTurn / kPack;
  struct alignas(16) Pack {
    T value[kPack];
  };
  const std::int64_t down = ceil_div(x.cols, kTurn);
  const std::int64_t col0 = tile % down * kTurn, token0 = tile / down * kTurn;
  const T* const from = static_cast<const T*>(x.data);
  SM_ROLLED
  for (int i = threadIdx.x; i < kTurn * kPacks; i += kTurnThreads) {
    const int line = i / kPacks, at = i % kPacks * kPack;
    const std::int64_t token = token0 + line, left = x.cols - col0 - at;
    const T* const place = from + token * x.row_stride + col0 + at;
    Pack pack{};
    if (token < x.rows && x_packs && left >= kPack) {
      pack = *reinterpret_cast<const Pack*>(place);
    } else if (token < x.rows) {
      SM_UNROLL
      for (int e = 0; e < kPack; ++e)
        if (e < left) pack.value[e] = place[e];
    }
    SM_UNROLL
    for (int e = 0; e < kPack; ++e) shared[line][at + e] = pack.value[e];
  }
  __syncthreads();
  SM_ROLLED
  for (int i = threadIdx.x; i < kTurn * kPacks; i += kTurnThreads) {
    const int column = i / kPacks, at = i % kPacks * kPack;
    if (col0 + column >= x.cols || token0 + at >= stride) continue;
    Pack pack;
    SM_UNROLL
    for (int e = 0; e < kPack; ++e) pack.value[e] = shared[at + e][column];
    *reinterpret_cast<Pack*>(turned + (col0 + column) * stride + token0 + at) = pack;
  }
}

// For each step of a strip the columns of its 16 entries, and the registers of B of two
// instructions (mma.h), four for each lane: values (k, row), zero where there is no entry.
template <class T>
__device__ void pack_strip(const Strips& s, std::int64_t number, const StripSpace& space) {
  std::int32_t* const columns = static_cast<std::int32_t*>(space.columns);
  uint4* const values = static_cast<uint4*>(space.values);
  const Strip strip(s.pattern, number, space);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const std::int64_t rows = s.pattern.rows - number * kStrip;
  const T* const from = static_cast<const T*>(s.values);
  const auto value = [&](int row, int entry) -> unsigned {
    if (row >= rows || entry >= strip.count) return 0;
    std::int64_t at = strip.values + std::int64_t{row} * strip.count + entry;
    if (at >= s.pattern.nnz) return 0;  // the rows have not the same columns
    if (s.permutation != nullptr) at = s.permutation[at];
    return from[at].bits;
  };
  const std::int64_t* const starts = s.pattern.starts + strip.starts;
  int slab = 0;
  SM_ROLLED
  for (int step = threadIdx.x / 32; step < strip.steps(); step += kTurnThreads / 32) {
    const int k = step * kStrip + 2 * t;
    const auto pair = [&](int row, int entry) {
      return value(row, entry) | value(row, entry + 1) << 16;
    };
    values[(strip.step + step) * 32 + lane] =
        uint4{pair(g, k), pair(g, k + 8), pair(g + 8, k), pair(g + 8, k + 8)};
    if (lane >= kStrip) continue;
    // Beyond the last entry that one again, whose product is zero.
    const int entry = step * kStrip + lane;
    const std::int64_t e = strip.first + (entry < strip.count ? entry : strip.count - 1);
    while (starts[slab + 1] <= e) ++slab;
    columns[(strip.step + step) * kStrip + lane] =
        static_cast<std::int32_t>(slab * sparse_slab_columns + s.pattern.columns[e]);
  }
}

template <class T, class Space>
__global__ void __launch_bounds__(kTurnThreads)
    prepare_strips_kernel(ConstMatrixView x, bool x_packs, std::int64_t tiles, Strips s,
                          Space space) {
  __shared__ T shared[kTurn][kTurn + 1];
  const std::int64_t block = blockIdx.x;
  if (block < tiles)
    turn<T>(x, x_packs, static_cast<T*>(space.turned), space.stride, block, shared);
  else
    pack_strip<T>(s, block - tiles, space);
}

// x^T, and values in the order of the space.
template <class T, class Space>
void prepare_strips(const Context& context, const ConstMatrixView& x, const Strips& strips,
                    const Space& space) {
  const std::int64_t tiles = turn_tiles(x.cols, space.stride), blocks = tiles + strips.count();
  STRUCTMAT_CHECK(blocks < std::int64_t{1} << 31,
                  "sparse_low_rank_linear: more than 2^31 tiles, which no launch takes");
  SM_LAUNCH((prepare_strips_kernel<T, Space>), static_cast<unsigned>(blocks), kTurnThreads, 0,
            context.stream, x, rows_pack(x), tiles, strips, space);
}

struct Gathered {
  using Large = cuda::Shape<128, 128, 1, 8>;
  using Small = cuda::Shape<64, 64, 1, 4>;
  static constexpr int kDense = 1;
  static constexpr int kStages = 3;  // steps under way

  SparsePatternView pattern;
  StripSpace space;

  template <class T, class S, cuda::Way>
  struct Stages {  // 16 columns of x of each warp
    alignas(16) T value[S::kAcross][kStages][kStrip][S::kRows + cuda::kPack];
  };

  // sum += x S^T: warps of a block do not meet.
  template <class T, class S, class Stages>
  __device__ void add(const StridedProduct&, const cuda::Tile& tile, Stages& shared,
                      cuda::WarpSums<S>& sum, int thread) const {
    static_assert(S::kDown == 1 && S::kB == 1);
    constexpr int kPack = cuda::kPack, kPacks = S::kRows / kPack, kTurns = kStrip * kPacks / 32;
    const int lane = thread % 32, matrix = lane / 8, r = lane % 8;
    const std::int64_t number = tile.col / kStrip + thread / 32;
    if (number * kStrip >= pattern.rows) return;
    const Strip strip(pattern, number, space);
    const int steps = strip.steps();
    const std::int64_t left = (space.stride - tile.row) / kPack;  // packs of tokens
    const T* const x = static_cast<const T*>(space.turned) + tile.row + lane % kPacks * kPack;
    const int bytes = lane % kPacks < left ? 16 : 0;
    const std::int32_t* const columns =
        static_cast<const std::int32_t*>(space.columns) + strip.step * kStrip + lane % kStrip;
    const uint4* const values = static_cast<const uint4*>(space.values) + strip.step * 32 + lane;
    auto& stages = shared.value[thread / 32];
    int column = steps > 0 ? columns[0] : 0;
    const auto load = [&](int step) {
      if (step < steps) {
        auto& stage = stages[step % kStages];
        SM_UNROLL
        for (int i = 0; i < kTurns; ++i) {
          const int line = lane / kPacks + i * (32 / kPacks);
          const std::int64_t c = __shfl_sync(~0u, column, line);
          cuda::copy<16>(&stage[line][lane % kPacks * kPack], bytes > 0 ? x + c * space.stride : x,
                         bytes);
        }
        if (step + 1 < steps) column = columns[(step + 1) * kStrip];
      }
      cuda::copy_commit();
    };
    SM_ROLLED
    for (int s = 0; s < kStages - 1; ++s) load(s);
    uint4 ahead = steps > 0 ? values[0] : uint4{0, 0, 0, 0};
    SM_ROLLED
    for (int step = 0; step < steps; ++step) {
      cuda::copy_wait<kStages - 2>();
      __syncwarp();
      load(step + kStages - 1);
      const uint4 right = ahead;
      if (step + 1 < steps) ahead = values[(step + 1) * 32];
      const auto& stage = stages[step % kStages];
      SM_UNROLL
      for (int i = 0; i < S::kA; ++i) {
        unsigned a[4];
        cuda::load_matrices<true>(a, &stage[matrix / 2 * 8 + r][i * 16 + matrix % 2 * 8]);
        cuda::multiply_16x8x16<T>(sum[i][0], a, right.x, right.y);
        cuda::multiply_16x8x16<T>(sum[i][1], a, right.z, right.w);
      }
    }
    cuda::copy_wait<0>();
  }
};

// y = h u^T + x S^T + bias. `transposed`: u is given as its transpose.
template <class T>
void multiply_strips(const Context& context, const SparseProduct& p, const Strips& strips,
                     const ConstMatrixView& h, const ConstMatrixView& u, bool transposed,
                     const StripSpace& space) {
  if (p.y.rows == 0 || p.y.cols == 0) return;
  prepare_strips<T>(context, p.x, strips, space);
  multiply_joined<T>(context, p, h, u, {}, transposed, Gathered{strips.pattern, space});
}

}  // namespace structmat::sparse_low_rank
