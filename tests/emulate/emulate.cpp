// SPDX-License-Identifier: Apache-2.0
#include "emulate.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulate {

Block* current = nullptr;
unsigned seed = std::getenv("STRUCTMAT_EMULATE_SEED")
                    ? static_cast<unsigned>(std::atoi(std::getenv("STRUCTMAT_EMULATE_SEED")))
                    : 1;

namespace {

constexpr int kPoison = 0xCD;  // fills shared memory before each block: never zero by accident

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kStackBytes = 256 << 10;
constexpr std::size_t kGuardBytes = 0;  // AddressSanitizer guards the end of an allocation itself

// AddressSanitizer must know which stack runs.
void switch_context(ucontext_t* from, ucontext_t* to, void** own_fake_stack, const void* bottom,
                    std::size_t size) {
  __sanitizer_start_switch_fiber(own_fake_stack, bottom, size);
  swapcontext(from, to);
  __sanitizer_finish_switch_fiber(own_fake_stack ? *own_fake_stack : nullptr, nullptr, nullptr);
}
void begin_fibre() {
  __sanitizer_finish_switch_fiber(nullptr, &current->scheduler_bottom, &current->scheduler_size);
}
void forget(void* memory, std::size_t bytes) {
  __asan_unpoison_memory_region(memory, bytes);
}
void poison_static_shared() {}  // ordinary globals here, so that AddressSanitizer guards them
#else
constexpr std::size_t kStackBytes = 64 << 10;
constexpr std::size_t kGuardBytes = 128;

void switch_context(ucontext_t* from, ucontext_t* to, void**, const void*, std::size_t) {
  swapcontext(from, to);
}
void begin_fibre() {}
void forget(void*, std::size_t) {}

// __shared__ variables are thread_local, and blocks run on a thread of their own: everything in its
// thread-local storage of this module is theirs.
thread_local unsigned char in_static_shared;
void poison_static_shared() {
  static_cast<volatile unsigned char&>(in_static_shared) = 0;  // makes the storage exist
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void*) {
        auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
        if (begin == nullptr) return 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type != PT_TLS || &in_static_shared < begin ||
              &in_static_shared >= begin + segment.p_memsz)
            continue;
          std::memset(begin, kPoison, segment.p_memsz);
          return 1;
        }
        return 0;
      },
      nullptr);
}
#endif

void yield() {
  Fibre& self = *current->self;
  switch_context(&self.context, &current->scheduler, self.done ? nullptr : &self.fake_stack,
                 current->scheduler_bottom, current->scheduler_size);
}

void entry() {
  begin_fibre();
  current->body();
  current->self->done = true;
  yield();
}

bool release_warps(Block& block) {
  bool progressed = false;
  for (Fibre& fibre : block.fibres) {
    if (fibre.done || fibre.wait != Wait::warp) continue;
    Fibre* first = &fibre - fibre.lane;
    const auto end = block.fibres.data() + block.fibres.size();
    const auto arrived = [&](int lane) {
      const Fibre* f = first + lane;
      return (fibre.mask >> lane & 1u) == 0 || f >= end || f->done ||
             (f->wait == Wait::warp && f->mask == fibre.mask);
    };
    bool all = true;
    for (int lane = 0; lane < 32; ++lane) all = all && arrived(lane);
    if (!all) continue;
    const unsigned mask = fibre.mask;
    for (int lane = 0; lane < 32; ++lane)
      if ((mask >> lane & 1u) != 0 && first + lane < end) first[lane].wait = Wait::none;
    progressed = true;
  }
  return progressed;
}

bool release_block(Block& block) {
  for (const Fibre& f : block.fibres)
    if (!f.done && f.wait != Wait::block) return false;
  for (Fibre& f : block.fibres) f.wait = Wait::none;
  return true;
}

void run_block(Block& block, std::mt19937& random) {
  std::vector<std::size_t> order(block.fibres.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  for (std::size_t left = order.size(); left > 0;) {
    std::shuffle(order.begin(), order.end(), random);
    bool progressed = false;
    for (std::size_t i : order) {
      Fibre& fibre = block.fibres[i];
      if (fibre.done || fibre.wait != Wait::none) continue;
      block.self = &fibre;
      progressed = true;
      switch_context(&block.scheduler, &fibre.context, &block.fake_stack, fibre.stack.get(),
                     kStackBytes);
      if (fibre.done) --left;
    }
    if (!block.failure.empty()) throw std::runtime_error("emulate: " + block.failure);
    if (release_warps(block)) progressed = true;
    if (left > 0 && release_block(block)) progressed = true;
    if (!progressed && left > 0)
      throw std::runtime_error("emulate: deadlock at a barrier that not every thread reaches");
  }
}

// Its own function: getcontext returns twice, which a loop's variables would not survive.
__attribute__((noinline)) void start(Fibre& f) {
  forget(f.stack.get(), kStackBytes);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStackBytes;
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
}

void start_fibres(Block& block) {
  const dim3 dim = block.block_dim;
  for (std::size_t t = 0; t < block.fibres.size(); ++t) {
    Fibre& f = block.fibres[t];
    f.done = false;
    f.wait = Wait::none;
    f.lane = static_cast<int>(t % 32);
    f.thread = dim3(static_cast<unsigned>(t % dim.x), static_cast<unsigned>(t / dim.x % dim.y),
                    static_cast<unsigned>(t / (dim.x * dim.y)));
    start(f);
  }
}

void run_grid(Block& block, std::size_t shared_bytes) {
  const std::unique_ptr<void, decltype(&std::free)> shared(
      [&] {
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, shared_bytes + kGuardBytes + (shared_bytes == 0)) != 0)
          throw std::bad_alloc();
        return memory;
      }(),
      &std::free);
  block.shared = static_cast<unsigned char*>(shared.get());
  unsigned char* guard = block.shared + shared_bytes;
  std::mt19937 random(seed);
  const dim3 grid = block.grid_dim;
  std::vector<std::size_t> order(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  for (std::size_t b : order) {
    block.index =
        dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
             static_cast<unsigned>(b / grid.x / grid.y));
    std::memset(block.shared, kPoison, shared_bytes + kGuardBytes);
    std::fill(block.slots.begin(), block.slots.end(), ~std::uint64_t{0});
    poison_static_shared();
    start_fibres(block);
    run_block(block, random);
    if (std::any_of(guard, guard + kGuardBytes, [](unsigned char c) { return c != kPoison; }))
      throw std::runtime_error("emulate: a kernel wrote past its " + std::to_string(shared_bytes) +
                               " bytes of shared memory");
  }
}

}  // namespace

void wait(Wait kind, unsigned mask) {
  Fibre& self = *current->self;
  if (kind == Wait::warp && (mask >> self.lane & 1u) == 0)
    current->failure = "a warp barrier's mask leaves out the thread that calls it";
  self.wait = kind;
  self.mask = mask;
  yield();
}

void launch(std::function<void()> body, dim3 grid, dim3 block_dim, std::size_t shared_bytes) {
  const std::size_t threads = std::size_t{block_dim.x} * block_dim.y * block_dim.z;
  if (threads == 0 || threads > 1024 || block_dim.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > 227 * 1024)
    throw std::runtime_error("emulate: a launch CUDA would refuse");
  Block block;
  block.body = std::move(body);
  block.block_dim = block_dim;
  block.grid_dim = grid;
  block.slots.resize((threads + 31) / 32 * 32);
  block.fibres.resize(threads);
  for (Fibre& f : block.fibres) f.stack.reset(new char[kStackBytes]);
  std::exception_ptr failure;
  current = &block;
  std::thread([&] {
    try {
      run_grid(block, shared_bytes);
    } catch (...) {
      failure = std::current_exception();
    }
  }).join();
  current = nullptr;
  if (failure) std::rethrow_exception(failure);
}

}  // namespace emulate
