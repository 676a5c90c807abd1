// SPDX-License-Identifier: Apache-2.0
#include "structmat/svd.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "side_by_side.h"
#include "structmat/error.h"
#include "svd/svd_kernels.h"

namespace structmat {
namespace {

std::string shape(std::int64_t rows, std::int64_t cols) {
  std::string out = "(";
  return out.append(std::to_string(rows)).append(", ").append(std::to_string(cols)).append(")");
}

const std::string op = "randomized_svd: ";

void check_matrix(const StridedMatrixView& a) {
  STRUCTMAT_CHECK(a.rows > 0 && a.cols > 0, op + "A is empty, shape " + shape(a.rows, a.cols));
}

void check_bounds(const SvdOptions& options) {
  STRUCTMAT_CHECK(
      options.oversample.value_or(0) >= 0,
      op + "oversample is " + std::to_string(*options.oversample) + ", wanted at least 0");
  STRUCTMAT_CHECK(options.sweeps.value_or(2) >= 2,
                  op + "sweeps is " + std::to_string(*options.sweeps) +
                      ", wanted at least 2 (one pass finds a range, one more the factors)");
}

void check_options(const StridedMatrixView& a, const SvdOptions& options) {
  check_matrix(a);
  STRUCTMAT_CHECK(options.rank >= 1 && options.rank <= std::min(a.rows, a.cols),
                  op + "rank is " + std::to_string(options.rank) + ", wanted 1 to " +
                      std::to_string(std::min(a.rows, a.cols)) + " for A of shape " +
                      shape(a.rows, a.cols));
  check_bounds(options);
}

void check_output(const void* data, DType dtype, DType wanted_dtype, std::int64_t rows,
                  std::int64_t cols, std::int64_t wanted_rows, std::int64_t wanted_cols,
                  const char* name) {
  STRUCTMAT_CHECK(
      data != nullptr && dtype == wanted_dtype && rows == wanted_rows && cols == wanted_cols,
      std::string("randomized_svd: ") + name + " is " + name_of(dtype) + " " + shape(rows, cols) +
          ", wanted " + name_of(wanted_dtype) + " " + shape(wanted_rows, wanted_cols));
}

void check_outputs(const StridedMatrixView& a, std::int64_t k, const MatrixView& u,
                   const VectorView& s, const MatrixView& vh, const SvdInfo* info) {
  const DType dtype = a.dtype == DType::f64 ? DType::f64 : DType::f32;
  check_output(u.data, u.dtype, dtype, u.rows, u.cols, a.rows, k, "U");
  check_output(s.data, s.dtype, dtype, s.size, 1, k, 1, "S");
  check_output(vh.data, vh.dtype, dtype, vh.rows, vh.cols, k, a.cols, "Vh");
  STRUCTMAT_CHECK(info != nullptr, "randomized_svd: info is null");
}

void check_problem(const StridedMatrixView& a, const SvdOptions& options, const MatrixView& u,
                   const VectorView& s, const MatrixView& vh, const SvdInfo* info) {
  check_options(a, options);
  check_outputs(a, options.rank, u, s, vh, info);
}

void check_workspace(const Context& context, std::size_t wanted) {
  STRUCTMAT_CHECK(context.workspace_bytes >= wanted,
                  "randomized_svd: the workspace has " + std::to_string(context.workspace_bytes) +
                      " bytes, wanted " + std::to_string(wanted));
}

// B = A or A^T, tall.
StridedMatrixView tall_view(const StridedMatrixView& a, const SvdPlan& plan) {
  if (!plan.swapped) return a;
  return {a.data, a.dtype, a.cols, a.rows, a.col_stride, a.row_stride};
}

// The floating-point operations of a decomposition, roughly: what orders the matrices of a list.
double cost_of(const SvdProblem& problem) {
  const double m = static_cast<double>(problem.a.rows), n = static_cast<double>(problem.a.cols);
  const double l = static_cast<double>(problem.options.rank) + 16;
  return 10 * m * n * l + 40 * (m + n) * l * l;
}

template <class T>
void fill_nan(const SvdProblem& problem) {
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  for (const MatrixView& factor : {problem.u, problem.vh})
    for (std::int64_t i = 0; i < factor.rows; ++i)
      std::fill_n(static_cast<T*>(factor.data) + i * factor.row_stride, factor.cols, nan);
  std::fill_n(static_cast<T*>(problem.s.data), problem.s.size, nan);
}

void run_cpu(const Context& context, const SvdProblem& problem) {
  const SvdPlan plan = plan_svd(problem.a.rows, problem.a.cols, problem.options, Device::cpu);
  try {
    randomized_svd_cpu(context, tall_view(problem.a, plan), plan, problem.options.seed, problem.u,
                       problem.s, problem.vh, problem.info);
  } catch (const LinAlgError&) {
    problem.s.dtype == DType::f64 ? fill_nan<double>(problem) : fill_nan<float>(problem);
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    *problem.info = {nan, nan, nan, nan, 0};
  }
}

void run_list_cpu(const Context& context, const SvdProblem* problems, std::int64_t count) {
  std::vector<double> costs;
  for (std::int64_t i = 0; i < count; ++i) costs.push_back(cost_of(problems[i]));
  run_side_by_side(context, costs,
                   [&](const Context& with, std::int64_t i) { run_cpu(with, problems[i]); });
}

SvdLanes lanes_of(const Context& context, const SvdProblem* problems, std::int64_t count) {
  std::vector<std::int64_t> entries;
  std::vector<std::size_t> bytes;
  for (std::int64_t i = 0; i < count; ++i) {
    entries.push_back(problems[i].a.rows * problems[i].a.cols);
    bytes.push_back(randomized_svd_workspace(context, problems[i].a, problems[i].options));
  }
  return {entries, bytes};
}

}  // namespace

void randomized_svd(const Context& context, const StridedMatrixView& a, const SvdOptions& options,
                    MatrixView u, VectorView s, MatrixView vh, SvdInfo* info) {
  check_problem(a, options, u, s, vh, info);
  const SvdPlan plan = plan_svd(a.rows, a.cols, options, context.device);
  if (context.device == Device::cuda) {
    check_workspace(context, randomized_svd_workspace(context, a, options));
    randomized_svd_cuda(context, tall_view(a, plan), plan, options.seed, u, s, vh, info);
  } else {
    randomized_svd_cpu(context, tall_view(a, plan), plan, options.seed, u, s, vh, info);
  }
}

std::size_t randomized_svd_workspace(const Context& context, const StridedMatrixView& a,
                                     const SvdOptions& options) {
  check_options(a, options);
  if (context.device != Device::cuda) return 0;
  const SvdPlan plan = plan_svd(a.rows, a.cols, options, context.device);
  return randomized_svd_workspace_cuda(tall_view(a, plan), plan);
}

void randomized_svd(const Context& context, const SvdProblem* problems, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const SvdProblem& p = problems[i];
    check_problem(p.a, p.options, p.u, p.s, p.vh, p.info);
  }
  if (context.device != Device::cuda) return run_list_cpu(context, problems, count);
  const SvdLanes lanes = lanes_of(context, problems, count);
  check_workspace(context, lanes.bytes);
  run_lanes_cuda(context, lanes, [&](const Context& own, std::int64_t i) {
    const SvdProblem& p = problems[i];
    randomized_svd(own, p.a, p.options, p.u, p.s, p.vh, p.info);
  });
}

SvdToTolerance::SvdToTolerance(const Context& context, const StridedMatrixView& a, double rtol,
                               const SvdOptions& options, const SvdAllocate& allocate)
    : a_(a) {
  check_matrix(a);
  STRUCTMAT_CHECK(rtol > 0 && rtol < 1,
                  op + "rtol is " + std::to_string(rtol) + ", wanted more than 0 and less than 1");
  STRUCTMAT_CHECK(options.rank == 0,
                  op + "rank is " + std::to_string(options.rank) + ", wanted 0 beside a tolerance");
  check_bounds(options);
  SvdOptions one = options;  // sizes and orientation are all that a plan says here
  one.rank = 1;
  const SvdPlan plan = plan_wide(a.rows, a.cols, one);
  if (context.device == Device::cuda) {
    STRUCTMAT_CHECK(allocate != nullptr, op + "allocate is empty, wanted one on a GPU");
    search_ = svd_to_tolerance_cuda(context, tall_view(a, plan), plan, rtol, options, allocate);
  } else {
    search_ = svd_to_tolerance_cpu(context, tall_view(a, plan), plan, rtol, options);
  }
}
SvdToTolerance::SvdToTolerance(SvdToTolerance&&) noexcept = default;
SvdToTolerance& SvdToTolerance::operator=(SvdToTolerance&&) noexcept = default;
SvdToTolerance::~SvdToTolerance() = default;

std::int64_t SvdToTolerance::rank() const {
  return search_->rank();
}

void SvdToTolerance::factors(MatrixView u, VectorView s, MatrixView vh, SvdInfo* info) {
  check_outputs(a_, rank(), u, s, vh, info);
  search_->factors(u, s, vh, info);
}

std::size_t randomized_svd_workspace(const Context& context, const SvdProblem* problems,
                                     std::int64_t count) {
  return lanes_of(context, problems, count).bytes;
}

}  // namespace structmat
