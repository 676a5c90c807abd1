// SPDX-License-Identifier: Apache-2.0
// dx = dy S + dh V where strips of 16 rows of S have the same columns (16-bit types). A strip's
// rows are the terms of the sum here: 16 numbers of dy times the 16 values of an entry, computed by
// tensor cores for 16 entries and 32 tokens, are added where the entry's column of dx lies. A warp
// keeps the sums of 32 tokens and up to 448 columns in shared memory and goes through the strips in
// order: no two threads add to the same number at once, and the same inputs give the same bits.
//
// For n = m = 4096, 4096 tokens and 3 %, H200: 4.1 GFLOP, with entries filled up to 16 10 us of
// mma.sync; 129 M sums, each read and written in shared memory, 35 us; dy (1 KB for each warp and
// strip) and values through the first-level cache on the same path, 16 us; both from L2 cache,
// which warps of a block share, 236 MB, 43 us (5.5 TB/s, a guess) beside these. Some 180
// instructions a step of one warp for each scheduler, 71 us, decide. dh V (r = 128) is 11 us, all
// else 14 us. A dense product takes 139 us, writing its W 15 us.
#pragma once
#include "sparse_low_rank/sparse_strips_cuda.cuh"

namespace structmat::sparse_low_rank {

struct SpreadProduct {
  ConstMatrixView dy, dh;  // (T, m), (T, r)
  MatrixView dx;           // (T, n)
  SpreadSpace space;
  bool dy_packs = false, dh_packs = false, dx_packs = false;
};

// A column's 32 tokens fill all banks of shared memory. Four begin at byte 64 h + 16 (t ^ column /
// 8 % 4) of it: tokens 16 h + 4t to 16 h + 4t + 3. Here for h = t = 0.
__device__ constexpr int spread_place(int column) {
  return column * static_cast<int>(kSpreadTokens) * 4 + column / 8 % 4 * 16;
}

// Entry by entry the values of its 16 rows, zero beyond the last row, and the place of its column
// in the sums of its piece; where the entries of each piece begin and end.
template <class T>
__device__ void pack_strip(const Strips& s, std::int64_t number, const SpreadSpace& space) {
  struct alignas(16) Entry {
    T value[kStrip];
  };
  const SparsePatternView& p = s.pattern;
  const std::int64_t slabs = p.slabs(), rows = p.rows - number * kStrip;
  const std::int64_t* const starts = p.starts + number * slabs;
  const std::int64_t first = starts[0], count = starts[slabs] - first;
  const T* const from = static_cast<const T*>(s.values) + kStrip * first;
  std::int64_t slab = 0;
  SM_ROLLED
  for (std::int64_t e = threadIdx.x; e < count; e += kTurnThreads) {
    Entry entry{};
    SM_UNROLL
    for (int row = 0; row < kStrip; ++row)
      if (row < rows) entry.value[row] = from[row * count + e];
    static_cast<Entry*>(space.values)[first + e] = entry;
    while (starts[slab + 1] <= first + e) ++slab;
    const std::int64_t column = slab * sparse_slab_columns + p.columns[first + e];
    static_cast<std::uint16_t*>(space.places)[first + e] =
        static_cast<std::uint16_t>(spread_place(static_cast<int>(column % space.width)));
  }
  const auto entry_from = [&](std::int64_t column) {
    if (column >= p.cols) return static_cast<unsigned>(starts[slabs]);
    const std::int64_t* const ends = starts + column / sparse_slab_columns;
    return static_cast<unsigned>(first_entry_from(p.columns, static_cast<int>(ends[0]),
                                                  static_cast<int>(ends[1]),
                                                  static_cast<int>(column % sparse_slab_columns)));
  };
  SM_ROLLED
  for (std::int64_t i = threadIdx.x; i < space.pieces; i += kTurnThreads)
    static_cast<uint2*>(space.bounds)[i * space.strips + number] =
        uint2{entry_from(i * space.width), entry_from((i + 1) * space.width)};
}

// Rows of 32 tokens as B of four instructions (mma.h), whose terms are taken in another order: of
// 16 lane (g, t) holds 4t to 4t + 3. Column g of instruction j is the token 16 (j / 2) + 4 (g / 2)
// + 2 (j % 2) + g % 2, so that lane (g, t) has sums of tokens 4t to 4t + 3 of both halves in C.
template <class T>
class TokenRows {
 public:
  __device__ TokenRows(const ConstMatrixView& x, std::int64_t token0, bool packs, int lane)
      : row_(static_cast<const T*>(x.data) + (token0 + lane / 8 * 4 + lane / 4 % 2) * x.row_stride +
             lane % 4 * 4),
        stride_(x.row_stride),
        terms_(x.cols - lane % 4 * 4),
        whole_(packs ? static_cast<int>(x.cols / kStrip) : 0) {}

  // Step `step` of 16 terms, zero beyond the last.
  __device__ void load(uint2 (&out)[4], int step) const {
    const T* const row = row_ + std::int64_t{step} * kStrip;
    const std::int64_t left = terms_ - std::int64_t{step} * kStrip;
    const auto token = [&](int j) { return row + (j / 2 * 16 + j % 2 * 2) * stride_; };
    if (step < whole_) {
      SM_UNROLL
      for (int j = 0; j < 4; ++j) out[j] = *reinterpret_cast<const uint2*>(token(j));
      return;
    }
    SM_UNROLL
    for (int j = 0; j < 4; ++j) {
      unsigned number[4];
      SM_UNROLL
      for (int e = 0; e < 4; ++e) number[e] = e < left ? token(j)[e].bits : 0;
      out[j] = uint2{number[0] | number[1] << 16, number[2] | number[3] << 16};
    }
  }

 private:
  const T* row_;
  std::int64_t stride_, terms_;
  int whole_;
};

// The sums of a warp, as a lane adds to them: C of four instructions at the places of entries g and
// g + 8, which differ within the warp; nowhere where a place is negative. Eight lanes access shared
// memory together, those of two columns: they take opposite halves and never the same banks.
class SpreadSums {
 public:
  __device__ SpreadSums(unsigned char* of_warp, int lane)
      : at_(of_warp), mine_(lane % 4 * 16 + lane / 4 % 2 * 64), odd_(lane / 4 % 2 != 0) {}

  __device__ void fetch(float4 (&old)[2][2], const int (&place)[2]) const {
    SM_UNROLL
    for (int i = 0; i < 2; ++i)
      if (place[i] >= 0) old[i][0] = *pack(place[i], 0), old[i][1] = *pack(place[i], 1);
  }
  __device__ void add(const float4 (&old)[2][2], const float (&sum)[4][4], const int (&place)[2]) {
    SM_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (place[i] < 0) continue;
      SM_UNROLL
      for (int h = 0; h < 2; ++h) {
        const auto mine = [&](int j, int e) {
          const float low = sum[j][2 * i + e], high = sum[2 + j][2 * i + e];
          return odd_ != (h != 0) ? high : low;
        };
        const float4& to = old[i][h];
        *pack(place[i], h) =
            float4{to.x + mine(0, 0), to.y + mine(0, 1), to.z + mine(1, 0), to.w + mine(1, 1)};
      }
    }
    __syncwarp();
  }

 private:
  __device__ float4* pack(int place, int other) const {
    return reinterpret_cast<float4*>(at_ + (place ^ mine_ ^ other * 64));
  }

  unsigned char* at_;
  int mine_;
  bool odd_;
};

// sum += values of entries g and g + 8 times rows of tokens
template <class T>
__device__ void multiply_entries(float (&sum)[4][4], const uint2 (&left)[2],
                                 const uint2 (&right)[4]) {
  const unsigned a[4] = {left[0].x, left[1].x, left[0].y, left[1].y};
  SM_UNROLL
  for (int j = 0; j < 4; ++j) cuda::multiply_16x8x16<T>(sum[j], a, right[j].x, right[j].y);
}

// Goes through the entries of a piece strip by strip, 16 at a time at most.
struct SpreadCursor {
  const uint2* bounds;  // of the piece
  int strips, strip = -1, entry = 0, end = 0;
  uint2 mine{0, 0}, ahead{0, 0};  // of this lane's strip in these 32, and in the next

  __device__ SpreadCursor(const SpreadSpace& space, std::int64_t piece, int lane)
      : bounds(static_cast<const uint2*>(space.bounds) + piece * space.strips + lane),
        strips(static_cast<int>(space.strips)) {
    if (lane < strips) ahead = bounds[0];
  }
  // Leaves entry >= end where there are no more.
  __device__ void next(int lane) {
    entry += kStrip;
    while (entry >= end && ++strip < strips) {
      const int of = strip & 31;
      if (of == 0) {
        mine = ahead;
        if (strip + 32 + lane < strips) ahead = bounds[strip + 32];
      }
      entry = static_cast<int>(__shfl_sync(~0u, mine.x, of));
      end = static_cast<int>(__shfl_sync(~0u, mine.y, of));
    }
  }
};

// What a step needs, on its way from memory.
struct SpreadStep {
  int count;
  unsigned place[2];
  uint2 left[2], right[4];
};

// Warps of a block do not meet. The last tokens are 32 too: some are computed twice, stored once.
template <class T>
__global__ void __launch_bounds__(kSpreadWarps * 32, 1) spread_strips_kernel(SpreadProduct p) {
  constexpr int kAhead = 2, kTerms = 8, kPack = cuda::kPack;
  SM_DYNAMIC_SHARED(float4, of_block);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const SpreadSpace& space = p.space;
  const auto blocks = static_cast<unsigned>(ceil_div(space.pieces, kSpreadAcross));
  const std::int64_t piece = blockIdx.x % blocks * kSpreadAcross + warp % kSpreadAcross;
  const std::int64_t group =
      blockIdx.x / blocks * (kSpreadWarps / kSpreadAcross) + warp / kSpreadAcross;
  const std::int64_t column0 = piece * space.width;
  std::int64_t token0 = group * kSpreadTokens;
  if (piece >= space.pieces || token0 >= p.dx.rows) return;
  if (token0 > p.dx.rows - kSpreadTokens) token0 = p.dx.rows - kSpreadTokens;
  const int width =
      static_cast<int>(p.dx.cols - column0 < space.width ? p.dx.cols - column0 : space.width);
  const int packs = static_cast<int>(space.width * kSpreadTokens / 4);
  float4* const of_warp = of_block + warp * packs;
  SM_ROLLED
  for (int i = lane; i < packs; i += 32) of_warp[i] = float4{0, 0, 0, 0};
  __syncwarp();
  SpreadSums sums(reinterpret_cast<unsigned char*>(of_warp), lane);

  // dh V
  const int terms = static_cast<int>(space.stride / kStrip);
  const uint2* const v = static_cast<const uint2*>(space.turned) + column0 * terms * 4 + t;
  SM_ROLLED
  for (int term = 0; term < terms; term += kTerms) {
    const TokenRows<T> dh(p.dh, token0, p.dh_packs, lane);
    uint2 right[kTerms][4] = {}, left[2][kTerms][2];
    const auto fetch = [&](uint2(&to)[kTerms][2], int column) {
      SM_UNROLL
      for (int k = 0; k < kTerms; ++k) {
        SM_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int c = column + g + 8 * i;
          to[k][i] = uint2{0, 0};
          if (c < width && term + k < terms) to[k][i] = v[(std::int64_t{c} * terms + term + k) * 4];
        }
      }
    };
    SM_UNROLL
    for (int k = 0; k < kTerms; ++k)
      if (term + k < terms) dh.load(right[k], term + k);
    fetch(left[0], 0);
    SM_ROLLED
    for (int column = 0; column < width; column += 32) {
      SM_UNROLL
      for (int b = 0; b < 2; ++b) {
        const int c = column + 16 * b;
        const int place[2] = {c + g < width ? spread_place(c + g) : -1,
                              c + g + 8 < width ? spread_place(c + g + 8) : -1};
        float sum[4][4] = {};
        float4 old[2][2] = {};
        fetch(left[1 - b], c + 16);
        sums.fetch(old, place);
        SM_UNROLL
        for (int k = 0; k < kTerms; ++k) multiply_entries<T>(sum, left[b][k], right[k]);
        sums.add(old, sum, place);
      }
    }
  }

  // dy S
  const TokenRows<T> dy(p.dy, token0, p.dy_packs, lane);
  const uint2* const values = static_cast<const uint2*>(space.values) + t;
  const std::uint16_t* const places = static_cast<const std::uint16_t*>(space.places);
  SpreadCursor cursor(space, piece, lane);
  SpreadStep steps[kAhead + 1];
  const auto load = [&](SpreadStep& step) {
    cursor.next(lane);
    step.count = cursor.end - cursor.entry;
    if (step.count <= 0) return;
    dy.load(step.right, cursor.strip);
    SM_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int entry = cursor.entry + g + 8 * i;
      step.place[i] = 0, step.left[i] = uint2{0, 0};
      if (entry >= cursor.end) continue;
      step.place[i] = places[entry];
      step.left[i] = values[std::int64_t{entry} * 4];
    }
  };
  SM_UNROLL
  for (int s = 0; s < kAhead; ++s) load(steps[s]);
  for (bool more = true; more;) {
    SM_UNROLL
    for (int s = 0; s <= kAhead; ++s) {
      const SpreadStep& now = steps[s];
      if (now.count <= 0) {
        more = false;
        break;
      }
      const int place[2] = {g < now.count ? static_cast<int>(now.place[0]) : -1,
                            g + 8 < now.count ? static_cast<int>(now.place[1]) : -1};
      float sum[4][4] = {};
      float4 old[2][2] = {};
      sums.fetch(old, place);
      multiply_entries<T>(sum, now.left, now.right);
      load(steps[(s + kAhead) % (kAhead + 1)]);  // while these are on their way
      sums.add(old, sum, place);
    }
  }

  // A lane stores eight columns of a token: four lanes 64 bytes, and no two read the same bank.
  struct alignas(16) Pack {
    T value[kPack];
  };
  const int half = lane / 16, at = g % 4;
  SM_ROLLED
  for (int c = t * kPack; c < width; c += 4 * kPack) {
    SM_UNROLL
    for (int i = 0; i < 4; ++i) {
      const std::int64_t token = token0 + half * 16 + i * 4 + at;
      if (token < group * kSpreadTokens) continue;
      T* const to = static_cast<T*>(p.dx.data) + token * p.dx.row_stride + column0 + c;
      Pack pack{};
      SM_UNROLL
      for (int e = 0; e < kPack; ++e)
        if (c + e < width)
          pack.value[e] = cuda::rounded<T>(reinterpret_cast<const float*>(
              of_warp)[(spread_place(c + e) ^ half * 64 ^ i * 16) / 4 + at]);
      if (p.dx_packs && c + kPack <= width) {
        *reinterpret_cast<Pack*>(to) = pack;
      } else {
        SM_UNROLL
        for (int e = 0; e < kPack; ++e)
          if (c + e < width) to[e] = pack.value[e];
      }
    }
  }
}

// dx = dy S + dh v
template <class T>
void spread_strips(const Context& context, const ConstMatrixView& dy, const Strips& strips,
                   const ConstMatrixView& dh, const ConstMatrixView& v, const SpreadSpace& space,
                   const MatrixView& dx) {
  if (dx.rows == 0 || dx.cols == 0) return;
  prepare_strips<T>(context, v, strips, space);
  SpreadProduct p;
  p.dy = dy, p.dh = dh, p.dx = dx, p.space = space;
  p.dy_packs = rows_pack(dy, 4), p.dh_packs = rows_pack(dh, 4), p.dx_packs = rows_pack(dx);
  const std::int64_t blocks = ceil_div(dx.rows, kSpreadWarps / kSpreadAcross * kSpreadTokens) *
                              ceil_div(space.pieces, kSpreadAcross);
  STRUCTMAT_CHECK(blocks < std::int64_t{1} << 31,
                  "sparse_low_rank_linear: more than 2^31 tiles, which no launch takes");
  SM_ALLOW_SHARED((spread_strips_kernel<T>));
  SM_LAUNCH(spread_strips_kernel<T>, static_cast<unsigned>(blocks), kSpreadWarps * 32,
            static_cast<std::size_t>(kSpreadWarps * space.width * kSpreadTokens * 4),
            context.stream, p);
}

}  // namespace structmat::sparse_low_rank
