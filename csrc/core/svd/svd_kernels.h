// SPDX-License-Identifier: Apache-2.0
// The back ends of svd.h.
#pragma once
#include <functional>

#include "structmat/svd.h"
#include "svd/svd_lanes.h"
#include "svd/svd_plan.h"

namespace structmat {

void randomized_svd_cpu(const Context& context, const StridedMatrixView& b, const SvdPlan& plan,
                        std::uint64_t seed, MatrixView u, VectorView s, MatrixView vh,
                        SvdInfo* info);
void randomized_svd_cuda(const Context& context, const StridedMatrixView& b, const SvdPlan& plan,
                         std::uint64_t seed, MatrixView u, VectorView s, MatrixView vh,
                         SvdInfo* info);
std::size_t randomized_svd_workspace_cuda(const StridedMatrixView& b, const SvdPlan& plan);
// run(context of its lane, i) for every matrix i.
void run_lanes_cuda(const Context& context, const SvdLanes& lanes,
                    const std::function<void(const Context&, std::int64_t)>& run);

}  // namespace structmat
