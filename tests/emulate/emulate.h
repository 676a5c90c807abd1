// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA grid on the CPU: one fibre per thread, blocks one after another. At a barrier a fibre
// yields; the order of fibres is shuffled by a seed, so that a missing barrier changes results.
// For tests only. It shows neither speed nor memory ordering between warps.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace emulate {

enum class Wait { none, warp, block };

struct Fibre {
  ucontext_t context;
  dim3 thread;
  int lane, warp;
  bool done;
  Wait wait;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fibre> fibres;
  Fibre* self = nullptr;
  std::function<void()> body;
  dim3 index, block_dim, grid_dim;
  std::vector<unsigned char> shared;
  std::vector<std::uint64_t> slots;  // one per thread, for shuffles
};

extern Block* current;
extern unsigned seed;

void wait(Wait kind);
// Runs `body` once per thread of every block.
void launch(std::function<void()> body, dim3 grid, dim3 block, std::size_t shared_bytes);

template <class T>
T exchange(T value, int source_lane) {  // every lane of the warp calls
  static_assert(sizeof(T) <= 8);
  const auto first = (current->self - current->fibres.data()) - current->self->lane;
  std::uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof value);
  current->slots[first + current->self->lane] = raw;
  wait(Wait::warp);
  T result;
  std::memcpy(&result, &current->slots[first + source_lane], sizeof result);
  wait(Wait::warp);
  return result;
}

}  // namespace emulate

#define threadIdx (emulate::current->self->thread)
#define blockIdx (emulate::current->index)
#define blockDim (emulate::current->block_dim)
#define gridDim (emulate::current->grid_dim)
#define SM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                \
  do {                                                                           \
    static_cast<void>(stream);                                                   \
    [](auto sm_grid, auto sm_block, std::size_t sm_bytes, auto... sm_args) {     \
      emulate::launch([=] { kernel(sm_args...); }, sm_grid, sm_block, sm_bytes); \
    }(dim3(grid), dim3(block), shared_bytes, __VA_ARGS__);                       \
  } while (0)
#define SM_ALLOW_SHARED(kernel, bytes) static_cast<void>(bytes)
#define SM_DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(  \
      (reinterpret_cast<std::uintptr_t>(emulate::current->shared.data()) + 127) / 128 * 128)

inline void __syncthreads() {
  emulate::wait(emulate::Wait::block);
}
inline void __syncwarp(unsigned = ~0u) {
  emulate::wait(emulate::Wait::warp);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulate::exchange(value, emulate::current->self->lane ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulate::exchange(value, lane);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = emulate::current->self->lane;
  return emulate::exchange(value, lane + delta < 32 ? lane + delta : lane);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
