// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "ceil_div.h"
#include "cuda/device.h"
#include "random/philox.h"
#include "random/random_kernels.h"

namespace structmat {
namespace {

constexpr int kThreads = 256;

// A thread draws four neighbours of a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gaussian_kernel(T* out, std::int64_t rows, std::int64_t cols, std::int64_t row_stride,
                    std::uint64_t seed, std::uint32_t stream) {
  const std::int64_t groups = ceil_div(cols, 4), count = rows * groups;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    const std::int64_t row = i / groups, group = i % groups;
    const Philox drawn = random_words(row, group, seed, stream);
    for (int k = 0; k < 4; ++k)
      if (4 * group + k < cols)
        out[row * row_stride + 4 * group + k] = gaussian_from_word(drawn.word[k]);
  }
}

}  // namespace

void fill_gaussian_cuda(const Context& context, MatrixView out, std::uint64_t seed,
                        std::uint32_t stream) {
  const std::int64_t count = out.rows * ceil_div(out.cols, 4);
  const unsigned blocks =
      static_cast<unsigned>(std::min<std::int64_t>(ceil_div(count, kThreads), 65536));
  if (out.dtype == DType::f32)
    SM_LAUNCH(gaussian_kernel<float>, blocks, kThreads, 0, context.stream,
              static_cast<float*>(out.data), out.rows, out.cols, out.row_stride, seed, stream);
  else
    SM_LAUNCH(gaussian_kernel<double>, blocks, kThreads, 0, context.stream,
              static_cast<double*>(out.data), out.rows, out.cols, out.row_stride, seed, stream);
}

}  // namespace structmat
