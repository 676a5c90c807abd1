// SPDX-License-Identifier: Apache-2.0
// y = x S^T + sums + bias for any support: a warp keeps 16 rows of S, its lanes 32 or 64 tokens. x
// comes through shared memory, token by token side by side, so that an entry of S costs one read
// without bank conflicts per 32 or 64 multiply-adds; sums stay in registers and are rounded once.
#pragma once
#include "cuda/strided_product_tile.cuh"
#include "half.h"
#include "sparse_low_rank/sparse_low_rank_plan.h"
#include "structmat/error.h"
#include "structmat/sparse_pattern.h"

namespace structmat::sparse_low_rank {

struct SparseProduct {
  ConstMatrixView x;  // (T, n)
  SparsePatternView pattern;
  const void* values = nullptr;
  const void* bias = nullptr;
  const void* sums = nullptr;  // (T, m) of the type of sums, may be y; or none
  std::int64_t sums_stride = 0;
  MatrixView y;  // (T, m)
};

template <class Sum>
__device__ Sum not_a_number() {
  return static_cast<Sum>(bits_to_float(0x7fc00000u));
}
// Neither infinite nor NaN.
template <class Sum>
__device__ bool finite(Sum value) {
  return value * Sum{0} == Sum{0};
}

// Where the entries of a row lie: `columns` from next to end, values `shift` further on.
struct RowOfPattern {
  std::int64_t first = 0;   // entry of the row's group
  std::int64_t starts = 0;  // of the group, in pattern.starts
  int shift = 0;

  __device__ RowOfPattern(const SparsePatternView& pattern, std::int64_t row) {
    const std::int64_t g = row / pattern.group;
    const std::int64_t slabs = pattern.slabs();
    starts = g * slabs;
    first = pattern.starts[starts];
    const std::int64_t k = pattern.starts[starts + slabs] - first;
    shift = static_cast<int>((pattern.group - 1) * first + (row - g * pattern.group) * k);
  }
};

// The first entry of [from, to) whose column is `column` or more.
__device__ inline int first_entry_from(const std::uint16_t* columns, int from, int to, int column) {
  while (from < to) {
    const int middle = from + (to - from) / 2;
    if (static_cast<int>(columns[middle]) < column)
      from = middle + 1;
    else
      to = middle;
  }
  return from;
}

constexpr int kSparseWarps = 16, kRowsOfWarp = 16, kSparseRows = kSparseWarps * kRowsOfWarp;

template <class T>
struct SparseTile {
  using Sum = accumulator_t<T>;
  static constexpr int kPer = sizeof(T) == 2 ? 2 : 1;  // tokens of a lane
  static constexpr int kTokens = 32 * kPer;
  static constexpr int kColumns = sizeof(T) == 8 ? 256 : 512;  // a divisor of a slab
  struct alignas(sizeof(T) * kPer) Word {
    T value[kPer];
  };
  union {
    Word x[kColumns][32];  // the word of lane l in column c lies at l ^ (c % 32)
    Sum sums[kTokens][kSparseRows + 1];
  };
  int bad[kTokens];  // a number of the token is not finite
};

template <class T>
__global__ void __launch_bounds__(kSparseWarps * 32, 2) sparse_product_kernel(SparseProduct p) {
  using Shared = SparseTile<T>;
  using Sum = accumulator_t<T>;
  using Word = typename Shared::Word;
  constexpr int kPer = Shared::kPer, kTokens = Shared::kTokens, kColumns = Shared::kColumns;
  constexpr int kThreads = kSparseWarps * 32;
  SM_DYNAMIC_SHARED(Shared, shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const std::int64_t rows = p.pattern.rows, cols = p.pattern.cols, tokens = p.x.rows;
  const std::int64_t row_blocks = ceil_div(rows, kSparseRows);
  const std::int64_t token0 = blockIdx.x / row_blocks * kTokens;
  const std::int64_t row0 = blockIdx.x % row_blocks * kSparseRows;
  const auto* const columns = p.pattern.columns;
  const T* const values = static_cast<const T*>(p.values);
  const T* const x = static_cast<const T*>(p.x.data);

  // Lane r knows where the warp's row r is.
  int next = 0, end = 0, shift = 0;
  Sum sum[kRowsOfWarp][kPer] = {};
  unsigned bad = 0;

  SM_ROLLED
  for (std::int64_t chunk = 0; chunk < cols; chunk += kColumns) {
    const int width = static_cast<int>(cols - chunk < kColumns ? cols - chunk : kColumns);
    __syncthreads();
    SM_ROLLED
    for (int word = warp; word < 32; word += kSparseWarps) {
      const T* from[kPer];
      int inside[kPer];
      SM_UNROLL
      for (int e = 0; e < kPer; ++e) {
        const std::int64_t token = token0 + word * kPer + e;
        from[e] = x + token * p.x.row_stride + chunk;
        inside[e] = token < tokens ? width : 0;
      }
      SM_ROLLED
      for (int c0 = lane; c0 < kColumns; c0 += 128) {
        Word loaded[4];  // all on their way before the first is waited for
        SM_UNROLL
        for (int i = 0; i < 4; ++i) {
          SM_UNROLL
          for (int e = 0; e < kPer; ++e)
            loaded[i].value[e] = c0 + i * 32 < inside[e] ? from[e][c0 + i * 32] : T{};
        }
        SM_UNROLL
        for (int i = 0; i < 4; ++i) {
          SM_UNROLL
          for (int e = 0; e < kPer; ++e)
            if (!finite(to_float(loaded[i].value[e])))
              bad |= 1u << (word / kSparseWarps * kPer + e);
          const int c = c0 + i * 32;
          shared->x[c][word ^ (c & 31)] = loaded[i];
        }
      }
    }
    if (chunk % sparse_slab_columns == 0) {
      const std::int64_t mine = row0 + warp * kRowsOfWarp + lane;
      if (lane < kRowsOfWarp && mine < rows) {
        const RowOfPattern row(p.pattern, mine);
        const std::int64_t* const slab =
            p.pattern.starts + row.starts + chunk / sparse_slab_columns;
        next = static_cast<int>(slab[0]), end = static_cast<int>(slab[1]), shift = row.shift;
      }
    }
    const int begin = static_cast<int>(chunk % sparse_slab_columns);
    __syncthreads();

    SM_UNROLL
    for (int r = 0; r < kRowsOfWarp; ++r) {
      int from = __shfl_sync(~0u, next, r);
      const int to = __shfl_sync(~0u, end, r), ahead = __shfl_sync(~0u, shift, r);
      SM_ROLLED
      for (int count = 32; count == 32; from += count) {
        const int entry = from + lane;
        int c = kColumns;
        if (entry < to) c = static_cast<int>(columns[entry]) - begin;
        const bool inside = c < kColumns;  // as columns ascend, the first ones are
        T value{};
        if (inside) value = values[entry + ahead];
        // What fills up a step of four is zero; x is finite, or the token becomes NaN anyway.
        if (!inside) c = 0;
        count = __popc(__ballot_sync(~0u, inside));
        SM_ROLLED
        for (int i = 0; i < count; i += 4) {
          SM_UNROLL
          for (int j = 0; j < 4; ++j) {
            int at;
            Sum v;
            if constexpr (sizeof(T) == 2) {
              const unsigned both = __shfl_sync(
                  ~0u, static_cast<unsigned>(c) | static_cast<unsigned>(value.bits) << 16, i + j);
              at = static_cast<int>(both & 0xffffu);
              v = to_float(T{static_cast<std::uint16_t>(both >> 16)});
            } else {
              at = __shfl_sync(~0u, c, i + j);
              v = __shfl_sync(~0u, value, i + j);
            }
            const Word word = shared->x[at][lane ^ (at & 31)];
            SM_UNROLL
            for (int e = 0; e < kPer; ++e) sum[r][e] += v * to_float(word.value[e]);
          }
        }
      }
      if (lane == r) next = from;
    }
  }
  __syncthreads();

  SM_ROLLED
  for (int i = 0; i < 32 / kSparseWarps * kPer; ++i) {
    const int token = (warp + i / kPer * kSparseWarps) * kPer + i % kPer;
    const int any = __any_sync(~0u, static_cast<int>(bad >> i & 1u));
    if (lane == 0) shared->bad[token] = any;
  }
  SM_UNROLL
  for (int r = 0; r < kRowsOfWarp; ++r) {
    SM_UNROLL
    for (int e = 0; e < kPer; ++e)
      shared->sums[lane * kPer + e][warp * kRowsOfWarp + r] = sum[r][e];
  }
  __syncthreads();
  const std::int64_t row = row0 + thread % kSparseRows;
  if (row >= rows) return;
  const Sum bias = p.bias == nullptr ? Sum{0} : to_float(static_cast<const T*>(p.bias)[row]);
  const Sum* const before = static_cast<const Sum*>(p.sums);
  T* const y = static_cast<T*>(p.y.data);
  SM_ROLLED
  for (int t = thread / kSparseRows; t < kTokens; t += kThreads / kSparseRows) {
    const std::int64_t token = token0 + t;
    if (token >= tokens) return;
    Sum total = shared->sums[t][thread % kSparseRows] + bias;
    if (before != nullptr) total += before[token * p.sums_stride + row];
    if (shared->bad[t] != 0) total = not_a_number<Sum>();
    y[token * p.y.row_stride + row] = cuda::rounded<T>(total);
  }
}

template <class T>
void multiply_sparse(const Context& context, const SparseProduct& p) {
  const std::int64_t blocks =
      ceil_div(p.pattern.rows, kSparseRows) * ceil_div(p.x.rows, SparseTile<T>::kTokens);
  STRUCTMAT_CHECK(blocks < std::int64_t{1} << 31,
                  "sparse_low_rank_linear: more than 2^31 tiles, which no launch takes");
  if (blocks == 0) return;
  SM_ALLOW_SHARED((sparse_product_kernel<T>));
  SM_LAUNCH(sparse_product_kernel<T>, static_cast<unsigned>(blocks), kSparseWarps * 32,
            sizeof(SparseTile<T>), context.stream, p);
}

}  // namespace structmat::sparse_low_rank
