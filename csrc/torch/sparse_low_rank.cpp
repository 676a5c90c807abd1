// SPDX-License-Identifier: Apache-2.0
#include "structmat/sparse_low_rank.h"

#include <tuple>

#include "convert.h"
#include "structmat/sparse_pattern.h"

namespace structmat::torch_bindings {
namespace {

using OptionalTensor = std::optional<Tensor>;

// What the core cannot see of a pattern: types, layout, the sizes of its tensors. Their contents
// are checked where a SparsePattern is made, for reading them here would cost as much as a product
// with one token, and a wait for the device.
SparsePatternView pattern_view(const char* op, const Tensor& like, const Tensor& starts,
                               const Tensor& columns, std::int64_t rows, std::int64_t cols,
                               std::int64_t group, std::int64_t nnz) {
  check_same_device(like, starts, op, "starts");
  check_same_device(like, columns, op, "columns");
  STD_TORCH_CHECK(starts.scalar_type() == ScalarType::Long && starts.dim() == 1 &&
                      columns.scalar_type() == ScalarType::UInt16 && columns.dim() == 1,
                  op, ": a pattern has starts of int64 and columns of uint16");
  STD_TORCH_CHECK(starts.is_contiguous() && columns.is_contiguous(), op,
                  ": the starts and columns of a pattern must be contiguous");
  STD_TORCH_CHECK(rows >= 0 && cols >= 0 && group >= 1, op, ": the pattern is ", rows, " x ", cols,
                  " in groups of ", group, ", wanted no negative size and a row in each group");
  SparsePatternView view{rows, cols, group, nnz};
  view.starts = static_cast<const std::int64_t*>(starts.data_ptr());
  view.columns = static_cast<const std::uint16_t*>(columns.data_ptr());
  const std::int64_t wanted = view.groups() * view.slabs() + 1;
  STD_TORCH_CHECK(starts.numel() == wanted, op, ": starts has ", starts.numel(),
                  " elements, wanted ", wanted, " for a pattern of ", rows, " x ", cols);
  // The last group has fewer rows where `group` does not divide them: nnz tells its columns.
  const std::int64_t count = columns.numel(), last = rows % group, short_by = count * group - nnz;
  const bool fits = last == 0 ? short_by == 0
                              : short_by >= 0 && short_by % (group - last) == 0 &&
                                    short_by / (group - last) <= (rows < group ? count : cols) &&
                                    (rows >= group || short_by / (group - last) == count);
  STD_TORCH_CHECK(fits, op, ": ", nnz, " values do not fit ", count, " columns in groups of ",
                  group, " rows");
  return view;
}

// A vector of values, copied where its elements do not lie side by side.
Tensor side_by_side(const Tensor& t) {
  const bool fine = t.dim() != 1 || t.stride(0) == 1 || t.size(0) <= 1;
  return fine ? t : torch::stable::contiguous(t);
}

// The parts of W; keeps copies alive.
struct Parts {
  std::optional<Tensor> u, v, base;
  Tensor values;
  SparseLowRankWeights weights;

  Parts(const char* op, const Tensor& x, const OptionalTensor& U, const OptionalTensor& V,
        const SparsePatternView& pattern, const Tensor& given_values, const OptionalTensor& W)
      : values(side_by_side(given_values)) {
    STD_TORCH_CHECK(U.has_value() == V.has_value(), op, ": U and V are given together or not");
    weights.pattern = pattern;
    weights.u = part(op, x, U, u, "U");
    weights.v = part(op, x, V, v, "V");
    weights.base = part(op, x, W, base, "base");
    check_same_device(x, values, op, "values");
    weights.values = vector_view(values, op, "values");
  }

 private:
  static ConstMatrixView part(const char* op, const Tensor& x, const OptionalTensor& given,
                              std::optional<Tensor>& kept, const char* name) {
    if (!given) return {};
    check_same_device(x, *given, op, name);
    kept = with_contiguous_rows(*given);
    return matrix_view(*kept, op, name);
  }
};

std::tuple<Tensor, Tensor> sparse_low_rank_linear(const Tensor& x, const OptionalTensor& U,
                                                  const OptionalTensor& V, const Tensor& starts,
                                                  const Tensor& columns, std::int64_t rows,
                                                  std::int64_t cols, std::int64_t group,
                                                  const Tensor& values, const OptionalTensor& bias,
                                                  const OptionalTensor& base, bool keep_hidden) {
  constexpr const char* op = "sparse_low_rank_linear";
  const Rows x_rows(x, op, "x");
  const std::int64_t tokens = x_rows.view.rows;
  const SparsePatternView pattern =
      pattern_view(op, x, starts, columns, rows, cols, group, values.numel());
  const Parts parts(op, x, U, V, pattern, values, base);
  const Bias b(x, bias, op);
  Scope scope(x);
  const std::int64_t rank = parts.weights.u.cols;
  keep_hidden = keep_hidden && U;
  Tensor y = new_rows(x, rows);
  Tensor h = keep_hidden ? new_rows(x, rank) : nothing(x);
  MatrixView hidden;
  if (keep_hidden) hidden = {h.data_ptr(), x_rows.view.dtype, tokens, rank, rank};
  scope.lend_workspace(x, sparse_low_rank_linear_workspace(scope.context, tokens, parts.weights));
  structmat::sparse_low_rank_linear(scope.context, x_rows.view, parts.weights, b.view,
                                    {y.data_ptr(), x_rows.view.dtype, tokens, rows, rows}, hidden);
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sparse_low_rank_linear_backward(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& U, const OptionalTensor& V,
    const Tensor& starts, const Tensor& columns, std::int64_t rows, std::int64_t cols,
    std::int64_t group, const Tensor& values, const OptionalTensor& base,
    const OptionalTensor& transposed_starts, const OptionalTensor& transposed_columns,
    const OptionalTensor& permutation, std::int64_t strip, const OptionalTensor& hidden,
    bool need_x, bool need_V, bool need_values, bool need_bias) {
  constexpr const char* op = "sparse_low_rank_linear_backward";
  const Rows dy_rows(dy, op, "dy");
  const DType dtype = dy_rows.view.dtype;
  const std::int64_t tokens = dy_rows.view.rows, m = rows, nnz = values.numel();
  const SparsePatternView pattern = pattern_view(op, dy, starts, columns, m, cols, group, nnz);
  const Parts parts(op, dy, U, V, pattern, values, base);
  const std::int64_t rank = parts.weights.u.cols;
  const bool need_U = hidden && U;
  need_V = need_V && V;
  std::optional<Rows> x_rows, h_rows;
  if (x) {
    check_same_device(dy, *x, op, "x");
    x_rows.emplace(*x, op, "x");
  }
  STD_TORCH_CHECK(x || !(need_V || need_values), op,
                  ": the gradients of V and of the values need x, got None");
  if (need_U) {
    check_same_device(dy, *hidden, op, "hidden");
    h_rows.emplace(*hidden, op, "hidden");
  }
  SparseTransposeView transpose;
  if (need_x) {
    STD_TORCH_CHECK(transposed_starts && transposed_columns && permutation, op,
                    ": the gradient of x needs the transposed pattern, got None");
    transpose.pattern =
        pattern_view(op, dy, *transposed_starts, *transposed_columns, cols, m, 1, nnz);
    check_same_device(dy, *permutation, op, "permutation");
    STD_TORCH_CHECK(permutation->scalar_type() == ScalarType::Int && permutation->dim() == 1 &&
                        permutation->is_contiguous() && permutation->numel() == nnz,
                    op, ": permutation must be contiguous, of int32, with ", nnz, " elements");
    transpose.permutation = static_cast<const std::int32_t*>(permutation->data_ptr());
    transpose.strip = strip;
  }
  Scope scope(dy);

  SparseLowRankGradients grads;
  Tensor dx = need_x ? new_rows(dy, cols) : nothing(dy);
  Tensor dU = need_U ? new_tensor(*U, {m, rank}) : nothing(dy);
  Tensor dV = need_V ? new_tensor(*V, {rank, cols}) : nothing(dy);
  Tensor dvalues = need_values ? new_tensor(values, {nnz}) : nothing(dy);
  Tensor dbias = need_bias ? new_tensor(dy, {m}) : nothing(dy);
  if (need_x) grads.x = {dx.data_ptr(), dtype, tokens, cols, cols};
  if (need_U) grads.u = {dU.data_ptr(), dtype, m, rank, rank};
  if (need_V) grads.v = {dV.data_ptr(), dtype, rank, cols, cols};
  if (need_values) grads.values = {dvalues.data_ptr(), dtype, nnz};
  if (need_bias) grads.bias = {dbias.data_ptr(), dtype, m};
  scope.lend_workspace(dy, sparse_low_rank_linear_backward_workspace(
                               scope.context, tokens, parts.weights, transpose, grads));
  structmat::sparse_low_rank_linear_backward(
      scope.context, dy_rows.view, x_rows ? x_rows->view : ConstMatrixView(), parts.weights,
      transpose, h_rows ? h_rows->view : ConstMatrixView(), grads);
  return {dx, dU, dV, dvalues, dbias};
}

Tensor sampled_matmul(const Tensor& dy, const Tensor& x, const Tensor& starts,
                      const Tensor& columns, std::int64_t rows, std::int64_t cols,
                      std::int64_t group, std::int64_t nnz) {
  constexpr const char* op = "sampled_matmul";
  const Rows dy_rows(dy, op, "dy"), x_rows(x, op, "x");
  check_same_device(dy, x, op, "x");
  const SparsePatternView pattern = pattern_view(op, dy, starts, columns, rows, cols, group, nnz);
  Scope scope(dy);
  Tensor values = new_tensor(dy, {nnz});
  scope.lend_workspace(
      dy, sampled_matmul_workspace(scope.context, dy_rows.view.rows, pattern, dy_rows.view.dtype));
  structmat::sampled_matmul(scope.context, dy_rows.view, x_rows.view, pattern,
                            {values.data_ptr(), dy_rows.view.dtype, nnz});
  return values;
}

// On the host, where patterns are made.

Tensor random_subsets(const Tensor& like, std::int64_t groups, std::int64_t count,
                      std::int64_t per_group, std::int64_t seed) {
  STD_TORCH_CHECK(like.scalar_type() == ScalarType::Long && !like.is_cuda(),
                  "random_subsets: like must be of int64 on the CPU");
  STD_TORCH_CHECK(seed >= 0, "random_subsets: seed is ", seed, ", wanted 0 to 2^63 - 1");
  Tensor indices = new_tensor(like, {groups, per_group});
  structmat::random_subsets(Context(), groups, count, per_group, static_cast<std::uint64_t>(seed),
                            static_cast<std::int64_t*>(indices.data_ptr()));
  return indices;
}

std::tuple<Tensor, Tensor, Tensor> sparse_transpose(const Tensor& starts, const Tensor& columns,
                                                    std::int64_t rows, std::int64_t cols,
                                                    std::int64_t group, std::int64_t nnz) {
  constexpr const char* op = "sparse_transpose";
  const SparsePatternView pattern =
      pattern_view(op, starts, starts, columns, rows, cols, group, nnz);
  const SparsePatternView transposed{cols, rows};
  Tensor new_starts = new_tensor(starts, {transposed.groups() * transposed.slabs() + 1});
  Tensor new_columns = new_tensor(columns, {nnz});
  Tensor permutation = torch::stable::new_empty(starts, {nnz}, ScalarType::Int);
  structmat::sparse_transpose(Context(), pattern, static_cast<std::int64_t*>(new_starts.data_ptr()),
                              static_cast<std::uint16_t*>(new_columns.data_ptr()),
                              static_cast<std::int32_t*>(permutation.data_ptr()));
  return {new_starts, new_columns, permutation};
}

}  // namespace

STRUCTMAT_REGISTER("sparse_low_rank_linear", &sparse_low_rank_linear)
STRUCTMAT_REGISTER("sparse_low_rank_linear_backward", &sparse_low_rank_linear_backward)
STRUCTMAT_REGISTER("sampled_matmul", &sampled_matmul)
STRUCTMAT_IMPL(CPU, m) {
  m.impl("random_subsets", TORCH_BOX(&random_subsets));
  m.impl("sparse_transpose", TORCH_BOX(&sparse_transpose));
}

}  // namespace structmat::torch_bindings
