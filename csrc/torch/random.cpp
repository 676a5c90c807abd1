// SPDX-License-Identifier: Apache-2.0
#include "structmat/random.h"

#include "convert.h"

namespace structmat::torch_bindings {
namespace {

// A (rows, cols) tensor of the type and device of `like`.
Tensor gaussian(const Tensor& like, std::int64_t rows, std::int64_t cols, std::int64_t seed,
                std::int64_t stream) {
  STD_TORCH_CHECK(rows >= 0 && cols >= 0, "gaussian: the shape is (", rows, ", ", cols,
                  "), wanted no negative size");
  STD_TORCH_CHECK(seed >= 0, "gaussian: seed is ", seed, ", wanted 0 to 2^63 - 1");
  STD_TORCH_CHECK(stream >= 0 && stream < (std::int64_t{1} << 32), "gaussian: stream is ", stream,
                  ", wanted 0 to 2^32 - 1");
  const Scope scope(like);
  Tensor out = torch::stable::new_empty(like, {rows, cols});
  fill_gaussian(scope.context, matrix_view(out, "gaussian", "the result"),
                static_cast<std::uint64_t>(seed), static_cast<std::uint32_t>(stream));
  return out;
}

}  // namespace

STRUCTMAT_REGISTER("gaussian", &gaussian)

}  // namespace structmat::torch_bindings
