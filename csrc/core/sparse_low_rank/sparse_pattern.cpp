// SPDX-License-Identifier: Apache-2.0
#include "structmat/sparse_pattern.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "parallel.h"
#include "random/philox.h"
#include "structmat/error.h"

namespace structmat {
namespace {

using Key = std::pair<std::uint64_t, std::int64_t>;  // (key, number)

constexpr std::uint32_t subset_stream = 0x73756273u;  // apart from the streams of the sketches

void subset_of_group(std::int64_t g, std::int64_t count, std::int64_t wanted, std::uint64_t seed,
                     std::int64_t* indices) {
  std::vector<Key> keys(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    const Philox words = random_words(g, i / 2, seed, subset_stream);
    const std::uint32_t* w = words.word + 2 * (i % 2);
    keys[static_cast<std::size_t>(i)] = {std::uint64_t{w[0]} << 32 | w[1], i};
  }
  std::nth_element(keys.begin(), keys.begin() + wanted, keys.end());
  for (std::int64_t i = 0; i < wanted; ++i) indices[i] = keys[static_cast<std::size_t>(i)].second;
  std::sort(indices, indices + wanted);
}

}  // namespace

void random_subsets(const Context& context, std::int64_t groups, std::int64_t count,
                    std::int64_t per_group, std::uint64_t seed, std::int64_t* indices) {
  STRUCTMAT_CHECK(groups >= 0 && count >= 0 && per_group >= 0 && per_group <= count,
                  "random_subsets: " + std::to_string(per_group) + " of " + std::to_string(count) +
                      " numbers wanted");
  parallel_for(context, groups, [&](std::int64_t g) {
    subset_of_group(g, count, per_group, seed, indices + g * per_group);
  });
}

void sparse_transpose(const Context&, const SparsePatternView& pattern, std::int64_t* starts,
                      std::uint16_t* columns, std::int32_t* permutation) {
  const std::int64_t slabs = pattern.slabs(), groups = pattern.groups(), group = pattern.group;
  const std::int64_t row_slabs = (pattern.rows + sparse_slab_columns - 1) / sparse_slab_columns;
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
