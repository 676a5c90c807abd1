// SPDX-License-Identifier: Apache-2.0
#include "cuda/column_sums.h"
#include "cuda/device.h"
#include "half.h"

namespace structmat::cuda {
namespace {

// out[b, j] = sum of in[t, j] over the tokens of block b
template <class In, class Out>
__global__ void column_sum_kernel(const In* in, std::int64_t stride, std::int64_t rows,
                                  std::int64_t cols, std::int64_t rows_per_block, Out* out) {
  using Sum = accumulator_t<In>;
  SM_DYNAMIC_SHARED(Sum, part);  // (8, 32)
  const std::int64_t col = static_cast<std::int64_t>(blockIdx.x) * 32 + threadIdx.x;
  const std::int64_t begin = blockIdx.y * rows_per_block;
  const std::int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
  Sum sum = 0;
  if (col < cols)
    for (std::int64_t t = begin + threadIdx.y; t < end; t += 8)
      sum += to_float(in[t * stride + col]);
  part[threadIdx.y * 32 + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= cols) return;
  for (int i = 1; i < 8; ++i) sum += part[i * 32 + threadIdx.x];
  if constexpr (sizeof(Out) == sizeof(Sum))
    out[blockIdx.y * cols + col] = sum;
  else
    out[blockIdx.y * cols + col] = from_float<Out>(sum);
}

}  // namespace

void column_sums(const Context& context, const ConstMatrixView& a, void* partial,
                 const VectorView& out) {
  if (a.cols == 0) return;
  dispatch_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    using Sum = accumulator_t<T>;
    const std::int64_t blocks = column_sum_blocks(a.rows);
    const auto columns = static_cast<unsigned>(ceil_div(a.cols, 32));
    constexpr std::size_t bytes = 8 * 32 * sizeof(Sum);
    SM_LAUNCH((column_sum_kernel<T, Sum>), dim3(columns, static_cast<unsigned>(blocks)),
              dim3(32, 8), bytes, context.stream, static_cast<const T*>(a.data), a.row_stride,
              a.rows, a.cols, ceil_div(a.rows, blocks), static_cast<Sum*>(partial));
    SM_LAUNCH((column_sum_kernel<Sum, T>), dim3(columns), dim3(32, 8), bytes, context.stream,
              static_cast<const Sum*>(partial), a.cols, blocks, a.cols, blocks,
              static_cast<T*>(out.data));
  });
}

}  // namespace structmat::cuda
