// SPDX-License-Identifier: Apache-2.0
#include "structmat/svd.h"

#include <string>

#include "structmat/error.h"
#include "svd/svd_kernels.h"

namespace structmat {
namespace {

std::string shape(std::int64_t rows, std::int64_t cols) {
  std::string out = "(";
  return out.append(std::to_string(rows)).append(", ").append(std::to_string(cols)).append(")");
}

void check_options(const StridedMatrixView& a, const SvdOptions& options) {
  const std::string op = "randomized_svd: ";
  STRUCTMAT_CHECK(a.rows > 0 && a.cols > 0, op + "A is empty, shape " + shape(a.rows, a.cols));
  STRUCTMAT_CHECK(options.rank >= 1 && options.rank <= std::min(a.rows, a.cols),
                  op + "rank is " + std::to_string(options.rank) + ", wanted 1 to " +
                      std::to_string(std::min(a.rows, a.cols)) + " for A of shape " +
                      shape(a.rows, a.cols));
  STRUCTMAT_CHECK(
      options.oversample.value_or(0) >= 0,
      op + "oversample is " + std::to_string(*options.oversample) + ", wanted at least 0");
  STRUCTMAT_CHECK(options.sweeps.value_or(2) >= 2,
                  op + "sweeps is " + std::to_string(*options.sweeps) +
                      ", wanted at least 2 (one pass finds a range, one more the factors)");
}

void check_output(const void* data, DType dtype, DType wanted_dtype, std::int64_t rows,
                  std::int64_t cols, std::int64_t wanted_rows, std::int64_t wanted_cols,
                  const char* name) {
  STRUCTMAT_CHECK(
      data != nullptr && dtype == wanted_dtype && rows == wanted_rows && cols == wanted_cols,
      std::string("randomized_svd: ") + name + " is " + name_of(dtype) + " " + shape(rows, cols) +
          ", wanted " + name_of(wanted_dtype) + " " + shape(wanted_rows, wanted_cols));
}

// B = A or A^T, tall.
StridedMatrixView tall_view(const StridedMatrixView& a, const SvdPlan& plan) {
  if (!plan.swapped) return a;
  return {a.data, a.dtype, a.cols, a.rows, a.col_stride, a.row_stride};
}

}  // namespace

void randomized_svd(const Context& context, const StridedMatrixView& a, const SvdOptions& options,
                    MatrixView u, VectorView s, MatrixView vh, SvdInfo* info) {
  check_options(a, options);
  const DType dtype = a.dtype == DType::f64 ? DType::f64 : DType::f32;
  const std::int64_t k = options.rank;
  check_output(u.data, u.dtype, dtype, u.rows, u.cols, a.rows, k, "U");
  check_output(s.data, s.dtype, dtype, s.size, 1, k, 1, "S");
  check_output(vh.data, vh.dtype, dtype, vh.rows, vh.cols, k, a.cols, "Vh");
  STRUCTMAT_CHECK(info != nullptr, "randomized_svd: info is null");
  const SvdPlan plan = plan_svd(a.rows, a.cols, options, context.device);
  if (context.device == Device::cuda) {
    const std::size_t wanted = randomized_svd_workspace(context, a, options);
    STRUCTMAT_CHECK(context.workspace_bytes >= wanted,
                    "randomized_svd: the workspace has " + std::to_string(context.workspace_bytes) +
                        " bytes, wanted " + std::to_string(wanted));
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

}  // namespace structmat
