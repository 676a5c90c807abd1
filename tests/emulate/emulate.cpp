// SPDX-License-Identifier: Apache-2.0
#include "emulate.h"

#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>

namespace emulate {

Block* current = nullptr;
unsigned seed = std::getenv("STRUCTMAT_EMULATE_SEED")
                    ? static_cast<unsigned>(std::atoi(std::getenv("STRUCTMAT_EMULATE_SEED")))
                    : 1;

namespace {

constexpr std::size_t kStackBytes = 64 << 10;

void entry() {
  current->body();
  current->self->done = true;
  swapcontext(&current->self->context, &current->scheduler);
}

void run_block(Block& block) {
  const std::size_t threads = block.fibres.size();
  std::vector<std::size_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937 random(seed);
  for (std::size_t left = threads; left > 0;) {
    std::shuffle(order.begin(), order.end(), random);
    bool progressed = false;
    for (std::size_t i : order) {
      Fibre& fibre = block.fibres[i];
      if (fibre.done || fibre.wait != Wait::none) continue;
      block.self = &fibre;
      progressed = true;
      swapcontext(&block.scheduler, &fibre.context);
      if (fibre.done) --left;
    }
    // Release the warps, then the block, whose live threads all wait at the same kind of barrier.
    for (std::size_t first = 0; first < threads; first += 32) {
      const auto begin = block.fibres.begin() + static_cast<std::ptrdiff_t>(first);
      const auto end =
          block.fibres.begin() + static_cast<std::ptrdiff_t>(std::min(threads, first + 32));
      const bool all =
          std::all_of(begin, end, [](const Fibre& f) { return f.done || f.wait == Wait::warp; });
      const bool any = std::any_of(begin, end, [](const Fibre& f) { return !f.done; });
      if (!all || !any) continue;
      for (auto f = begin; f != end; ++f) f->wait = Wait::none;
      progressed = true;
    }
    if (left > 0 && std::all_of(block.fibres.begin(), block.fibres.end(),
                                [](const Fibre& f) { return f.done || f.wait == Wait::block; })) {
      for (Fibre& fibre : block.fibres) fibre.wait = Wait::none;
      progressed = true;
    }
    if (!progressed && left > 0) {
      std::fprintf(stderr, "emulate: deadlock at a barrier that not every thread reaches\n");
      std::abort();
    }
  }
}

// Its own function: getcontext returns twice, which loop variables in registers would not survive.
void start_fibres(Block& block, const std::vector<std::unique_ptr<char[]>>& stacks) {
  const dim3 dim = block.block_dim;
  for (std::size_t t = 0; t < block.fibres.size(); ++t) {
    Fibre& f = block.fibres[t];
    f.done = false;
    f.wait = Wait::none;
    f.lane = static_cast<int>(t % 32);
    f.warp = static_cast<int>(t / 32);
    f.thread = dim3(static_cast<unsigned>(t % dim.x), static_cast<unsigned>(t / dim.x % dim.y),
                    static_cast<unsigned>(t / (dim.x * dim.y)));
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks[t].get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
  }
}

}  // namespace

void wait(Wait kind) {
  current->self->wait = kind;
  swapcontext(&current->self->context, &current->scheduler);
}

void launch(std::function<void()> body, dim3 grid, dim3 block_dim, std::size_t shared_bytes) {
  const std::size_t threads = std::size_t(block_dim.x) * block_dim.y * block_dim.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > 227 * 1024) {
    std::fprintf(stderr, "emulate: a launch CUDA would refuse\n");
    std::abort();
  }
  Block block;
  block.body = std::move(body);
  block.block_dim = block_dim;
  block.grid_dim = grid;
  block.slots.resize(threads + 32);
  block.fibres.resize(threads);
  std::vector<std::unique_ptr<char[]>> stacks(threads);
  for (auto& stack : stacks) stack.reset(new char[kStackBytes]);
  current = &block;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block.index = dim3(x, y, z);
        block.shared.assign(shared_bytes + 128, 0xCD);  // never zero by accident
        start_fibres(block, stacks);
        run_block(block);
      }
  current = nullptr;
}

}  // namespace emulate
