// SPDX-License-Identifier: Apache-2.0
#include "structmat/sparse_pattern.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "parallel.h"
#include "random/philox.h"
#include "structmat/error.h"

namespace structmat {
namespace {

using Key = std::pair<std::uint64_t, std::int64_t>;  // (key, number)

constexpr std::uint32_t subset_stream = 0x73756273u;  // apart from the streams of the sketches
constexpr std::int64_t kBlock = 1 << 16;              // numbers of a task

// The numbers of a block below a guess of the wanted quantile, and those near it.
struct Drawn {
  std::vector<std::int64_t> below;
  std::vector<Key> near;
};

Drawn draw(std::int64_t g, std::int64_t begin, std::int64_t end, std::uint64_t seed,
           std::uint64_t low, std::uint64_t high) {
  Drawn drawn;
  for (std::int64_t i = begin; i < end; i += 2) {  // a block begins with an even number
    const std::int64_t pair = i / 2;  // its upper half beside the group, whose own has no use
    const Philox words = random_words(g | (pair >> 32) << 32, pair, seed, subset_stream);
    for (std::int64_t q = 0; q < 2 && i + q < end; ++q) {
      const std::uint64_t key = std::uint64_t{words.word[2 * q]} << 32 | words.word[2 * q + 1];
      if (key < low)
        drawn.below.push_back(i + q);
      else if (key <= high)
        drawn.near.push_back({key, i + q});
    }
  }
  return drawn;
}

// Keeps the numbers below a quantile and only so many keys as lie within `slack` standard
// deviations of it, so that memory is that of the result.
void subset_of_group(const Context& context, std::int64_t g, std::int64_t count,
                     std::int64_t wanted, std::uint64_t seed, std::int64_t* indices) {
  if (wanted == count) std::iota(indices, indices + count, std::int64_t{0});
  if (wanted == 0 || wanted == count) return;
  const std::int64_t blocks = ceil_div(count, kBlock);
  const double part = static_cast<double>(wanted) / static_cast<double>(count);
  const double deviation = std::sqrt(part * (1 - part) / static_cast<double>(count));
  std::vector<Drawn> drawn(static_cast<std::size_t>(blocks));
  for (double slack = 6;; slack *= 4) {
    const double low = part - slack * deviation, high = part + slack * deviation;
    const std::uint64_t from = low <= 0 ? 0 : static_cast<std::uint64_t>(low * 0x1p64),
                        to = high >= 1 ? ~std::uint64_t{0}
                                       : static_cast<std::uint64_t>(high * 0x1p64);
    parallel_for(context, blocks, [&](std::int64_t block) {
      drawn[static_cast<std::size_t>(block)] =
          draw(g, block * kBlock, std::min(count, (block + 1) * kBlock), seed, from, to);
    });
    std::vector<Key> near;
    std::int64_t missing = wanted;
    for (const Drawn& d : drawn) {
      missing -= static_cast<std::int64_t>(d.below.size());
      near.insert(near.end(), d.near.begin(), d.near.end());
    }
    if (missing < 0 || missing > static_cast<std::int64_t>(near.size())) continue;
    std::nth_element(near.begin(), near.begin() + missing, near.end());
    std::vector<std::int64_t> chosen;
    for (std::int64_t i = 0; i < missing; ++i)
      chosen.push_back(near[static_cast<std::size_t>(i)].second);
    std::sort(chosen.begin(), chosen.end());
    auto next = chosen.begin();
    for (std::int64_t block = 0; block < blocks; ++block) {
      const auto& below = drawn[static_cast<std::size_t>(block)].below;
      const auto end = std::lower_bound(next, chosen.end(), (block + 1) * kBlock);
      indices = std::merge(below.begin(), below.end(), next, end, indices);
      next = end;
    }
    return;
  }
}

// What sparse_transpose relies on. The operators cannot afford to look.
void check_contents(const SparsePatternView& pattern) {
  constexpr const char* op = "sparse_transpose: ";
  STRUCTMAT_CHECK(pattern.rows >= 0 && pattern.cols >= 0 && pattern.group >= 1 &&
                      pattern.nnz >= 0 && pattern.nnz <= sparse_most_entries,
                  std::string(op) + "the pattern has a negative size, no rows in a group or " +
                      "too many entries");
  const std::int64_t slabs = pattern.slabs();
  bool fine = pattern.starts[0] == 0;
  std::int64_t entries = 0;
  for (std::int64_t g = 0; fine && g < pattern.groups(); ++g) {
    const std::int64_t rows = std::min(pattern.group, pattern.rows - g * pattern.group);
    for (std::int64_t s = 0; fine && s < slabs; ++s) {
      const std::int64_t begin = pattern.starts[g * slabs + s],
                         end = pattern.starts[g * slabs + s + 1];
      const std::int64_t width =
          std::min(sparse_slab_columns, pattern.cols - s * sparse_slab_columns);
      fine = begin <= end && (entries += rows * (end - begin)) <= pattern.nnz;
      for (std::int64_t e = begin; fine && e < end; ++e) fine = pattern.columns[e] < width;
    }
  }
  STRUCTMAT_CHECK(fine && entries == pattern.nnz,
                  std::string(op) + "starts and columns are no pattern of " +
                      std::to_string(pattern.nnz) + " entries in " + std::to_string(pattern.rows) +
                      " x " + std::to_string(pattern.cols));
}

}  // namespace

void random_subsets(const Context& context, std::int64_t groups, std::int64_t count,
                    std::int64_t per_group, std::uint64_t seed, std::int64_t* indices) {
  STRUCTMAT_CHECK(groups >= 0 && count >= 0 && per_group >= 0 && per_group <= count,
                  "random_subsets: " + std::to_string(per_group) + " of " + std::to_string(count) +
                      " numbers wanted");
  STRUCTMAT_CHECK(groups <= std::int64_t{1} << 32,
                  "random_subsets: " + std::to_string(groups) + " groups, at most 2^32 work");
  if (count > kBlock) {
    for (std::int64_t g = 0; g < groups; ++g)
      subset_of_group(context, g, count, per_group, seed, indices + g * per_group);
    return;
  }
  Context alone = context;
  alone.threads = 1;
  parallel_for(context, groups, [&](std::int64_t g) {
    subset_of_group(alone, g, count, per_group, seed, indices + g * per_group);
  });
}

void sparse_transpose(const Context&, const SparsePatternView& pattern, std::int64_t* starts,
                      std::uint16_t* columns, std::int32_t* permutation) {
  const std::int64_t slabs = pattern.slabs(), groups = pattern.groups(), group = pattern.group;
  const std::int64_t row_slabs = ceil_div(pattern.rows, sparse_slab_columns);
  check_contents(pattern);
  // Counted by (column, slab of the row), then filled row by row, so that rows ascend.
  std::vector<std::int64_t> next(static_cast<std::size_t>(pattern.cols * row_slabs + 1), 0);
  const auto walk = [&](auto&& visit) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::int64_t first = pattern.starts[g * slabs];
      const std::int64_t k = pattern.starts[(g + 1) * slabs] - first;
      const std::int64_t rows = std::min(group, pattern.rows - g * group);
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t s = 0; s < slabs; ++s)
          for (std::int64_t e = pattern.starts[g * slabs + s];
               e < pattern.starts[g * slabs + s + 1]; ++e)
            visit(g * group + i, s * sparse_slab_columns + pattern.columns[e],
                  group * first + i * k + (e - first));
    }
  };
  walk([&](std::int64_t row, std::int64_t col, std::int64_t) {
    ++next[static_cast<std::size_t>(col * row_slabs + row / sparse_slab_columns + 1)];
  });
  for (std::size_t i = 1; i < next.size(); ++i) next[i] += next[i - 1];
  std::copy(next.begin(), next.end(), starts);
  walk([&](std::int64_t row, std::int64_t col, std::int64_t value) {
    std::int64_t& place =
        next[static_cast<std::size_t>(col * row_slabs + row / sparse_slab_columns)];
    columns[place] = static_cast<std::uint16_t>(row % sparse_slab_columns);
    permutation[place] = static_cast<std::int32_t>(value);
    ++place;
  });
}

}  // namespace structmat
