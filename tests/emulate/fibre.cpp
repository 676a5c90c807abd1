// SPDX-License-Identifier: Apache-2.0
#include "fibre.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulate {
namespace {

// ---- Stacks ------------------------------------------------------------------------------
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStackBytes = 256 << 10;
#else
constexpr std::size_t kStackBytes = 64 << 10;
#endif

#if defined(__x86_64__)
// swapcontext asks the system for the mask of signals each time; with stacks made anew for each
// launch that was half of the time of the emulated tests. What a function must preserve lies on the
// stack.
__attribute__((naked, noinline)) void swap_stacks(void**, void*) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp\n"
      "ret");
}
void swap_contexts(Fibre& from, Fibre& to) {
  swap_stacks(&from.context, to.context);
}
// As if `run` had been called by nobody, and waited in swap_stacks.
void make_context(Fibre& fibre, void (*run)()) {
  auto top =
      reinterpret_cast<std::uintptr_t>(fibre.memory.get() + fibre.bytes) & ~std::uintptr_t{15};
  auto* sp = reinterpret_cast<std::uintptr_t*>(top) - 8;
  std::fill(sp, sp + 8, 0);
  sp[6] = reinterpret_cast<std::uintptr_t>(run);
  fibre.context = sp;
}
#else
void swap_contexts(Fibre& from, Fibre& to) {
  swapcontext(&from.context, &to.context);
}
void make_context(Fibre& fibre, void (*run)()) {
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.memory.get();
  fibre.context.uc_stack.ss_size = fibre.bytes;
  fibre.context.uc_link = nullptr;
  makecontext(&fibre.context, run, 0);
}
#endif

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer must know which stack runs, and tells where the one before it lies.
Fibre* previous = nullptr;
void leave(Fibre& from, const Fibre& to) {
  previous = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.bytes);
}
void arrive(const Fibre& self) {
  __sanitizer_finish_switch_fiber(self.fake_stack, &previous->stack, &previous->bytes);
}
#else
void leave(Fibre&, const Fibre&) {}
void arrive(const Fibre&) {}
#endif

// Fibres outlive launches: making a stack costs more than most threads do.
std::vector<std::unique_ptr<Fibre>> fibres;
std::vector<Fibre*> idle;

}  // namespace

void go_on(Fibre& from, Fibre& to) {
  leave(from, to);
  swap_contexts(from, to);
  arrive(from);
}

Fibre& take_fibre(void (*run)()) {
  if (idle.empty()) {
    auto fibre = std::make_unique<Fibre>();
    // Tops of stacks a power of two apart would share few lines of the cache.
    const std::size_t offset = fibres.size() * 9 % 64 * 64;
    fibre->memory.reset(new char[kStackBytes]);
    fibre->stack = fibre->memory.get();
    fibre->bytes = kStackBytes - offset;
    make_context(*fibre, run);
    idle.push_back(fibre.get());
    fibres.push_back(std::move(fibre));
  }
  Fibre* fibre = idle.back();
  idle.pop_back();
  return *fibre;
}

void begin(const Fibre& self) {
  arrive(self);
}

void put_back(Fibre& fibre) {
  idle.push_back(&fibre);
}

void drop_fibres() {
  idle.clear();
  fibres.clear();
}

}  // namespace emulate
