// SPDX-License-Identifier: Apache-2.0
// Lists of problems of any sizes on the CPU: whole problems run side by side, one thread each, but
// for those too large to share the threads evenly.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace structmat {

// How many of the largest problems to give all threads, one after the other, before the others run
// side by side: as many as end soonest. `costs` descend. Threads share the work of one problem at
// 4/5 of their rate.
inline std::size_t count_alone(const std::vector<double>& costs, int threads) {
  const auto lanes = static_cast<std::size_t>(threads);
  const std::size_t most = std::min(costs.size(), 2 * lanes);
  std::size_t best = 0;
  double before = 0, least = std::numeric_limits<double>::infinity();
  double rest = std::accumulate(costs.begin(), costs.end(), 0.0);
  for (std::size_t alone = 0; alone <= most; ++alone) {
    std::vector<double> busy(lanes, 0.0);
    for (std::size_t i = alone; i < costs.size(); ++i)
      *std::min_element(busy.begin(), busy.end()) += costs[i];
    const double end = before + *std::max_element(busy.begin(), busy.end());
    if (end < least) {
      least = end;
      best = alone;
    }
    if (alone == most || rest > 8.0 * threads * costs[alone]) break;  // even enough
    before += costs[alone] / (0.8 * threads);
    rest -= costs[alone];
  }
  return best;
}

// run(context, i) for every problem i; costs[i] is roughly its number of operations. Largest first:
// a small one that comes last keeps few threads waiting.
template <class Run>
void run_side_by_side(const Context& context, std::vector<double> costs, Run&& run) {
  std::vector<std::int64_t> order(costs.size());
  std::iota(order.begin(), order.end(), std::int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t i, std::int64_t j) {
    return costs[static_cast<std::size_t>(i)] > costs[static_cast<std::size_t>(j)];
  });
  std::sort(costs.begin(), costs.end(), std::greater<>());
  const std::size_t alone = count_alone(costs, thread_count(context));
  for (std::size_t i = 0; i < alone; ++i) run(context, order[i]);
  Context single = context;
  single.threads = 1;
  parallel_for(context, static_cast<std::int64_t>(order.size() - alone),
               [&](std::int64_t i) { run(single, order[alone + static_cast<std::size_t>(i)]); });
}

}  // namespace structmat
