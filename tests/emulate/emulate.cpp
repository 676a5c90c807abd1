// SPDX-License-Identifier: Apache-2.0
#include "emulate.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fibre.h"

namespace emulate {

Block* current = nullptr;
unsigned seed = std::getenv("STRUCTMAT_EMULATE_SEED")
                    ? static_cast<unsigned>(std::atoi(std::getenv("STRUCTMAT_EMULATE_SEED")))
                    : 1;

namespace {

constexpr int kPoison = 0xCD;  // fills shared memory before each block: never zero by accident

#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t kGuardBytes = 0;  // AddressSanitizer guards the end of an allocation itself
void poison_static_shared() {}  // ordinary globals here, so that AddressSanitizer guards them
#else
constexpr std::size_t kGuardBytes = 128;

// __shared__ variables are thread_local, and blocks run on a thread of their own: everything in its
// thread-local storage of this module is theirs.
thread_local unsigned char in_static_shared;
void poison_static_shared() {
  struct Segment {
    std::ptrdiff_t offset;
    std::size_t bytes;
  };
  static const Segment segment = [] {  // the same in every thread, but for where it begins
    Segment found{};
    static_cast<volatile unsigned char&>(in_static_shared) = 0;  // makes the storage exist
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* result) {
          auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
          if (begin == nullptr) return 0;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_TLS || &in_static_shared < begin ||
                &in_static_shared >= begin + header.p_memsz)
              continue;
            *static_cast<Segment*>(result) = {begin - &in_static_shared, header.p_memsz};
            return 1;
          }
          return 0;
        },
        &found);
    return found;
  }();
  std::memset(&in_static_shared + segment.offset, kPoison, segment.bytes);
}
#endif

// ---- The threads of a block --------------------------------------------------------------
struct Grid {  // of blocks that run together
  std::size_t threads = 0, arrived = 0;
};

// Half of the time between barriers of the block all threads that can go on do so evenly. In the
// other half a warp runs ahead as far as it can, so that the others see all that it did, or
// nothing.
struct Scheduler : Block {
  std::function<void()> body;
  std::vector<Thread> threads;
  std::vector<Thread*> ready;  // in random order
  std::size_t left = 0;        // threads that are not done
  std::size_t at_block_barrier = 0, at_warp_barrier = 0;
  Grid* grid = nullptr;          // none where blocks run one after another
  std::vector<Thread*> waiting;  // for the grid
  bool ahead = false;
  std::string failure;
  Fibre fibre;  // the caller's
  std::linear_congruential_engine<std::uint64_t, 6364136223846793005, 1442695040888963407, 0>
      random;

  std::size_t below(std::size_t n) { return (random() >> 32) * n >> 32; }

  // Adds a thread at a random place among the last `count` of `ready`.
  void add(Thread& thread, std::size_t count) {
    ready.push_back(&thread);
    std::swap(ready.back(), ready[ready.size() - 1 - below(count + 1)]);
  }

  void start_block() {
    left = threads.size();
    at_block_barrier = at_warp_barrier = 0;
    ready.clear();
    for (Thread& t : threads) {
      t.fibre = nullptr;
      t.done = false;
      t.mask = 0;
      t.copies.clear();
      add(t, ready.size());
    }
    ahead = below(2) == 0;
  }

  void release_block() {
    at_block_barrier = 0;
    for (Thread& t : threads)
      if (!t.done) add(t, ready.size());
    ahead = below(2) == 0;
  }

  // Once all lanes of the mask have come; those that are done or never were count as come.
  void release_warp(const Thread& one, unsigned mask) {
    Thread* first = threads.data() + (&one - threads.data()) - one.lane;
    const int lanes =
        static_cast<int>(std::min<std::ptrdiff_t>(32, threads.data() + threads.size() - first));
    const auto comes = [&](int lane) { return (mask >> lane & 1u) != 0 && !first[lane].done; };
    for (int lane = 0; lane < lanes; ++lane)
      if (comes(lane) && first[lane].mask != mask) return;
    std::uint64_t ballot = 0;
    for (int lane = 0; lane < lanes; ++lane)
      if (comes(lane) && first[lane].given == 1) ballot |= std::uint64_t{1} << lane;
    std::size_t released = 0;
    for (int lane = 0; lane < lanes; ++lane) {
      if (!comes(lane)) continue;
      Thread& t = first[lane];
      t.taken = t.source == kBallot                   ? ballot
                : t.source < lanes && comes(t.source) ? first[t.source].given
                                                      : ~std::uint64_t{0};
      t.mask = 0;
      --at_warp_barrier;
      add(t, released++);
    }
  }

  void finish(Thread& self) {
    self.done = true;
    --left;
    if (at_warp_barrier == 0) return;
    Thread* first = &self - self.lane;
    for (int lane = 0; lane < 32 && first + lane < threads.data() + threads.size(); ++lane)
      if (first[lane].mask != 0) release_warp(first[lane], first[lane].mask);
  }

  // Who goes on; nobody once the block is done or cannot go on.
  Thread* next() {
    if (ready.empty() && left > 0 && at_block_barrier == left) release_block();
    if (ready.empty() || !failure.empty()) return nullptr;
    if (!ahead) std::swap(ready[below(ready.size())], ready.back());
    Thread* thread = ready.back();
    ready.pop_back();
    return thread;
  }

  void go_on(Fibre& from);
  void run_block();
  void end_block();
  void run_grid(std::size_t shared_bytes);
};

Scheduler& scheduler() {
  return *static_cast<Scheduler*>(current);
}

// Threads that end without a barrier take the same fibre one after another.
void run_threads() {
  begin(*current->self->fibre);
  for (;;) {
    scheduler().body();
    Thread& self = *current->self;
    Fibre& fibre = *self.fibre;
    scheduler().finish(self);
    put_back(fibre);
    scheduler().go_on(fibre);
  }
}

// Leaves `from` for the next thread, or for the caller; returns when `from` has its turn again.
void Scheduler::go_on(Fibre& from) {
  Fibre* to = &fibre;
  if (Thread* thread = next()) {
    if (thread->fibre == nullptr) thread->fibre = &take_fibre(run_threads);
    self = thread;
    to = thread->fibre;
  }
  if (to != &from) emulate::go_on(from, *to);
}

// Until it is done or waits for other blocks.
void Scheduler::run_block() {
  go_on(fibre);
  if (!failure.empty() || (left > 0 && waiting.empty())) end_block();
}

// Ends a block that is done or cannot go on.
void Scheduler::end_block() {
  if (failure.empty() && left > 0) failure = "deadlock at a barrier that not every thread reaches";
  if (failure.empty()) return;
  drop_fibres();  // threads are left on some
  throw std::runtime_error("emulate: " + failure);
}

void Scheduler::run_grid(std::size_t shared_bytes) {
  const std::unique_ptr<void, decltype(&std::free)> memory(
      [&] {
        void* found = nullptr;
        if (posix_memalign(&found, 128, shared_bytes + kGuardBytes + (shared_bytes == 0)) != 0)
          throw std::bad_alloc();
        return found;
      }(),
      &std::free);
  shared = static_cast<unsigned char*>(memory.get());
  unsigned char* guard = shared + shared_bytes;
  random.seed(seed);
  const dim3 grid = grid_dim;
  std::vector<std::size_t> order(std::size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  for (std::size_t b : order) {
    index = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                 static_cast<unsigned>(b / grid.x / grid.y));
    std::memset(shared, kPoison, shared_bytes + kGuardBytes);
    poison_static_shared();
    start_block();
    run_block();
    end_block();
    if (std::any_of(guard, guard + kGuardBytes, [](unsigned char c) { return c != kPoison; }))
      throw std::runtime_error("emulate: a kernel wrote past its " + std::to_string(shared_bytes) +
                               " bytes of shared memory");
  }
}

// All blocks in turns, in another order each time.
void run_together(std::vector<Scheduler>& blocks, std::size_t shared_bytes) {
  Grid grid{blocks.size() * blocks[0].threads.size()};
  std::linear_congruential_engine<std::uint64_t, 6364136223846793005, 1442695040888963407, 0>
      random(seed);
  std::vector<std::vector<float4>> shared(blocks.size());
  std::vector<Scheduler*> order;
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    shared[b].resize(shared_bytes / sizeof(float4) + 17);
    auto begin = reinterpret_cast<std::uintptr_t>(shared[b].data());
    blocks[b].shared = reinterpret_cast<unsigned char*>((begin + 127) & ~std::uintptr_t{127});
    std::memset(shared[b].data(), kPoison, shared[b].size() * sizeof(float4));
    blocks[b].grid = &grid;
    blocks[b].index = dim3(static_cast<unsigned>(b));
    blocks[b].random.seed(random());
    blocks[b].start_block();
    order.push_back(&blocks[b]);
  }
  while (!order.empty()) {
    const std::size_t arrived = grid.arrived;
    std::shuffle(order.begin(), order.end(), random);
    std::vector<Scheduler*> others;
    for (Scheduler* block : order) {
      current = block;
      block->run_block();
      if (block->left > 0) others.push_back(block);
    }
    if (others.size() == order.size() && arrived == grid.arrived) others[0]->end_block();
    for (Scheduler* block : others) {
      std::vector<Thread*> threads;
      threads.swap(block->waiting);
      for (Thread* thread : threads) block->add(*thread, block->ready.size());
    }
    order.swap(others);
  }
  for (std::size_t b = 0; b < blocks.size(); ++b) {
    const unsigned char* const guard = blocks[b].shared + shared_bytes;
    if (std::any_of(guard, guard + 128, [](unsigned char c) { return c != kPoison; }))
      throw std::runtime_error("emulate: a kernel wrote past its " + std::to_string(shared_bytes) +
                               " bytes of shared memory");
  }
}

}  // namespace

std::size_t arrive_at_grid() {
  Scheduler& block = scheduler();
  Grid* grid = block.grid;
  if (grid == nullptr) return fail("a barrier of blocks that were not launched together"), 0;
  if (block.self->at_grid) fail("a thread arrives twice at the grid's barrier");
  block.self->at_grid = true;
  const std::size_t turn = grid->arrived++ / grid->threads;
  block.add(*block.self, block.ready.size());  // others may come first
  block.go_on(*block.self->fibre);
  return turn;
}

void wait_for_grid(std::size_t turn) {
  Scheduler& block = scheduler();
  Thread& self = *block.self;
  while (block.grid != nullptr && block.grid->arrived / block.grid->threads == turn) {
    block.waiting.push_back(&self);
    block.go_on(*self.fibre);
  }
  self.at_grid = false;
}

void wait_for_block() {
  Scheduler& block = scheduler();
  ++block.at_block_barrier;
  block.go_on(*block.self->fibre);
}

std::uint64_t wait_for_warp(unsigned mask, std::uint64_t given, int source) {
  Scheduler& block = scheduler();
  Thread& self = *block.self;
  if ((mask >> self.lane & 1u) == 0)
    block.failure = "a warp barrier's mask leaves out the thread that calls it";
  self.mask = mask;
  self.given = given;
  self.source = source;
  ++block.at_warp_barrier;
  block.release_warp(self, mask);
  block.go_on(*self.fibre);
  return self.taken;
}

void fail(const char* what) {
  if (scheduler().failure.empty()) scheduler().failure = what;
}

void launch(std::function<void()> body, dim3 grid, dim3 block_dim, std::size_t shared_bytes,
            bool together) {
  const std::size_t threads = std::size_t{block_dim.x} * block_dim.y * block_dim.z;
  if (threads == 0 || threads > 1024 || block_dim.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > 227 * 1024 || (together && std::size_t{grid.y} * grid.z > 1))
    throw std::runtime_error("emulate: a launch CUDA would refuse");
  std::vector<Scheduler> blocks(together ? grid.x : 1);
  for (Scheduler& block : blocks) {
    block.body = body;
    block.block_dim = block_dim;
    block.grid_dim = grid;
    block.threads.resize(threads);
    for (std::size_t t = 0; t < threads; ++t) {
      block.threads[t].lane = static_cast<int>(t % 32);
      block.threads[t].index = dim3(static_cast<unsigned>(t % block_dim.x),
                                    static_cast<unsigned>(t / block_dim.x % block_dim.y),
                                    static_cast<unsigned>(t / (block_dim.x * block_dim.y)));
    }
  }
  std::exception_ptr failure;
  current = &blocks[0];
  std::thread([&] {
    try {
      together ? run_together(blocks, shared_bytes) : blocks[0].run_grid(shared_bytes);
    } catch (...) {
      failure = std::current_exception();
    }
  }).join();
  current = nullptr;
  if (failure) std::rethrow_exception(failure);
}

}  // namespace emulate
