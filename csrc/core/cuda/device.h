// SPDX-License-Identifier: Apache-2.0
// What kernels include. Compiled by nvcc it is CUDA; compiled by a C++ compiler with
// STRUCTMAT_EMULATE it is the CPU emulator of the tests. Kernels launch by SM_LAUNCH and declare
// dynamic shared memory by SM_DYNAMIC_SHARED; instructions with no C++ spelling live in mma.h and
// copy.h, one wrapper each.
#pragma once
#ifdef STRUCTMAT_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime.h>

#include <string>

#include "structmat/error.h"

#define SM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                              \
  do {                                                                                         \
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);     \
    const cudaError_t sm_status = cudaGetLastError();                                          \
    STRUCTMAT_CHECK(sm_status == cudaSuccess,                                                  \
                    std::string(#kernel ": launch failed: ") + cudaGetErrorString(sm_status)); \
  } while (0)
// Above 48 KB of dynamic shared memory a kernel must be told once per device.
#define SM_ALLOW_SHARED(kernel, bytes)                                                         \
  do {                                                                                         \
    const cudaError_t sm_status =                                                              \
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);      \
    STRUCTMAT_CHECK(sm_status == cudaSuccess,                                                  \
                    std::string(#kernel ": shared memory: ") + cudaGetErrorString(sm_status)); \
  } while (0)
#define SM_UNROLL _Pragma("unroll")
#define SM_ROLLED _Pragma("unroll 1")  // where registers or code would run out
#define SM_DYNAMIC_SHARED(T, name)                         \
  extern __shared__ __align__(128) unsigned char sm_raw[]; \
  T* name = reinterpret_cast<T*>(sm_raw)

namespace structmat::cuda {

// Shared memory that a block may have on the current device: 99 to 227 KB.
inline int max_shared_bytes() {
  int device = 0, bytes = 0;
  const bool ok = cudaGetDevice(&device) == cudaSuccess &&
                  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) ==
                      cudaSuccess;
  STRUCTMAT_CHECK(ok, "structmat: cannot read how much shared memory the device has");
  return bytes;
}

inline int multiprocessors() {
  int device = 0, count = 0;
  const bool ok =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  STRUCTMAT_CHECK(ok, "structmat: cannot read how many multiprocessors the device has");
  return count;
}

// From the device to the host, after what was enqueued before: the host waits.
inline void read(void* stream, void* to, const void* from, std::size_t bytes) {
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, on);
  if (status == cudaSuccess) status = cudaStreamSynchronize(on);
  STRUCTMAT_CHECK(status == cudaSuccess,
                  std::string("structmat: cannot read from the device, ") +
                      "which a CUDA graph does not allow: " + cudaGetErrorString(status));
}

}  // namespace structmat::cuda
#endif
