// SPDX-License-Identifier: Apache-2.0
// Both products of a Monarch matrix in one launch, for 16-bit types: h stays in shared memory. A
// block takes some tokens and some output blocks; each number of the weights goes from global
// memory straight to the registers of the one or two warps that multiply it.
#pragma once
#include "cuda/activate.h"
#include "cuda/mma.h"
#include "cuda/strided_product.h"
#include "monarch/monarch_plan.h"
#include "structmat/error.h"

namespace structmat::monarch {

struct FusedArgs {
  cuda::StridedProduct first, second;  // h = x W1^T, y = h W2^T, of which h has no memory
  std::int64_t R;
  std::int64_t groups;  // of output blocks
  FusedTile tile;
  bool y_packs;
};

// Sixteen bytes of a row of A or B: the terms 8 t to 8 t + 7 of a chunk of 32. As any order of
// terms gives the same sum, they serve as columns 2t, 2t + 1, 2t + 8 and 2t + 9 of two
// instructions.
struct alignas(16) Terms {
  unsigned pair[4];

  // Takes out the first number and puts `bits` behind the last.
  __device__ unsigned shift(unsigned bits) {
    const unsigned out = pair[0] & 0xffffu;
    SM_UNROLL
    for (int i = 0; i < 4; ++i) pair[i] = pair[i] >> 16 | (i < 3 ? pair[i + 1] : bits) << 16;
    return out;
  }
};

// Terms first to first + 7 of a row of x, W1 or W2, `stride` apart; zero from `inner` on. Where
// they do not come as a pack, all are on their way before the first is waited for.
template <class T, bool kPacks>
__device__ Terms load_terms(const T* row, std::int64_t stride, std::int64_t first,
                            std::int64_t inner, bool in) {
  Terms terms = {};
  if (!in || first >= inner) return terms;
  if (kPacks && first + 8 <= inner) return *reinterpret_cast<const Terms*>(row + first);
  const T* const from = row + first * stride;
  const int count = inner - first < 8 ? static_cast<int>(inner - first) : 8;
  unsigned bits[8];
  SM_UNROLL
  for (int i = 0; i < 8; ++i) bits[i] = i < count ? from[i * stride].bits : 0u;
  SM_UNROLL
  for (int i = 0; i < 4; ++i) terms.pair[i] = bits[2 * i] | bits[2 * i + 1] << 16;
  return terms;
}

// sum += A B^T over a chunk: A has kM times 16 lines (those of lane / 4 and 8 below), B 4 times 8.
template <class T, int kM>
__device__ void multiply_chunk(float (&sum)[kM][4][4], const Terms (&a)[kM][2],
                               const Terms (&b)[4]) {
  SM_UNROLL
  for (int half = 0; half < 2; ++half) {
    SM_UNROLL
    for (int m = 0; m < kM; ++m) {
      const unsigned left[4] = {a[m][0].pair[2 * half], a[m][1].pair[2 * half],
                                a[m][0].pair[2 * half + 1], a[m][1].pair[2 * half + 1]};
      SM_UNROLL
      for (int n = 0; n < 4; ++n)
        cuda::multiply_16x8x16<T>(sum[m][n], left, b[n].pair[2 * half], b[n].pair[2 * half + 1]);
    }
  }
}

// In a loop that stays one, whose turns find the next numbers in the same registers: 32 copies of
// erfc would be 10,000 instructions.
template <int kM>
__device__ void activate(float (&sum)[kM][4][4], Activation activation) {
  SM_ROLLED
  for (int turn = 0; turn < 16 * kM; ++turn) {
    const float done = cuda::activated(sum[0][0][0], activation);
    SM_UNROLL
    for (int i = 0; i < 16 * kM - 1; ++i)
      sum[i / 16][i / 4 % 4][i % 4] = sum[(i + 1) / 16][(i + 1) / 4 % 4][(i + 1) % 4];
    sum[kM - 1][3][3] = done;
  }
}

template <class T>
__device__ unsigned pair_of(float low, float high) {
  return from_float<T>(low).bits | static_cast<unsigned>(from_float<T>(high).bits) << 16;
}

// Of the 4 x 4 matrix whose rows the lanes of a quad hold, column t to lane t.
__device__ inline Terms transposed_in_quad(const unsigned (&row)[4], int t) {
  Terms column = {};
  SM_UNROLL
  for (int step = 0; step < 4; ++step) {
    const int other = t ^ step;  // gives us its number t, gets our number `other`
    const unsigned mine = other < 2 ? (other == 0 ? row[0] : row[1]) : other == 2 ? row[2] : row[3];
    const unsigned got = __shfl_xor_sync(~0u, mine, step);
    SM_UNROLL
    for (int i = 0; i < 4; ++i)
      if (i == other) column.pair[i] = got;
  }
  return column;
}

template <class T, int kM, bool kInputPacks, bool kWeightPacks>
__global__ void __launch_bounds__(kFusedThreads) fused_kernel(FusedArgs args) {
  constexpr int kWarps = kFusedThreads / 32;
  const cuda::StridedProduct &first = args.first, &second = args.second;
  const FusedTile& tile = args.tile;
  SM_DYNAMIC_SHARED(T, h);                                                  // (tokens, pitch)
  int* const place = reinterpret_cast<int*>(h + tile.tokens * tile.pitch);  // of a column in h
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
  const std::int64_t token0 = blockIdx.x / args.groups * tile.tokens;
  const std::int64_t j0 = blockIdx.x % args.groups * tile.blocks, J = second.batches;
  const int blocks = static_cast<int>(J - j0 < tile.blocks ? J - j0 : tile.blocks);
  const int R = static_cast<int>(args.R), S = static_cast<int>(second.inner);
  const int columns = blocks * R, parts = tile.tokens / (16 * kM);

  for (int i = thread; i < columns; i += kFusedThreads) place[i] = i / R * tile.units + i % R;
  // What fills up the units of a block to a multiple of 8 meets weights of zero; NaN would stay.
  for (int i = thread; i < tile.tokens * blocks * (tile.units - S); i += kFusedThreads) {
    const int rest = tile.units - S, row = i / rest;
    h[row / blocks * tile.pitch + row % blocks * tile.units + S + i % rest] = T{};
  }
  __syncthreads();

  const int slabs = static_cast<int>(ceil_div(columns, 32));
  const int work = static_cast<int>(first.batches) * parts * slabs;
  SM_ROLLED
  for (int item = thread / 32; item < work; item += kWarps) {
    __syncwarp();
    const int slab = item % slabs * 32, part = item / slabs % parts, k = item / slabs / parts;
    const T* const x = static_cast<const T*>(first.a.data) + first.a.batch.at(0, k);
    const T* const w = static_cast<const T*>(first.b.data) + first.b.batch.at(0, k);
    const T *x_row[kM][2], *w_row[4];
    bool x_in[kM][2];
    SM_UNROLL
    for (int m = 0; m < 2 * kM; ++m) {
      const std::int64_t token = token0 + part * 16 * kM + m * 8 + g;
      x_in[m / 2][m % 2] = token < first.rows;
      x_row[m / 2][m % 2] = x + first.a.row.at(k, token);
    }
    SM_UNROLL
    for (int n = 0; n < 4; ++n) w_row[n] = w + first.b.row.at(k, j0 * R + slab + n * 8 + g);
    float sum[kM][4][4] = {};
    SM_ROLLED
    for (std::int64_t chunk = t * 8; chunk < first.inner + t * 8; chunk += 32) {
      Terms a[kM][2], b[4];
      SM_UNROLL
      for (int n = 0; n < 4; ++n)
        b[n] = load_terms<T, kWeightPacks>(w_row[n], first.b.col.low, chunk, first.inner,
                                           slab + n * 8 + g < columns);
      SM_UNROLL
      for (int m = 0; m < 2 * kM; ++m)
        a[m / 2][m % 2] = load_terms<T, kInputPacks>(x_row[m / 2][m % 2], first.a.col.low, chunk,
                                                     first.inner, x_in[m / 2][m % 2]);
      multiply_chunk<T, kM>(sum, a, b);
    }
    SM_UNROLL
    for (int n = 0; n < 4; ++n) {
      const int column = slab + n * 8 + 2 * t;
      if (column >= columns) continue;
      SM_UNROLL
      for (int m = 0; m < 2 * kM; ++m) {
        T* const row = h + (part * 16 * kM + m * 8 + g) * tile.pitch + k * R;
        const float* const value = sum[m / 2][n] + m % 2 * 2;
        if (R % 2 == 0) {  // both lie side by side
          *reinterpret_cast<unsigned*>(row + place[column]) = pair_of<T>(value[0], value[1]);
        } else {
          row[place[column]] = from_float<T>(value[0]);
          if (column + 1 < columns) row[place[column + 1]] = from_float<T>(value[1]);
        }
      }
    }
  }
  __syncthreads();

  const int slabs_out = static_cast<int>(ceil_div(second.cols, 32));
  const int work_out = blocks * parts * slabs_out;
  SM_ROLLED
  for (int item = thread / 32; item < work_out; item += kWarps) {
    __syncwarp();
    const int slab = item % slabs_out * 32, part = item / slabs_out % parts;
    const int block = item / slabs_out / parts;
    const std::int64_t j = j0 + block;
    const T* const w = static_cast<const T*>(second.b.data) + second.b.batch.at(0, j);
    const T* const h_row = h + (part * 16 * kM + g) * tile.pitch + block * tile.units;
    const T* w_row[4];
    SM_UNROLL
    for (int n = 0; n < 4; ++n) w_row[n] = w + second.b.row.at(j, slab + n * 8 + g);
    float sum[kM][4][4] = {};
    SM_ROLLED
    for (int chunk = t * 8; chunk < S + t * 8; chunk += 32) {
      Terms a[kM][2] = {}, b[4];
      SM_UNROLL
      for (int n = 0; n < 4; ++n)
        b[n] = load_terms<T, kWeightPacks>(w_row[n], second.b.col.low, chunk, S,
                                           slab + n * 8 + g < second.cols);
      if (chunk < S) {
        SM_UNROLL
        for (int m = 0; m < 2 * kM; ++m)
          a[m / 2][m % 2] = *reinterpret_cast<const Terms*>(h_row + m * 8 * tile.pitch + chunk);
      }
      multiply_chunk<T, kM>(sum, a, b);
    }
    T* const y = static_cast<T*>(const_cast<void*>(second.c.data)) + second.c.batch.at(0, j);
    const T* const bias = second.bias == nullptr
                              ? nullptr
                              : static_cast<const T*>(second.bias) + second.c.batch.at(0, j);
    SM_UNROLL
    for (int n = 0; n < 4; ++n) {
      SM_UNROLL
      for (int e = 0; e < 2; ++e) {
        const std::int64_t column = slab + n * 8 + 2 * t + e;
        const float add = bias != nullptr && column < second.cols
                              ? to_float(bias[second.c.col.at(j, column)])
                              : 0.0f;
        SM_UNROLL
        for (int m = 0; m < 2 * kM; ++m) {
          sum[m / 2][n][m % 2 * 2 + e] += add;
        }
      }
    }
    if (second.activation != Activation::none) activate<kM>(sum, second.activation);
    SM_UNROLL
    for (int m = 0; m < 2 * kM; ++m) {
      unsigned row[4];
      SM_UNROLL
      for (int n = 0; n < 4; ++n)
        row[n] = pair_of<T>(sum[m / 2][n][m % 2 * 2], sum[m / 2][n][m % 2 * 2 + 1]);
      Terms out = transposed_in_quad(row, t);
      const std::int64_t token = token0 + part * 16 * kM + m * 8 + g, column = slab + t * 8;
      if (token >= second.rows) continue;
      T* const to = y + second.c.row.at(j, token);
      if (args.y_packs && column + 8 <= second.cols) {
        *reinterpret_cast<Terms*>(to + second.c.col.at(j, column)) = out;
      } else {
        SM_ROLLED
        for (std::int64_t c = column; c < second.cols && c < column + 8; ++c)
          to[second.c.col.at(j, c)] = T{static_cast<std::uint16_t>(out.shift(0))};
      }
    }
  }
}

template <class T>
void fused(const Context& context, const FusedTile& tile, const cuda::StridedProduct& first,
           const cuda::StridedProduct& second, std::int64_t R) {
  const auto rows_pack = [](const cuda::Operand& x) {
    return cuda::packs(x.data, x.col, x.row, x.batch);
  };
  const std::int64_t groups = ceil_div(second.batches, tile.blocks);
  const FusedArgs args{first, second, R, groups, tile, rows_pack(second.c)};
  const std::int64_t blocks = groups * ceil_div(first.rows, tile.tokens);
  STRUCTMAT_CHECK(blocks < std::int64_t{1} << 31,
                  "monarch_linear: more than 2^31 tiles, which no launch takes");
  if (blocks == 0) return;
  const bool input = rows_pack(first.a), weights = rows_pack(first.b) && rows_pack(second.b);
  const auto launch = [&](auto m, auto input_packs, auto weight_packs) {
    constexpr int kM = decltype(m)::value;
    constexpr bool kInput = decltype(input_packs)::value, kWeight = decltype(weight_packs)::value;
    SM_ALLOW_SHARED((fused_kernel<T, kM, kInput, kWeight>));
    SM_LAUNCH((fused_kernel<T, kM, kInput, kWeight>), static_cast<unsigned>(blocks), kFusedThreads,
              static_cast<std::size_t>(tile.shared_bytes), context.stream, args);
  };
  constexpr std::integral_constant<int, 1> one;
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (!weights) return launch(one, no, no);  // few tokens: weights are what takes time
  if (!input) return launch(one, no, yes);
  if (tile.tokens == 16) return launch(one, yes, yes);
  launch(std::integral_constant<int, 2>{}, yes, yes);
}

}  // namespace structmat::monarch
