// SPDX-License-Identifier: Apache-2.0
// Compiled instead of svd_cuda.cu where there is no CUDA compiler.
#include "structmat/error.h"
#include "svd/svd_kernels.h"

namespace structmat {

void randomized_svd_cuda(const Context&, const StridedMatrixView&, const SvdPlan&, std::uint64_t,
                         MatrixView, VectorView, MatrixView, SvdInfo*) {
  detail::fail("randomized_svd: structmat was built without CUDA");
}
std::size_t randomized_svd_workspace_cuda(const StridedMatrixView&, const SvdPlan&) {
  detail::fail("randomized_svd: structmat was built without CUDA");
}
void run_lanes_cuda(const Context&, const SvdLanes&,
                    const std::function<void(const Context&, std::int64_t)>&) {
  detail::fail("randomized_svd: structmat was built without CUDA");
}
std::unique_ptr<SvdSearch> svd_to_tolerance_cuda(const Context&, const StridedMatrixView&,
                                                 const SvdPlan&, double, const SvdOptions&,
                                                 const SvdAllocate&) {
  detail::fail("randomized_svd: structmat was built without CUDA");
}

}  // namespace structmat
