// SPDX-License-Identifier: Apache-2.0
// The back ends of svd.h.
#pragma once
#include <functional>
#include <memory>

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

// What SvdToTolerance holds: found when it is made.
class SvdSearch {
 public:
  virtual ~SvdSearch() = default;
  virtual std::int64_t rank() const = 0;
  virtual void factors(MatrixView u, VectorView s, MatrixView vh, SvdInfo* info) = 0;
};
std::unique_ptr<SvdSearch> svd_to_tolerance_cpu(const Context& context, const StridedMatrixView& b,
                                                const SvdPlan& plan, double rtol,
                                                const SvdOptions& options);
std::unique_ptr<SvdSearch> svd_to_tolerance_cuda(const Context& context, const StridedMatrixView& b,
                                                 const SvdPlan& plan, double rtol,
                                                 const SvdOptions& options,
                                                 const SvdAllocate& allocate);

}  // namespace structmat
