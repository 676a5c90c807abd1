// SPDX-License-Identifier: Apache-2.0
#include "structmat/block_svd.h"

#include <algorithm>
#include <string>

#include "block_svd/block_svd_kernels.h"
#include "checker.h"

namespace structmat {
namespace {

constexpr const char* op = "block_svd";

void check_blocks(const ConstArrayView& blocks, std::int64_t rank) {
  Checker(op, blocks.dtype).array("A", blocks);
  const std::int64_t p = blocks.sizes[2], q = blocks.sizes[3];
  const std::string shape = " of shape (" + std::to_string(p) + ", " + std::to_string(q) + ")";
  STRUCTMAT_CHECK(p > 0 && q > 0, std::string(op) + ": A has empty blocks," + shape);
  STRUCTMAT_CHECK(rank >= 1 && rank <= std::min(p, q),
                  std::string(op) + ": rank is " + std::to_string(rank) + ", wanted 1 to " +
                      std::to_string(std::min(p, q)) + " for blocks" + shape);
  STRUCTMAT_CHECK(std::max(p, q) <= 1 << 30 && std::min(p, q) <= 20000,
                  std::string(op) + ": A has blocks" + shape +
                      ", wanted at most 20000 on the shorter side (LAPACK counts in 32 bits)");
}

}  // namespace

std::size_t block_svd_workspace(const Context& context, const ConstArrayView& blocks,
                                std::int64_t rank) {
  check_blocks(blocks, rank);
  return context.device == Device::cuda ? block_svd_workspace_cuda(blocks, rank) : 0;
}

void block_svd(const Context& context, const ConstArrayView& blocks, std::int64_t rank,
               const BlockSvd& result) {
  const std::size_t wanted = block_svd_workspace(context, blocks, rank);
  if (blocks.sizes[0] == 0 || blocks.sizes[1] == 0) return;
  Checker(op, blocks.dtype).workspace(context, wanted);
  if (context.device == Device::cuda)
    block_svd_cuda(context, blocks, rank, result);
  else
    block_svd_cpu(context, blocks, rank, result);
}

}  // namespace structmat
