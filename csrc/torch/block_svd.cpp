// SPDX-License-Identifier: Apache-2.0
#include "structmat/block_svd.h"

#include <initializer_list>
#include <tuple>
#include <vector>

#include "convert.h"

namespace structmat::torch_bindings {
namespace {

// A (p, q), (b, p, q) or (a, b, p, q). Blocks without a finite decomposition give NaN, as in
// randomized_svd: the Python function raises.
std::tuple<Tensor, Tensor, Tensor, Tensor> block_svd(const Tensor& A, std::int64_t rank) {
  constexpr const char* op = "block_svd";
  const std::int64_t dims = A.dim();
  STD_TORCH_CHECK(dims >= 2 && dims <= 4, op, ": A must have 2 to 4 dimensions, got ", dims);
  ConstArrayView blocks;
  blocks.data = A.data_ptr();
  blocks.dtype = dtype_of(A, op, "A");
  for (std::int64_t d = 0; d < 4; ++d) {
    const std::int64_t own = d - (4 - dims);
    blocks.sizes[d] = own >= 0 ? A.size(own) : 1;
    blocks.strides[d] = own >= 0 ? A.stride(own) : 0;
  }
  Scope scope(A);
  const std::size_t bytes = block_svd_workspace(scope.context, blocks, rank);  // checks
  const auto dtype = blocks.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  const auto result = [&](std::initializer_list<std::int64_t> sizes, ScalarType type) {
    std::vector<std::int64_t> all;
    for (std::int64_t d = 0; d + 2 < dims; ++d) all.push_back(A.size(d));
    all.insert(all.end(), sizes);
    return torch::stable::new_empty(A, all, type);
  };
  Tensor U = result({blocks.sizes[2], rank}, dtype), S = result({rank}, dtype);
  Tensor Vh = result({rank, blocks.sizes[3]}, dtype), norms = result({2}, ScalarType::Double);
  scope.lend_workspace(A, bytes);
  structmat::block_svd(
      scope.context, blocks, rank,
      {U.data_ptr(), S.data_ptr(), Vh.data_ptr(), static_cast<double*>(norms.data_ptr())});
  return {U, S, Vh, norms};
}

}  // namespace

STRUCTMAT_REGISTER("block_svd", &block_svd)

}  // namespace structmat::torch_bindings
