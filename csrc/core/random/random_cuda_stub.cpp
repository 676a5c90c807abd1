// SPDX-License-Identifier: Apache-2.0
// Compiled instead of random_cuda.cu where there is no CUDA compiler.
#include "random/random_kernels.h"
#include "structmat/error.h"

namespace structmat {

void fill_gaussian_cuda(const Context&, MatrixView, std::uint64_t, std::uint32_t) {
  detail::fail("gaussian: structmat was built without CUDA");
}

}  // namespace structmat
