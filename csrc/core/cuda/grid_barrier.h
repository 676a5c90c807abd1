// SPDX-License-Identifier: Apache-2.0
// A barrier of all blocks of a launch by SM_LAUNCH_TOGETHER, in two halves: what was written before
// any arrive() is seen after wait(). Neither half is a barrier of the block, by which shared memory
// could be used again. CUDA keeps its counter, one per launch, so that nothing must be set to zero
// and launches on several streams do not meet. Each thread calls both, once.
#pragma once
#include "cuda/device.h"

#ifndef STRUCTMAT_EMULATE
#include <cooperative_groups.h>

#include <utility>

namespace structmat::cuda {

class GridBarrier {
 public:
  __device__ void arrive() { token_ = cooperative_groups::this_grid().barrier_arrive(); }
  __device__ void wait() { cooperative_groups::this_grid().barrier_wait(std::move(token_)); }

 private:
  cooperative_groups::grid_group::arrival_token token_ = 0;
};

}  // namespace structmat::cuda
#endif
