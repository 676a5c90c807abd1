// SPDX-License-Identifier: Apache-2.0
#include "structmat/streaming_svd.h"

#include <limits>
#include <tuple>

#include "convert.h"
#include "structmat/error.h"

namespace structmat::torch_bindings {
namespace {

constexpr const char* op = "streaming_svd";

std::tuple<std::int64_t, std::int64_t> shape(std::int64_t n, std::int64_t rank) {
  const StreamingSvdShape found = streaming_svd_shape(n, rank);
  return {found.keep, found.chunk};
}

StreamingSvdState state_of(const Tensor& buffer, const Tensor& factor, const Tensor& mean,
                           const Tensor& facts, std::int64_t rank, double decay, bool center,
                           std::int64_t rows, std::int64_t buffered) {
  check_same_device(buffer, factor, op, "factor");
  check_same_device(buffer, mean, op, "mean");
  check_same_device(buffer, facts, op, "facts");
  StreamingSvdState s;
  s.rank = rank;
  s.decay = decay;
  s.center = center;
  s.buffer = matrix_view(buffer, op, "buffer");
  s.factor = matrix_view(factor, op, "factor");
  s.mean = vector_view(mean, op, "mean");
  s.facts = vector_view(facts, op, "facts");
  s.rows = rows;
  s.buffered = buffered;
  return s;
}

void update(const Tensor& buffer, const Tensor& factor, const Tensor& mean, const Tensor& facts,
            std::int64_t rank, double decay, bool center, std::int64_t seen, std::int64_t buffered,
            const Tensor& rows) {
  StreamingSvdState s = state_of(buffer, factor, mean, facts, rank, decay, center, seen, buffered);
  check_same_device(buffer, rows, op, "rows");
  Scope scope(buffer);
  scope.lend_workspace(buffer, streaming_svd_workspace(scope.context, s));
  streaming_svd_update(scope.context, s, strided_matrix_view(rows, op, "rows"));
}

void update_csr(const Tensor& buffer, const Tensor& factor, const Tensor& mean, const Tensor& facts,
                std::int64_t rank, double decay, bool center, std::int64_t seen,
                std::int64_t buffered, const Tensor& starts, const Tensor& columns,
                const Tensor& values) {
  StreamingSvdState s = state_of(buffer, factor, mean, facts, rank, decay, center, seen, buffered);
  for (const Tensor* t : {&starts, &columns, &values}) {
    check_same_device(buffer, *t, op, "a part of the rows");
    STD_TORCH_CHECK(t->dim() == 1 && (t->stride(0) == 1 || t->size(0) <= 1), op,
                    ": the parts of CSR rows must be contiguous vectors");
  }
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Long &&
                      columns.scalar_type() == ScalarType::Long && starts.size(0) >= 1 &&
                      columns.size(0) == values.size(0),
                  op,
                  ": CSR rows must have int64 indices, one more start than rows and as many "
                  "columns as values");
  CsrView rows;
  rows.starts = static_cast<const std::int64_t*>(starts.data_ptr());
  rows.columns = static_cast<const std::int64_t*>(columns.data_ptr());
  rows.values = values.data_ptr();
  rows.dtype = dtype_of(values, op, "rows");
  rows.rows = starts.size(0) - 1;
  Scope scope(buffer);
  scope.lend_workspace(buffer, streaming_svd_workspace(scope.context, s));
  streaming_svd_update(scope.context, s, rows);
}

// 1, or 0 where there is NaN or Inf.
Tensor check(const Tensor& values) {
  Tensor finite = torch::stable::new_empty(values, {}, ScalarType::Double);
  Scope scope(values);
  streaming_svd_check(scope.context, strided_matrix_view(values, op, "rows"),
                      static_cast<double*>(finite.data_ptr()));
  return finite;
}

void fold(const Tensor& buffer, const Tensor& factor, const Tensor& mean, const Tensor& facts,
          std::int64_t rank, double decay, bool center, std::int64_t seen, std::int64_t buffered) {
  StreamingSvdState s = state_of(buffer, factor, mean, facts, rank, decay, center, seen, buffered);
  Scope scope(buffer);
  scope.lend_workspace(buffer, streaming_svd_workspace(scope.context, s));
  streaming_svd_fold(scope.context, s);
}

void merge(const Tensor& buffer, const Tensor& factor, const Tensor& mean, const Tensor& facts,
           std::int64_t rank, double decay, bool center, std::int64_t seen, std::int64_t buffered,
           const Tensor& other_buffer, const Tensor& other_factor, const Tensor& other_mean,
           const Tensor& other_facts, std::int64_t other_seen, std::int64_t other_buffered) {
  StreamingSvdState s = state_of(buffer, factor, mean, facts, rank, decay, center, seen, buffered);
  const StreamingSvdState other = state_of(other_buffer, other_factor, other_mean, other_facts,
                                           rank, decay, center, other_seen, other_buffered);
  check_same_device(buffer, other_buffer, op, "the other state");
  Scope scope(buffer);
  scope.lend_workspace(buffer, streaming_svd_workspace(scope.context, s));
  streaming_svd_merge(scope.context, s, other);
}

// S, Vh and SvdInfo of a folded state. Where a value is out of range all are NaN and `finite` is 0.
std::tuple<Tensor, Tensor, Tensor> result(const Tensor& buffer, const Tensor& factor,
                                          const Tensor& mean, const Tensor& facts,
                                          std::int64_t rank, double decay, bool center,
                                          std::int64_t seen, std::int64_t seed) {
  STD_TORCH_CHECK(seed >= 0, op, ": seed is ", seed, ", wanted 0 to 2^63 - 1");
  const StreamingSvdState s = state_of(buffer, factor, mean, facts, rank, decay, center, seen, 0);
  const auto dtype = s.buffer.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  Scope scope(buffer);
  scope.lend_workspace(buffer, streaming_svd_workspace(scope.context, s));
  Tensor S = torch::stable::new_empty(buffer, {rank}, dtype);
  Tensor Vh = torch::stable::new_empty(buffer, {rank, s.buffer.cols}, dtype);
  Tensor info = torch::stable::new_empty(
      buffer, {static_cast<std::int64_t>(sizeof(SvdInfo) / sizeof(double))}, ScalarType::Double);
  auto* found = static_cast<SvdInfo*>(info.data_ptr());
  try {
    streaming_svd_result(scope.context, s, static_cast<std::uint64_t>(seed),
                         vector_view(S, op, "S"), matrix_view(Vh, op, "Vh"), found);
  } catch (const LinAlgError&) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    for (Tensor* t : {&S, &Vh}) torch::stable::fill_(*t, nan);
    *found = {nan, nan, nan, nan, 0};
  }
  return {S, Vh, info};
}

}  // namespace

STRUCTMAT_IMPL(CompositeExplicitAutograd, m) {
  m.impl("streaming_svd_shape", TORCH_BOX(&shape));
}
STRUCTMAT_REGISTER("streaming_svd_update", &update)
STRUCTMAT_REGISTER("streaming_svd_update_csr", &update_csr)
STRUCTMAT_REGISTER("streaming_svd_check", &check)
STRUCTMAT_REGISTER("streaming_svd_fold", &fold)
STRUCTMAT_REGISTER("streaming_svd_merge", &merge)
STRUCTMAT_REGISTER("streaming_svd_result", &result)

}  // namespace structmat::torch_bindings
