// SPDX-License-Identifier: Apache-2.0
// The decode kernel of low_rank_linear: few tokens, each weight read once in 16-byte loads, fp32
// (fp64) sums; no atomics, one order of addition.
#pragma once
#include "cuda/device.h"
#include "half.h"
#include "low_rank/low_rank_plan.h"

namespace structmat::low_rank {

template <class T, class Sum>
__device__ T rounded(Sum value) {
  if constexpr (sizeof(T) == sizeof(Sum))
    return value;
  else
    return from_float<T>(value);
}

template <class T>
struct alignas(16) Pack {  // one 16-byte load
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// Where column c of a staged chunk lies. A lane multiplies 8 consecutive 16-bit weights with two
// 16-byte reads of the staged input; lanes side by side must then read addresses side by side.
template <class T>
__device__ int place(int c) {
  if constexpr (sizeof(T) == 2)
    return (c & ~255) | ((c >> 2 & 1) << 7) | ((c >> 3 & 31) << 2) | (c & 3);
  else
    return c;
}

// out[t, row] = sum_c weight[row, c] in[t, c] (+ sums[t, row])
struct DecodeArgs {
  const void* weight;  // (rows, cols)
  std::int64_t weight_stride, rows, cols;
  bool vector_loads;
  const void* in;  // first: x (tokens, cols); second: partial sums of h (splits, tokens, cols)
  std::int64_t in_stride, in_splits;
  std::int64_t tokens, split_cols;
  const void* sums;  // second: (tokens, rows) of the type of sums, added to the product; or none
  const void* bias;  // second
  void* out;         // first: partial sums of h (splits, tokens, rows); second: y (tokens, rows)
  std::int64_t out_stride;
};

// A block's rows; `staged` holds kTokens * kChunk numbers.
template <class T, int kTokens, int kRows, bool kFirst>
__device__ void decode_rows(const DecodeArgs& a, accumulator_t<T>* staged, std::int64_t row_block,
                            std::int64_t split, std::int64_t token_block) {
  using Sum = accumulator_t<T>;
  constexpr int kPack = Pack<T>::kSize, kHalf = Pack<Sum>::kSize, kHalves = kPack / kHalf;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t row0 = (row_block * kWarps + warp) * kRows;
  const std::int64_t t0 = token_block * kTokens;
  const std::int64_t begin = split * a.split_cols;
  const std::int64_t end = begin + a.split_cols < a.cols ? begin + a.split_cols : a.cols;

  const T* weight[kRows];
  SM_UNROLL
  for (int i = 0; i < kRows; ++i) {  // rows past the last read it again and are not written
    const std::int64_t row = row0 + i < a.rows ? row0 + i : a.rows - 1;
    weight[i] = static_cast<const T*>(a.weight) + row * a.weight_stride;
  }
  Sum sum[kRows][kTokens] = {};

  for (std::int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int width = static_cast<int>(end - chunk < kChunk ? end - chunk : kChunk);
    __syncthreads();
    for (int i = threadIdx.x; i < kTokens * static_cast<int>(kChunk); i += kWarps * 32) {
      const int c = i % kChunk;
      const std::int64_t t = t0 + i / kChunk;
      Sum value = 0;
      if (t < a.tokens && c < width) {
        if constexpr (kFirst) {
          value = to_float(static_cast<const T*>(a.in)[t * a.in_stride + chunk + c]);
        } else {
          const Sum* partial = static_cast<const Sum*>(a.in) + t * a.cols + chunk + c;
          for (std::int64_t s = 0; s < a.in_splits; ++s) value += partial[s * a.tokens * a.cols];
        }
      }
      staged[i - c + place<T>(c)] = value;
    }
    __syncthreads();

    for (int c = lane * kPack; c < width; c += 32 * kPack) {
      Pack<T> w[kRows];
      if (a.vector_loads && c + kPack <= width) {
        SM_UNROLL
        for (int i = 0; i < kRows; ++i)
          w[i] = *reinterpret_cast<const Pack<T>*>(weight[i] + chunk + c);
      } else {
        SM_UNROLL
        for (int i = 0; i < kRows; ++i) {
          SM_UNROLL
          for (int j = 0; j < kPack; ++j)
            w[i].value[j] = c + j < width ? weight[i][chunk + c + j] : T{};
        }
      }
      SM_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        SM_UNROLL
        for (int h = 0; h < kHalves; ++h) {
          const Pack<Sum> x =
              *reinterpret_cast<const Pack<Sum>*>(staged + t * kChunk + place<T>(c + h * kHalf));
          SM_UNROLL
          for (int i = 0; i < kRows; ++i) {
            SM_UNROLL
            for (int j = 0; j < kHalf; ++j)
              sum[i][t] += to_float(w[i].value[h * kHalf + j]) * x.value[j];
          }
        }
      }
    }
  }

  SM_UNROLL
  for (int i = 0; i < kRows; ++i) {
    SM_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      Sum total = sum[i][t];
      SM_UNROLL
      for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
      const std::int64_t row = row0 + i, token = t0 + t;
      if (lane != i * kTokens + t || row >= a.rows || token >= a.tokens) continue;
      if constexpr (kFirst) {
        static_cast<Sum*>(a.out)[(split * a.tokens + token) * a.rows + row] = total;
      } else {
        if (a.sums != nullptr) total += static_cast<const Sum*>(a.sums)[token * a.rows + row];
        if (a.bias != nullptr) total += to_float(static_cast<const T*>(a.bias)[row]);
        static_cast<T*>(a.out)[token * a.out_stride + row] = rounded<T>(total);
      }
    }
  }
}

// Whether weights may be read in packs, and how columns are split.
inline void prepare(const DecodePhase& phase, std::size_t element, DecodeArgs& a) {
  a.vector_loads = reinterpret_cast<std::uintptr_t>(a.weight) % 16 == 0 &&
                   a.weight_stride * static_cast<std::int64_t>(element) % 16 == 0;
  a.split_cols = phase.split_cols;
}

// f(tokens of a group, rows of a warp), both compile-time constants.
template <class F>
void dispatch_group(const DecodePhase& phase, F f) {
  using std::integral_constant;
  if (phase.token_group == 1) return f(integral_constant<int, 1>{}, integral_constant<int, 1>{});
  if (phase.token_group == 4) return f(integral_constant<int, 4>{}, integral_constant<int, 2>{});
  f(integral_constant<int, 8>{}, integral_constant<int, 4>{});
}

template <class T, int kTokens, int kRows, bool kFirst>
__global__ void __launch_bounds__(kWarps * 32, 2) decode_kernel(DecodeArgs a) {
  SM_DYNAMIC_SHARED(accumulator_t<T>, staged);
  decode_rows<T, kTokens, kRows, kFirst>(a, staged, blockIdx.x, blockIdx.y, blockIdx.z);
}

template <class T, bool kFirst>
void decode(const Context& context, const DecodePhase& phase, DecodeArgs a) {
  if (a.rows == 0 || a.tokens == 0) return;
  prepare(phase, sizeof(T), a);
  const dim3 grid(static_cast<unsigned>(phase.row_blocks), static_cast<unsigned>(phase.splits),
                  static_cast<unsigned>(ceil_div(a.tokens, phase.token_group)));
  dispatch_group(phase, [&](auto tokens, auto rows) {
    constexpr int kTokens = decltype(tokens)::value, kRows = decltype(rows)::value;
    constexpr int bytes = kTokens * static_cast<int>(kChunk * sizeof(accumulator_t<T>));
    if constexpr (bytes > 48 * 1024) SM_ALLOW_SHARED((decode_kernel<T, kTokens, kRows, kFirst>));
    SM_LAUNCH((decode_kernel<T, kTokens, kRows, kFirst>), grid, dim3(kWarps * 32), bytes,
              context.stream, a);
  });
}

}  // namespace structmat::low_rank
