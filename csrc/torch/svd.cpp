// SPDX-License-Identifier: Apache-2.0
#include "structmat/svd.h"

#include <limits>
#include <tuple>

#include "convert.h"
#include "structmat/error.h"

namespace structmat::torch_bindings {
namespace {

constexpr std::int64_t kInfoSize = sizeof(SvdInfo) / sizeof(double);

// U, S, Vh and SvdInfo as a tensor of doubles. Where A has no finite decomposition these are NaN
// and `finite` 0, on the CPU too: the Python function raises, compiled graphs go on with NaN.
std::tuple<Tensor, Tensor, Tensor, Tensor> randomized_svd(const Tensor& A, std::int64_t rank,
                                                          std::optional<std::int64_t> oversample,
                                                          std::optional<std::int64_t> sweeps,
                                                          std::int64_t seed) {
  constexpr const char* op = "randomized_svd";
  const StridedMatrixView a = strided_matrix_view(A, op, "A");
  STD_TORCH_CHECK(seed >= 0, op, ": seed is ", seed, ", wanted 0 to 2^63 - 1");
  const std::int64_t m = a.rows, n = a.cols;
  const SvdOptions options{rank, oversample, sweeps, static_cast<std::uint64_t>(seed)};
  const auto dtype = a.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;

  Scope scope(A);
  scope.lend_workspace(A, randomized_svd_workspace(scope.context, a, options));
  Tensor U = torch::stable::new_empty(A, {m, rank}, dtype);
  Tensor S = torch::stable::new_empty(A, {rank}, dtype);
  Tensor Vh = torch::stable::new_empty(A, {rank, n}, dtype);
  Tensor info = torch::stable::new_empty(A, {kInfoSize}, ScalarType::Double);
  auto* facts = static_cast<SvdInfo*>(info.data_ptr());
  try {
    structmat::randomized_svd(scope.context, a, options, matrix_view(U, op, "U"),
                              vector_view(S, op, "S"), matrix_view(Vh, op, "Vh"), facts);
  } catch (const LinAlgError&) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    for (Tensor* t : {&U, &S, &Vh}) torch::stable::fill_(*t, nan);
    *facts = {nan, nan, nan, nan, 0};
  }
  return {U, S, Vh, info};
}

}  // namespace

STRUCTMAT_REGISTER("randomized_svd", &randomized_svd)

}  // namespace structmat::torch_bindings
