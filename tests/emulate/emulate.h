// SPDX-License-Identifier: Apache-2.0
// Runs a CUDA grid on the CPU, blocks one after another (or, launched together, in turns). A thread
// that waits at a barrier keeps its stack (a fibre), and another thread goes on; the order of
// threads and blocks is shuffled by a seed, so that a missing barrier changes results. Shared
// memory is poisoned before each block. Broken rules (a barrier that not every thread reaches, a
// write past shared memory, a launch CUDA would refuse) throw; AddressSanitizer sees accesses out
// of range. For tests only. It shows neither speed nor memory ordering between warps.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
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

struct Fibre;

struct Copy {  // under way to shared memory
  void* to;
  const void* from;
  int count, bytes;  // no bytes: the end of a group
};

struct Thread {
  dim3 index;
  int lane = 0;
  Fibre* fibre = nullptr;  // none before it starts
  bool done = false;
  bool at_grid = false;  // it arrived at the grid's barrier and has not come through
  unsigned mask = 0;     // of the lanes it waits for at a warp barrier; 0 where it does not
  // What it brings to a warp barrier, whose value it wants, and what it got.
  std::uint64_t given = 0, taken = 0;
  int source = 0;
  std::vector<Copy> copies;
};

struct Block {
  dim3 index, block_dim, grid_dim;
  Thread* self = nullptr;
  unsigned char* shared = nullptr;
};

extern Block* current;
extern unsigned seed;

constexpr int kBallot = -1;  // as a source: bit i is set where lane i gave a one

void wait_for_block();
// Of blocks that run together: arrive gives back what wait_for_grid takes. Threads come and go one
// by one, all that CUDA promises, though its own code meets the block in both.
std::size_t arrive_at_grid();
void wait_for_grid(std::size_t turn);
// Gives back the value of lane `source`, all ones where that lane is absent or outside the mask.
std::uint64_t wait_for_warp(unsigned mask, std::uint64_t given = ~std::uint64_t{0}, int source = 0);
// Ends the launch with an error, once the thread gives way.
void fail(const char* what);
// Runs `body` once per thread of every block. `together`: blocks may wait for each other; each has
// its dynamic shared memory, but __shared__ variables would be those of all.
void launch(std::function<void()> body, dim3 grid, dim3 block, std::size_t shared_bytes,
            bool together = false);

template <class T>
T exchange(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t raw = ~std::uint64_t{0};
  std::memcpy(&raw, &value, sizeof value);
  raw = wait_for_warp(mask, raw, source);
  std::memcpy(&value, &raw, sizeof value);
  return value;
}

}  // namespace emulate

#define threadIdx (emulate::current->self->index)
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
#define SM_LAUNCH_TOGETHER(kernel, grid, block, shared_bytes, stream, ...)             \
  do {                                                                                 \
    static_cast<void>(stream);                                                         \
    [](auto sm_grid, auto sm_block, std::size_t sm_bytes, auto... sm_args) {           \
      emulate::launch([=] { kernel(sm_args...); }, sm_grid, sm_block, sm_bytes, true); \
    }(dim3(grid), dim3(block), shared_bytes, __VA_ARGS__);                             \
  } while (0)
#define SM_RESIDENT(kernel, threads, shared_bytes) (2 * structmat::cuda::multiprocessors())
#define SM_UNROLL
#define SM_ROLLED
#define SM_ALLOW_SHARED(kernel) static_cast<void>(kernel)
#define SM_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulate::current->shared)

namespace structmat::cuda {

// Hopper's, or STRUCTMAT_EMULATE_SHARED for another GPU's.
inline int max_shared_bytes() {
  const char* wanted = std::getenv("STRUCTMAT_EMULATE_SHARED");
  return wanted != nullptr ? std::atoi(wanted) : 227 * 1024;
}
// An H100's, or STRUCTMAT_EMULATE_SMS for another GPU's.
inline int multiprocessors() {
  const char* wanted = std::getenv("STRUCTMAT_EMULATE_SMS");
  return wanted != nullptr ? std::atoi(wanted) : 132;
}
inline void read(void*, void* to, const void* from, std::size_t bytes) {
  std::memcpy(to, from, bytes);
}
class GridBarrier {
 public:
  void arrive() { turn_ = emulate::arrive_at_grid(); }
  void wait() { emulate::wait_for_grid(turn_); }

 private:
  std::size_t turn_ = 0;
};

}  // namespace structmat::cuda

inline void __syncthreads() {
  emulate::wait_for_block();
}
inline void __syncwarp(unsigned mask = ~0u) {
  emulate::wait_for_warp(mask);
}
// As in CUDA, `width` cuts the warp into segments; a source outside the segment is the lane itself.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = emulate::current->self->lane / width * width;
  return emulate::exchange(mask, value, first + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = emulate::current->self->lane, source = lane ^ bits;
  return emulate::exchange(mask, value, source / width <= lane / width ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulate::current->self->lane, source = lane + static_cast<int>(delta);
  return emulate::exchange(mask, value, source / width == lane / width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = emulate::current->self->lane, source = lane - static_cast<int>(delta);
  return emulate::exchange(mask, value, source >= lane / width * width ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const std::uint64_t mine = predicate != 0;
  return static_cast<unsigned>(emulate::wait_for_warp(mask, mine, emulate::kBallot));
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate == 0) == 0;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
