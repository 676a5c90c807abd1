// SPDX-License-Identifier: Apache-2.0
// Which entries of a sparse matrix may differ from zero. The pattern is fixed while the values
// change; it is made once and lies on the device of the values.
#pragma once
#include <cstdint>

#include "structmat/context.h"
#include "structmat/export.h"
#include "structmat/matrix.h"

namespace structmat {

// The columns of a pattern are cut into slabs of this width, so that a position takes 16 bits.
constexpr std::int64_t sparse_slab_columns = 4096;

// Entries of a pattern at most: below 2^31 by what a warp may count beyond a row.
constexpr std::int64_t sparse_most_entries = (std::int64_t{1} << 31) - 64;

// The support of an m x n matrix. `group` rows in a row (the last group may have fewer) have the
// same columns: 1 for any support, 16 for vectors and blocks, m where every row is alike.
//
// With slabs = ceil(n / sparse_slab_columns), the columns of group g in slab s are
//   s sparse_slab_columns + columns[e]   for starts[g slabs + s] <= e < starts[g slabs + s + 1],
// ascending. `values` lie row by row (the order of CSR, for every group): with
// k_g = starts[(g + 1) slabs] - starts[g slabs] columns in group g, the values of row
// g group + i begin at group starts[g slabs] + i k_g.
struct SparsePatternView {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t group = 1;
  std::int64_t nnz = 0;                    // <= sparse_most_entries
  const std::int64_t* starts = nullptr;    // (groups slabs + 1)
  const std::uint16_t* columns = nullptr;  // (starts[groups slabs])

  // constexpr: nvcc takes them for kernels, too
  constexpr std::int64_t slabs() const {
    return (cols + sparse_slab_columns - 1) / sparse_slab_columns;
  }
  constexpr std::int64_t groups() const { return group == 0 ? 0 : (rows + group - 1) / group; }
};

// The same support seen from the columns, for x's gradient: `pattern` is cols x rows, and value e
// of the transposed matrix is value permutation[e] of the matrix. `strip` of its rows in a row have
// the same columns, though each is a group of its own: 16 for blocks, else 1.
struct SparseTransposeView {
  SparsePatternView pattern;
  const std::int32_t* permutation = nullptr;  // (nnz)
  std::int64_t strip = 1;
};

// `per_group` of the numbers 0 .. count - 1 for each of `groups` groups, each subset equally
// likely, ascending: indices (groups, per_group). The numbers of group g with the smallest
// (key, number), where the 64-bit key depends on (seed, g, number) alone. groups <= 2^32.
STRUCTMAT_API void random_subsets(const Context& context, std::int64_t groups, std::int64_t count,
                                  std::int64_t per_group, std::uint64_t seed,
                                  std::int64_t* indices);

// Fills the transpose of `pattern`, host memory on both sides: starts of
// (cols slabs + 1) with slabs = ceil(rows / sparse_slab_columns), columns and permutation of nnz;
// its group is 1. Refuses a pattern whose starts or columns are none.
STRUCTMAT_API void sparse_transpose(const Context& context, const SparsePatternView& pattern,
                                    std::int64_t* starts, std::uint16_t* columns,
                                    std::int32_t* permutation);

}  // namespace structmat
