// SPDX-License-Identifier: Apache-2.0
#include "structmat/linalg.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "linalg/linalg_kernels.h"
#include "side_by_side.h"
#include "structmat/error.h"

namespace structmat {
namespace {

std::string shape(std::int64_t rows, std::int64_t cols) {
  std::string out = "(";
  return out.append(std::to_string(rows)).append(", ").append(std::to_string(cols)).append(")");
}

void check_workspace(const Context& context, std::size_t wanted, const char* op) {
  STRUCTMAT_CHECK(context.workspace_bytes >= wanted, std::string(op) + ": the workspace has " +
                                                         std::to_string(context.workspace_bytes) +
                                                         " bytes, wanted " +
                                                         std::to_string(wanted));
}

void check_panel(const StridedMatrixView& y) {
  STRUCTMAT_CHECK(y.rows >= y.cols, "orthonormalize: Y has shape " + shape(y.rows, y.cols) +
                                        ", wanted at least as many rows as columns");
  STRUCTMAT_CHECK(y.cols <= 20000, "orthonormalize: Y has " + std::to_string(y.cols) +
                                       " columns, wanted at most 20000 (LAPACK counts in 32 bits)");
}

void check_operands(const StridedMatrixView& a, const StridedMatrixView& x) {
  STRUCTMAT_CHECK(a.cols == x.rows, "gram_matmul: A has shape " + shape(a.rows, a.cols) +
                                        ", X has shape " + shape(x.rows, x.cols) + ", wanted " +
                                        std::to_string(a.cols) + " rows");
  STRUCTMAT_CHECK(a.dtype == x.dtype, std::string("gram_matmul: X is ") + name_of(x.dtype) +
                                          ", wanted " + name_of(a.dtype) + " as A");
  STRUCTMAT_CHECK(
      x.cols <= std::numeric_limits<std::int32_t>::max(),
      "gram_matmul: X has " + std::to_string(x.cols) + " columns, wanted fewer than 2^31");
}

void check_part(const MatrixView& part, DType dtype, std::int64_t rows, std::int64_t cols,
                const char* op, const char* name) {
  STRUCTMAT_CHECK(part.dtype == dtype && part.rows == rows && part.cols == cols,
                  std::string(op) + ": " + name + " is " + name_of(part.dtype) + " " +
                      shape(part.rows, part.cols) + ", wanted " + name_of(dtype) + " " +
                      shape(rows, cols));
}

void check_step(const RangeStep& s) {
  const std::int64_t m = s.a.rows, n = s.a.cols, r = s.q.cols;
  const DType dtype = s.a.dtype == DType::f64 ? DType::f64 : DType::f32;
  STRUCTMAT_CHECK(s.q.dtype == dtype, std::string("range_step: Q is ") + name_of(s.q.dtype) +
                                          ", wanted " + name_of(dtype) + " for A of " +
                                          name_of(s.a.dtype));
  STRUCTMAT_CHECK(s.q.rows == n && r <= std::min(m, n),
                  "range_step: A has shape " + shape(m, n) + ", Q " + shape(s.q.rows, r) +
                      ", wanted " + std::to_string(n) + " rows and at most " +
                      std::to_string(std::min(m, n)) + " columns");
  STRUCTMAT_CHECK(r <= 20000, "range_step: Q has " + std::to_string(r) +
                                  " columns, wanted at most 20000 (LAPACK counts in 32 bits)");
  check_part(s.p, dtype, m, r, "range_step", "P");
  check_part(s.next, dtype, n, r, "range_step", "the next Q");
  check_part(s.b, dtype, n, r, "range_step", "B");
  STRUCTMAT_CHECK(s.finite != nullptr, "range_step: finite is null");
}

}  // namespace

void orthonormalize(const Context& context, const StridedMatrixView& y, std::uint64_t seed,
                    MatrixView q, VectorView residual) {
  check_panel(y);
  const DType dtype = y.dtype == DType::f64 ? DType::f64 : DType::f32;
  STRUCTMAT_CHECK(q.dtype == dtype && q.rows == y.rows && q.cols == y.cols,
                  std::string("orthonormalize: Q is ") + name_of(q.dtype) + " " +
                      shape(q.rows, q.cols) + ", wanted " + name_of(dtype) + " " +
                      shape(y.rows, y.cols));
  STRUCTMAT_CHECK(residual.dtype == DType::f64 && residual.size == y.cols,
                  std::string("orthonormalize: residual is ") + name_of(residual.dtype) + " (" +
                      std::to_string(residual.size) + ",), wanted float64 (" +
                      std::to_string(y.cols) + ",)");
  if (y.cols == 0) return;
  check_workspace(context, orthonormalize_workspace(context, y), "orthonormalize");
  if (context.device == Device::cuda)
    orthonormalize_cuda(context, y, seed, q, residual);
  else
    orthonormalize_cpu(context, y, seed, q, residual);
}

std::size_t orthonormalize_workspace(const Context& context, const StridedMatrixView& y) {
  check_panel(y);
  return context.device == Device::cuda && y.cols > 0 ? orthonormalize_workspace_cuda(y) : 0;
}

void gram_matmul(const Context& context, const StridedMatrixView& a, const StridedMatrixView& x,
                 MatrixView z, GramMoments moments) {
  check_operands(a, x);
  STRUCTMAT_CHECK(z.dtype == a.dtype && z.rows == a.cols && z.cols == x.cols,
                  std::string("gram_matmul: Z is ") + name_of(z.dtype) + " " +
                      shape(z.rows, z.cols) + ", wanted " + name_of(a.dtype) + " " +
                      shape(a.cols, x.cols));
  const VectorView& sums = moments.column_sums;
  STRUCTMAT_CHECK(sums.data == nullptr || (sums.dtype == DType::f64 && sums.size == a.cols),
                  std::string("gram_matmul: column_sums is ") + name_of(sums.dtype) + " (" +
                      std::to_string(sums.size) + ",), wanted float64 (" + std::to_string(a.cols) +
                      ",)");
  if ((z.rows == 0 || z.cols == 0) && sums.data == nullptr && moments.norm == nullptr) return;
  check_workspace(context, gram_matmul_workspace(context, a, x), "gram_matmul");
  if (context.device == Device::cuda)
    gram_matmul_cuda(context, a, x, z, moments);
  else
    gram_matmul_cpu(context, a, x, z, moments);
}

std::size_t gram_matmul_workspace(const Context& context, const StridedMatrixView& a,
                                  const StridedMatrixView& x) {
  check_operands(a, x);
  return context.device == Device::cuda ? gram_matmul_workspace_cuda(a, x) : 0;
}

void range_step(const Context& context, const RangeStep* steps, std::int64_t count,
                std::uint64_t seed) {
  const std::size_t wanted = range_step_workspace(context, steps, count);
  if (context.device == Device::cuda) {
    check_workspace(context, wanted, "range_step");
    for (std::int64_t i = 0; i < count; ++i) range_step_cuda(context, steps[i], seed);
    return;
  }
  std::vector<double> costs;
  for (std::int64_t i = 0; i < count; ++i) {
    const double m = static_cast<double>(steps[i].a.rows), n = static_cast<double>(steps[i].a.cols);
    const double r = static_cast<double>(steps[i].q.cols);
    costs.push_back(4 * m * n * r + 12 * (m + n) * r * r);
  }
  run_side_by_side(context, costs, [&](const Context& with, std::int64_t i) {
    range_step_cpu(with, steps[i], seed);
  });
}

std::size_t range_step_workspace(const Context& context, const RangeStep* steps,
                                 std::int64_t count) {
  std::size_t most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    check_step(steps[i]);
    if (context.device == Device::cuda) most = std::max(most, range_step_workspace_cuda(steps[i]));
  }
  return most;
}

void svd_tail(const Context& context, const StridedMatrixView& a, const SvdTailOptions& options,
              MatrixView u, VectorView s, MatrixView vh, SvdInfo* info) {
  const std::string op = "svd_tail: ";
  const std::int64_t k = options.rank, small = std::min(a.rows, a.cols);
  STRUCTMAT_CHECK(context.device == Device::cpu, op + "runs on the CPU alone");
  STRUCTMAT_CHECK(small > 0, op + "A is empty, shape " + shape(a.rows, a.cols));
  STRUCTMAT_CHECK(k >= 1 && k <= small, op + "rank is " + std::to_string(k) + ", wanted 1 to " +
                                            std::to_string(small) + " for A of shape " +
                                            shape(a.rows, a.cols));
  STRUCTMAT_CHECK(
      options.oversample.value_or(0) >= 0,
      op + "oversample is " + std::to_string(*options.oversample) + ", wanted at least 0");
  STRUCTMAT_CHECK(small <= 20000,
                  op + "A has shape " + shape(a.rows, a.cols) +
                      ", wanted a side of at most 20000 (LAPACK counts in 32 bits)");
  STRUCTMAT_CHECK(std::max(a.rows, a.cols) <= std::numeric_limits<std::int32_t>::max(),
                  op + "A has shape " + shape(a.rows, a.cols) +
                      ", wanted sides below 2^31 (LAPACK counts in 32 bits)");
  const DType dtype = a.dtype == DType::f64 ? DType::f64 : DType::f32;
  check_part(u, dtype, a.rows, k, "svd_tail", "U");
  check_part(vh, dtype, k, a.cols, "svd_tail", "Vh");
  STRUCTMAT_CHECK(s.dtype == dtype && s.size == k,
                  op + "S is " + name_of(s.dtype) + " (" + std::to_string(s.size) + ",), wanted " +
                      name_of(dtype) + " (" + std::to_string(k) + ",)");
  STRUCTMAT_CHECK(info != nullptr, op + "info is null");
  svd_tail_cpu(context, a, options, u, s, vh, info);
}

}  // namespace structmat
