// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory (PTX ISA: cp.async).
#pragma once
#include "cuda/device.h"

#ifdef STRUCTMAT_EMULATE
#include "emulate_instructions.h"
#else
namespace structmat::cuda {

// Copies `count` (0 to kBytes) bytes and fills up to kBytes, 4, 8 or 16, with zeros. Both addresses
// are multiples of kBytes; `from` is not read where count = 0.
template <int kBytes>
__device__ void copy(void* to, const void* from, int count) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
                 "r"(count)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(from),
                 "r"(count), "n"(kBytes)
                 : "memory");
}
// Ends a group of this thread's copies.
__device__ inline void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for all groups of this thread but the last kLeft.
template <int kLeft>
__device__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

}  // namespace structmat::cuda
#endif
