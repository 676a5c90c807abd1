// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "structmat/block_svd.h"

namespace structmat {

void block_svd_cpu(const Context& context, const ConstArrayView& blocks, std::int64_t rank,
                   const BlockSvd& result);
void block_svd_cuda(const Context& context, const ConstArrayView& blocks, std::int64_t rank,
                    const BlockSvd& result);
std::size_t block_svd_workspace_cuda(const ConstArrayView& blocks, std::int64_t rank);

}  // namespace structmat
