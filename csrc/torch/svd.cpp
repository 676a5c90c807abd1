// SPDX-License-Identifier: Apache-2.0
#include "structmat/svd.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "convert.h"
#include "structmat/error.h"

namespace structmat::torch_bindings {
namespace {

constexpr const char* op = "randomized_svd";
constexpr std::int64_t kInfoSize = sizeof(SvdInfo) / sizeof(double);

using Factors = std::tuple<Tensor, Tensor, Tensor>;

SvdOptions options_of(std::int64_t rank, std::optional<std::int64_t> oversample,
                      std::optional<std::int64_t> sweeps, std::int64_t seed, bool center) {
  STD_TORCH_CHECK(seed >= 0, op, ": seed is ", seed, ", wanted 0 to 2^63 - 1");
  return {rank, oversample, sweeps, static_cast<std::uint64_t>(seed), center};
}

// U, S and Vh for A (..., m, n), and a problem for each of its matrices.
Factors add_problems(const Tensor& A, const SvdOptions& options,
                     std::vector<SvdProblem>& problems) {
  STD_TORCH_CHECK(A.dim() >= 2, op, ": A must have at least 2 dimensions, got ", A.dim());
  const DType from = dtype_of(A, op, "A"), to = from == DType::f64 ? DType::f64 : DType::f32;
  const auto dtype = to == DType::f64 ? ScalarType::Double : ScalarType::Float;
  const std::int64_t batch_dims = A.dim() - 2, m = A.size(batch_dims), n = A.size(batch_dims + 1);
  // Refused before U is made, whose size it is.
  STD_TORCH_CHECK(m > 0 && n > 0, op, ": A is empty, shape (", m, ", ", n, ")");
  const std::int64_t k = options.rank;
  STD_TORCH_CHECK(k >= 1 && k <= std::min(m, n), op, ": rank is ", k, ", wanted 1 to ",
                  std::min(m, n), " for A of shape (", m, ", ", n, ")");

  std::vector<std::int64_t> batch;
  std::int64_t count = 1;
  for (std::int64_t d = 0; d < batch_dims; ++d) {
    batch.push_back(A.size(d));
    count *= A.size(d);
  }
  const auto result = [&](std::initializer_list<std::int64_t> sizes) {
    std::vector<std::int64_t> all = batch;
    all.insert(all.end(), sizes);
    return torch::stable::new_empty(A, all, dtype);
  };
  Tensor U = result({m, k}), S = result({k}), Vh = result({k, n});
  const auto at = [to](Tensor& t, std::int64_t index) {
    return static_cast<char*>(t.data_ptr()) + index * static_cast<std::int64_t>(size_of(to));
  };
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t offset = 0, rest = i;
    for (std::int64_t d = batch_dims; d-- > 0; rest /= A.size(d))
      offset += rest % A.size(d) * A.stride(d);
    SvdProblem problem;
    problem.a = {
        static_cast<const char*>(A.data_ptr()) + offset * static_cast<std::int64_t>(size_of(from)),
        from,
        m,
        n,
        A.stride(batch_dims),
        A.stride(batch_dims + 1)};
    problem.options = options;
    problem.u = {at(U, i * m * k), to, m, k, k};
    problem.s = {at(S, i * k), to, k};
    problem.vh = {at(Vh, i * k * n), to, k, n, n};
    problems.push_back(problem);
  }
  return {U, S, Vh};
}

// Runs them; the facts as a tensor of doubles, (problems, 6). Where a matrix has no finite
// decomposition its part of every result is NaN and `finite` 0, on the CPU too: the Python function
// raises, compiled graphs go on with NaN.
Tensor run(const Tensor& like, std::vector<SvdProblem>& problems) {
  const auto count = static_cast<std::int64_t>(problems.size());
  Tensor info = torch::stable::new_empty(like, {count, kInfoSize}, ScalarType::Double);
  auto* facts = static_cast<SvdInfo*>(info.data_ptr());
  for (std::int64_t i = 0; i < count; ++i) problems[static_cast<std::size_t>(i)].info = facts + i;
  Scope scope(like);
  scope.lend_workspace(like, randomized_svd_workspace(scope.context, problems.data(), count));
  structmat::randomized_svd(scope.context, problems.data(), count);
  return info;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> randomized_svd(const Tensor& A, std::int64_t rank,
                                                          std::optional<std::int64_t> oversample,
                                                          std::optional<std::int64_t> sweeps,
                                                          std::int64_t seed, bool center) {
  std::vector<SvdProblem> problems;
  auto [U, S, Vh] = add_problems(A, options_of(rank, oversample, sweeps, seed, center), problems);
  std::vector<std::int64_t> shape;
  for (std::int64_t d = 0; d + 2 < A.dim(); ++d) shape.push_back(A.size(d));
  shape.push_back(kInfoSize);
  return {U, S, Vh, torch::stable::view(run(A, problems), shape)};
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor>
randomized_svd_list(const std::vector<Tensor>& A, const std::vector<std::int64_t>& rank,
                    std::optional<std::int64_t> oversample, std::optional<std::int64_t> sweeps,
                    std::int64_t seed, bool center) {
  STD_TORCH_CHECK(A.size() == rank.size(), op, ": ", A.size(), " matrices and ", rank.size(),
                  " ranks, wanted one each");
  std::vector<SvdProblem> problems;
  std::vector<Tensor> U, S, Vh;
  for (std::size_t i = 0; i < A.size(); ++i) {
    STD_TORCH_CHECK(A[i].dim() == 2, op, ": A[", i, "] must have 2 dimensions, got ", A[i].dim());
    check_same_device(A[0], A[i], op, "a matrix of the list");
    const SvdOptions options = options_of(rank[i], oversample, sweeps, seed, center);
    auto [u, s, vh] = add_problems(A[i], options, problems);
    U.push_back(u);
    S.push_back(s);
    Vh.push_back(vh);
  }
  return {U, S, Vh, run(A[0], problems)};
}

// The host waits for the device where it decides how to go on.
std::tuple<Tensor, Tensor, Tensor, Tensor> randomized_svd_to_tolerance(
    const Tensor& A, double rtol, std::optional<std::int64_t> oversample,
    std::optional<std::int64_t> sweeps, std::int64_t seed, bool center) {
  const StridedMatrixView a = strided_matrix_view(A, op, "A");
  const auto dtype = a.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  const Scope scope(A);
  const auto allocate = [&](std::size_t bytes) {
    const auto tensor = std::make_shared<Tensor>(
        torch::stable::new_empty(A, {static_cast<std::int64_t>(bytes)}, ScalarType::Byte));
    return std::shared_ptr<void>(tensor, tensor->data_ptr());
  };
  Tensor info = torch::stable::new_empty(A, {kInfoSize}, ScalarType::Double);
  try {
    SvdToTolerance found(scope.context, a, rtol, options_of(0, oversample, sweeps, seed, center),
                         allocate);
    const std::int64_t k = found.rank();
    Tensor U = torch::stable::new_empty(A, {a.rows, k}, dtype);
    Tensor S = torch::stable::new_empty(A, {k}, dtype);
    Tensor Vh = torch::stable::new_empty(A, {k, a.cols}, dtype);
    found.factors(matrix_view(U, op, "U"), vector_view(S, op, "S"), matrix_view(Vh, op, "Vh"),
                  static_cast<SvdInfo*>(info.data_ptr()));
    return {U, S, Vh, info};
  } catch (const LinAlgError&) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const auto filled = [&](std::initializer_list<std::int64_t> sizes) {
      return torch::stable::fill_(torch::stable::new_empty(A, sizes, dtype), nan);
    };
    torch::stable::fill_(info, nan);
    Tensor finite = torch::stable::narrow(info, 0, 4, 2);  // and converged
    torch::stable::fill_(finite, 0.0);
    return {filled({a.rows, 1}), filled({1}), filled({1, a.cols}), info};
  }
}

}  // namespace

STRUCTMAT_REGISTER("randomized_svd", &randomized_svd)
STRUCTMAT_REGISTER("randomized_svd_to_tolerance", &randomized_svd_to_tolerance)
STRUCTMAT_REGISTER("randomized_svd_list", &randomized_svd_list)

}  // namespace structmat::torch_bindings
