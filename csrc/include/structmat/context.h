// SPDX-License-Identifier: Apache-2.0
// Where an operation runs and what it may use. Plain data, made per call.
#pragma once
#include <cstddef>
#include <cstdint>

namespace structmat {

enum class Device : std::int32_t { cpu = 0, cuda = 1 };

struct Context {
  Device device = Device::cpu;
  // CUDA: a cudaStream_t of the current device. Work is enqueued there; the core never
  // synchronises.
  void* stream = nullptr;
  // CPU: number of threads, 0 for OpenMP's current maximum. Results do not depend on it.
  int threads = 0;
  // Device memory lent for the call, at least what the operation's `*_workspace` function asks for,
  // aligned to 256 bytes. On the CPU the core keeps its own scratch and asks for none.
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
};

}  // namespace structmat
