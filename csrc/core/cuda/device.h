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

#include <atomic>
#include <string>

#include "structmat/error.h"

#define SM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                              \
  do {                                                                                         \
    kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__);     \
    const cudaError_t sm_status = cudaGetLastError();                                          \
    STRUCTMAT_CHECK(sm_status == cudaSuccess,                                                  \
                    std::string(#kernel ": launch failed: ") + cudaGetErrorString(sm_status)); \
  } while (0)
// All blocks are on the device at once, SM_RESIDENT of them at most, and may wait for each other by
// cuda/grid_barrier.h.
#define SM_LAUNCH_TOGETHER(kernel, grid, block, shared_bytes, on, ...)                         \
  do {                                                                                         \
    cudaLaunchAttribute sm_together{};                                                         \
    sm_together.id = cudaLaunchAttributeCooperative, sm_together.val.cooperative = 1;          \
    cudaLaunchConfig_t sm_config{};                                                            \
    sm_config.gridDim = dim3(grid), sm_config.blockDim = dim3(block);                          \
    sm_config.dynamicSmemBytes = shared_bytes;                                                 \
    sm_config.stream = static_cast<cudaStream_t>(on);                                          \
    sm_config.attrs = &sm_together, sm_config.numAttrs = 1;                                    \
    const cudaError_t sm_status = cudaLaunchKernelEx(&sm_config, kernel, __VA_ARGS__);         \
    if (sm_status != cudaSuccess) cudaGetLastError(); /* or the next launch reports it */      \
    STRUCTMAT_CHECK(sm_status == cudaSuccess,                                                  \
                    std::string(#kernel ": launch failed: ") + cudaGetErrorString(sm_status)); \
  } while (0)
#define SM_RESIDENT(kernel, threads, shared_bytes)                                        \
  [&] {                                                                                   \
    static structmat::cuda::PerDevice sm_count;                                           \
    return sm_count.get(                                                                  \
        [&] { return structmat::cuda::resident_blocks(kernel, threads, shared_bytes); }); \
  }()
// Above 48 KB of static and dynamic shared memory a kernel must be told once per device: always all
// that a block may have, as threads that told it the size of their launch would race.
#define SM_ALLOW_SHARED(kernel)                                          \
  do {                                                                   \
    static structmat::cuda::PerDevice sm_limit;                          \
    sm_limit.get([&] { return structmat::cuda::allow_shared(kernel); }); \
  } while (0)
#define SM_UNROLL _Pragma("unroll")
#define SM_ROLLED _Pragma("unroll 1")  // where registers or code would run out
#define SM_DYNAMIC_SHARED(T, name)                         \
  extern __shared__ __align__(128) unsigned char sm_raw[]; \
  T* name = reinterpret_cast<T*>(sm_raw)

namespace structmat::cuda {

// A positive number per device, asked for once. Threads that ask at once store the same.
class PerDevice {
 public:
  template <class F>
  int get(F&& ask) {
    int device = 0;
    STRUCTMAT_CHECK(cudaGetDevice(&device) == cudaSuccess, "structmat: no current CUDA device");
    if (device >= kDevices) return ask();
    int value = values_[device].load(std::memory_order_relaxed);
    if (value == 0) values_[device].store(value = ask(), std::memory_order_relaxed);
    return value;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> values_[kDevices] = {};
};

inline int device_attribute(cudaDeviceAttr attribute, const char* what) {
  int device = 0, value = 0;
  const bool ok = cudaGetDevice(&device) == cudaSuccess &&
                  cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  STRUCTMAT_CHECK(ok, std::string("structmat: cannot read how ") + what + " the device has");
  return value;
}

// Shared memory that a block may have on the current device: 99 to 227 KB.
inline int max_shared_bytes() {
  static PerDevice bytes;
  return bytes.get([] {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "much shared memory");
  });
}

inline int multiprocessors() {
  static PerDevice count;
  return count.get(
      [] { return device_attribute(cudaDevAttrMultiProcessorCount, "many multiprocessors"); });
}

// Lets `kernel` have all the dynamic shared memory that its static memory leaves; gives back how
// much.
template <class Kernel>
int allow_shared(Kernel* kernel) {
  cudaFuncAttributes facts{};
  cudaError_t status = cudaFuncGetAttributes(&facts, kernel);
  const int bytes = max_shared_bytes() - static_cast<int>(facts.sharedSizeBytes);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  STRUCTMAT_CHECK(status == cudaSuccess,
                  std::string("structmat: cannot give a kernel its shared ") +
                      "memory: " + cudaGetErrorString(status));
  return bytes;
}

// Blocks of such a launch that the device holds at once.
template <class Kernel>
int resident_blocks(Kernel* kernel, int threads, std::size_t shared_bytes) {
  int blocks = 0;
  const cudaError_t status =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
  STRUCTMAT_CHECK(status == cudaSuccess && blocks > 0,
                  std::string("structmat: a multiprocessor holds no block of a kernel: ") +
                      cudaGetErrorString(status));
  return blocks * multiprocessors();
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
