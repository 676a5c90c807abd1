// SPDX-License-Identifier: Apache-2.0
// Many tokens: cuBLAS products, the bias in their epilogue. Few tokens: the decode kernel, which
// reads each weight once in 16-byte loads and keeps fp32 (fp64) sums; no atomics, one order of
// addition.
#include <algorithm>

#include "cuda/column_sums.h"
#include "cuda/device.h"
#include "cuda/gemm.h"
#include "half.h"
#include "low_rank/low_rank_kernels.h"
#include "low_rank/low_rank_plan.h"

namespace structmat {
namespace {

using low_rank::ceil_div;
using low_rank::kChunk;
using low_rank::kWarps;

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

// out[t, row] = sum_c weight[row, c] in[t, c]
struct DecodeArgs {
  const void* weight;  // (rows, cols)
  std::int64_t weight_stride, rows, cols;
  bool vector_loads;
  const void* in;  // first: x (tokens, cols); second: partial sums of h (splits, tokens, cols)
  std::int64_t in_stride, in_splits;
  std::int64_t tokens, split_cols;
  const void* bias;  // second
  void* out;         // first: partial sums of h (splits, tokens, rows); second: y (tokens, rows)
  std::int64_t out_stride;
};

template <class T, int kTokens, int kRows, bool kFirst>
__global__ void __launch_bounds__(kWarps * 32) decode_kernel(DecodeArgs a) {
  using Sum = accumulator_t<T>;
  constexpr int kPack = Pack<T>::kSize, kHalf = Pack<Sum>::kSize, kHalves = kPack / kHalf;
  SM_DYNAMIC_SHARED(Sum, staged);  // (kTokens, kChunk)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t row0 = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp) * kRows;
  const std::int64_t t0 = static_cast<std::int64_t>(blockIdx.z) * kTokens;
  const std::int64_t begin = blockIdx.y * a.split_cols;
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
        static_cast<Sum*>(a.out)[(blockIdx.y * a.tokens + token) * a.rows + row] = total;
      } else {
        if (a.bias != nullptr) total += to_float(static_cast<const T*>(a.bias)[row]);
        static_cast<T*>(a.out)[token * a.out_stride + row] = rounded<T>(total);
      }
    }
  }
}

template <class T, bool kFirst>
void decode(const Context& context, const low_rank::DecodePhase& phase, DecodeArgs a) {
  if (a.rows == 0 || a.tokens == 0) return;
  a.vector_loads = reinterpret_cast<std::uintptr_t>(a.weight) % 16 == 0 &&
                   a.weight_stride * static_cast<std::int64_t>(sizeof(T)) % 16 == 0;
  a.split_cols = phase.split_cols;
  const dim3 grid(static_cast<unsigned>(phase.row_blocks), static_cast<unsigned>(phase.splits),
                  static_cast<unsigned>(ceil_div(a.tokens, phase.token_group)));
  const auto launch = [&](auto tokens, auto rows) {
    constexpr int kTokens = decltype(tokens)::value, kRows = decltype(rows)::value;
    constexpr int bytes = kTokens * static_cast<int>(kChunk * sizeof(accumulator_t<T>));
    if constexpr (bytes > 48 * 1024) SM_ALLOW_SHARED((decode_kernel<T, kTokens, kRows, kFirst>));
    SM_LAUNCH((decode_kernel<T, kTokens, kRows, kFirst>), grid, dim3(kWarps * 32), bytes,
              context.stream, a);
  };
  using std::integral_constant;
  if (phase.token_group == 1)
    return launch(integral_constant<int, 1>{}, integral_constant<int, 1>{});
  if (phase.token_group == 4)
    return launch(integral_constant<int, 4>{}, integral_constant<int, 2>{});
  launch(integral_constant<int, 8>{}, integral_constant<int, 4>{});
}

// c = op(a) op(b) (+ bias)
void multiply(const Context& context, ConstMatrixView a, bool trans_a, ConstMatrixView b,
              bool trans_b, MatrixView c, const void* bias, void* workspace) {
  cuda::Gemm g;
  g.trans_a = trans_a, g.trans_b = trans_b;
  g.m = c.rows, g.n = c.cols, g.k = trans_a ? a.rows : a.cols;
  // a single row may have any stride
  g.a = a.data, g.lda = std::max(a.row_stride, a.cols);
  g.b = b.data, g.ldb = std::max(b.row_stride, b.cols);
  g.c = c.data, g.ldc = std::max(c.row_stride, c.cols);
  g.dtype = g.out = a.dtype;
  g.bias = bias;
  cuda::gemm(context, g, workspace);
}

}  // namespace

void low_rank_linear_cuda(const Context& context, ConstMatrixView x, ConstMatrixView u,
                          ConstMatrixView v, ConstVectorView bias, MatrixView y,
                          MatrixView hidden) {
  const low_rank::ForwardPlan plan =
      low_rank::forward_plan(x.rows, u.rows, x.cols, u.cols, x.dtype, hidden.data != nullptr);
  char* workspace = static_cast<char*>(context.workspace);
  if (plan.decode) {
    DecodeArgs first{}, second{};
    first.weight = v.data, first.weight_stride = v.row_stride;
    first.rows = v.rows, first.cols = v.cols, first.tokens = second.tokens = x.rows;
    first.in = x.data, first.in_stride = x.row_stride;
    first.out = workspace;
    second.weight = u.data, second.weight_stride = u.row_stride;
    second.rows = u.rows, second.cols = u.cols;
    second.in = workspace, second.in_splits = plan.first.splits;
    second.bias = bias.data;
    second.out = y.data, second.out_stride = y.row_stride;
    dispatch_dtype(x.dtype, [&](auto element) {
      decode<decltype(element), true>(context, plan.first, first);
      decode<decltype(element), false>(context, plan.second, second);
    });
    return;
  }
  if (hidden.data == nullptr) hidden = {workspace, x.dtype, x.rows, u.cols, u.cols};
  workspace += plan.hidden_bytes;
  multiply(context, x, false, v, true, hidden, nullptr, workspace);
  multiply(context, hidden, false, u, true, y, bias.data, workspace);
}

void low_rank_linear_backward_cuda(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                   ConstMatrixView u, ConstMatrixView v, ConstMatrixView hidden,
                                   const LowRankGradients& grads) {
  const low_rank::BackwardPlan plan = low_rank::backward_plan(dy.rows, u.rows, u.cols, dy.dtype);
  char* workspace = static_cast<char*>(context.workspace);
  const MatrixView dh(workspace, dy.dtype, dy.rows, u.cols, u.cols);
  workspace += plan.hidden_bytes;
  void* partial = workspace;
  workspace += plan.partial_bytes;
  if (grads.x.data != nullptr || grads.v.data != nullptr)
    multiply(context, dy, false, u, false, dh, nullptr, workspace);
  if (grads.x.data != nullptr) multiply(context, dh, false, v, false, grads.x, nullptr, workspace);
  if (grads.u.data != nullptr)
    multiply(context, dy, true, hidden, false, grads.u, nullptr, workspace);
  if (grads.v.data != nullptr) multiply(context, dh, true, x, false, grads.v, nullptr, workspace);
  if (grads.bias.data != nullptr) cuda::column_sums(context, dy, partial, grads.bias);
}

}  // namespace structmat
