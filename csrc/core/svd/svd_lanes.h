// SPDX-License-Identifier: Apache-2.0
// How a list of matrices shares a GPU: pure functions of sizes.
#pragma once
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace structmat {

// A matrix of 4096 x 4096 and rank 64 is some 300 launches; in most of them one to sixty of the 132
// multiprocessors of an H200 have work: the triangular factors one, the Jacobi rotations five,
// products of 80 columns 32 tiles. So whole matrices run beside each other, on streams of their
// own, rather than all steps batched: shapes need not agree, and every matrix keeps the bits of a
// call of its own. From four on, launching (2 to 3 us each on the host) is what costs.
constexpr int kLanes = 4;
// Entries of a matrix that fills the device by itself, and needs the memory by itself.
constexpr std::int64_t kFillsDevice = std::int64_t{1} << 26;

struct SvdLanes {
  std::vector<int> lane;  // per matrix; -1: alone, when the others are done
  int lanes = 1;
  std::size_t bytes_of_lane = 0;  // work space of each
  std::size_t bytes = 0;          // of all

  // entries[i], bytes[i]: size and work space of matrix i.
  SvdLanes(const std::vector<std::int64_t>& entries, const std::vector<std::size_t>& bytes_of) {
    const auto small = std::count_if(entries.begin(), entries.end(),
                                     [](std::int64_t count) { return count < kFillsDevice; });
    lanes = static_cast<int>(std::clamp<std::ptrdiff_t>(small, 1, kLanes));
    std::array<std::int64_t, kLanes> busy{};
    for (std::size_t i = 0; i < entries.size(); ++i) {
      lane.push_back(-1);
      bytes = std::max(bytes, bytes_of[i]);
      if (entries[i] >= kFillsDevice) continue;
      const auto least = std::min_element(busy.begin(), busy.begin() + lanes);
      *least += entries[i];
      lane.back() = static_cast<int>(least - busy.begin());
      bytes_of_lane = std::max(bytes_of_lane, bytes_of[i]);
    }
    bytes = std::max(bytes, bytes_of_lane * static_cast<std::size_t>(lanes));
  }
};

}  // namespace structmat
