// SPDX-License-Identifier: Apache-2.0
// Compiled instead of block_svd_cuda.cu where there is no CUDA compiler.
#include "block_svd/block_svd_kernels.h"
#include "structmat/error.h"

namespace structmat {

void block_svd_cuda(const Context&, const ConstArrayView&, std::int64_t, const BlockSvd&) {
  detail::fail("block_svd: structmat was built without CUDA");
}
std::size_t block_svd_workspace_cuda(const ConstArrayView&, std::int64_t) {
  detail::fail("block_svd: structmat was built without CUDA");
}

}  // namespace structmat
