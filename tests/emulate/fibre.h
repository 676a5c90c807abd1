// SPDX-License-Identifier: Apache-2.0
// Fibres: stacks of their own, on each of which a function runs until it leaves for another fibre.
#pragma once
#include <cstddef>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulate {

struct Fibre {
#if defined(__x86_64__)
  void* context = nullptr;  // the stack pointer
#else
  ucontext_t context{};
#endif
  std::unique_ptr<char[]> memory;
  const void* stack = nullptr;
  std::size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Leaves `from` for `to`; returns when somebody leaves for `from`.
void go_on(Fibre& from, Fibre& to);

// A fibre to go on with: one that was put back, or a new one, on which `run` begins. That calls
// begin() first and never returns.
Fibre& take_fibre(void (*run)());
void begin(const Fibre& self);
// It may be taken again, and goes on behind this call.
void put_back(Fibre& fibre);
// Those that were not put back never will be.
void drop_fibres();

}  // namespace emulate
