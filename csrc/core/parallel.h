// SPDX-License-Identifier: Apache-2.0
// Threads by OpenMP (one runtime, shared with torch), over tiles. Their bounds may depend on the
// number of threads. Where a sum is cut depends on sizes alone, so that threads decide who computes
// a number, never its bits.
#pragma once
#include <omp.h>

#include <cstdint>
#include <exception>

#include "ceil_div.h"
#include "structmat/context.h"

namespace structmat {

inline int thread_count(const Context& context) {
  return context.threads > 0 ? context.threads : omp_get_max_threads();
}

// body(tile) for tile in [0, tiles), in any order. The first exception thrown is rethrown here.
template <class Body>
void parallel_for(const Context& context, std::int64_t tiles, Body&& body) {
  const int threads = static_cast<int>(
      tiles < thread_count(context) ? tiles : static_cast<std::int64_t>(thread_count(context)));
  if (threads <= 1) {
    for (std::int64_t tile = 0; tile < tiles; ++tile) body(tile);
    return;
  }
  std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    try {
      body(tile);
    } catch (...) {
#pragma omp critical(structmat_parallel_for)
      if (!failure) failure = std::current_exception();
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace structmat
