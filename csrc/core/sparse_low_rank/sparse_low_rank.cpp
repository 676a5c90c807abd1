// SPDX-License-Identifier: Apache-2.0
#include "structmat/sparse_low_rank.h"

#include "checker.h"
#include "sparse_low_rank/sparse_low_rank_kernels.h"

namespace structmat {
namespace {

bool has(const ConstMatrixView& a) {
  return a.data != nullptr;
}

void check_pattern(const char* op, const SparsePatternView& pattern) {
  const std::string prefix = std::string(op) + ": the pattern ";
  STRUCTMAT_CHECK(pattern.rows >= 0 && pattern.cols >= 0 && pattern.group >= 1,
                  prefix + "has a negative size or no rows in a group");
  STRUCTMAT_CHECK(pattern.nnz >= 0 && pattern.nnz <= sparse_most_entries,
                  prefix + "has " + std::to_string(pattern.nnz) + " entries, at most " +
                      std::to_string(sparse_most_entries) + " work");
}

// Shapes of the parts of W (m, n).
void check_weights(const char* op, const Checker& check, const SparseLowRankWeights& weights) {
  check_pattern(op, weights.pattern);
  const std::int64_t m = weights.pattern.rows, n = weights.pattern.cols, r = weights.u.cols;
  if (r > 0 || has(weights.u) || has(weights.v)) {
    check.matrix("U", weights.u, m, r);
    check.matrix("V", weights.v, r, n);
  }
  check.vector("values", weights.values, weights.pattern.nnz);
  if (has(weights.base)) {
    const bool narrow = weights.values.dtype == DType::f32 && size_of(weights.base.dtype) == 2;
    (narrow ? Checker(op, weights.base.dtype) : check).matrix("base", weights.base, m, n);
  }
}

}  // namespace

std::size_t sparse_low_rank_linear_workspace(const Context& context, std::int64_t tokens,
                                             const SparseLowRankWeights& weights) {
  if (context.device == Device::cpu) return 0;
  return sparse_low_rank_linear_workspace_cuda(tokens, weights);
}

std::size_t sparse_low_rank_linear_backward_workspace(const Context& context, std::int64_t tokens,
                                                      const SparseLowRankWeights& weights,
                                                      const SparseTransposeView& transpose,
                                                      const SparseLowRankGradients& grads) {
  if (context.device == Device::cpu) return 0;
  return sparse_low_rank_linear_backward_workspace_cuda(tokens, weights, transpose, grads);
}

std::size_t sampled_matmul_workspace(const Context& context, std::int64_t tokens,
                                     const SparsePatternView& pattern, DType dtype) {
  if (context.device == Device::cpu) return 0;
  return sampled_matmul_workspace_cuda(tokens, pattern, dtype);
}

void sparse_low_rank_linear(const Context& context, ConstMatrixView x,
                            const SparseLowRankWeights& weights, ConstVectorView bias, MatrixView y,
                            MatrixView hidden) {
  constexpr const char* op = "sparse_low_rank_linear";
  const Checker check(op, x.dtype);
  check_weights(op, check, weights);
  const std::int64_t tokens = x.rows, m = weights.pattern.rows;
  check.matrix("x", x, tokens, weights.pattern.cols);
  if (bias.data != nullptr) check.vector("bias", bias, m);
  check.matrix("y", y, tokens, m);
  if (hidden.data != nullptr) check.matrix("hidden", hidden, tokens, weights.u.cols);
  check.workspace(context, sparse_low_rank_linear_workspace(context, tokens, weights));
  if (context.device == Device::cuda)
    sparse_low_rank_linear_cuda(context, x, weights, bias, y, hidden);
  else
    sparse_low_rank_linear_cpu(context, x, weights, bias, y, hidden);
}

void sparse_low_rank_linear_backward(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                                     const SparseLowRankWeights& weights,
                                     const SparseTransposeView& transpose, ConstMatrixView hidden,
                                     const SparseLowRankGradients& grads) {
  constexpr const char* op = "sparse_low_rank_linear_backward";
  const Checker check(op, dy.dtype);
  check_weights(op, check, weights);
  const std::int64_t tokens = dy.rows, m = weights.pattern.rows, n = weights.pattern.cols;
  const std::int64_t r = weights.u.cols;
  check.matrix("dy", dy, tokens, m);
  if (grads.x.data != nullptr) {
    check.matrix("the gradient of x", grads.x, tokens, n);
    check_pattern(op, transpose.pattern);
    STRUCTMAT_CHECK(transpose.pattern.rows == n && transpose.pattern.cols == m &&
                        transpose.pattern.nnz == weights.pattern.nnz,
                    std::string(op) + ": the transposed pattern is of another matrix");
    STRUCTMAT_CHECK(transpose.pattern.group == 1 &&
                        (transpose.permutation != nullptr || weights.pattern.nnz == 0),
                    std::string(op) +
                        ": the transposed pattern needs rows in groups of 1, and a "
                        "permutation");
    STRUCTMAT_CHECK(transpose.strip == 1 || (transpose.strip == 16 && weights.pattern.group == 16),
                    std::string(op) + ": the transposed pattern has strips of " +
                        std::to_string(transpose.strip) +
                        " rows, wanted 1, or 16 beside a pattern of groups");
  }
  if (grads.u.data != nullptr) {
    check.matrix("hidden", hidden, tokens, r);
    check.matrix("the gradient of U", grads.u, m, r);
  }
  if (grads.v.data != nullptr || grads.values.data != nullptr) check.matrix("x", x, tokens, n);
  if (grads.v.data != nullptr) check.matrix("the gradient of V", grads.v, r, n);
  if (grads.values.data != nullptr)
    check.vector("the gradient of values", grads.values, weights.pattern.nnz);
  if (grads.bias.data != nullptr) check.vector("the gradient of bias", grads.bias, m);
  check.workspace(context, sparse_low_rank_linear_backward_workspace(context, tokens, weights,
                                                                     transpose, grads));
  if (context.device == Device::cuda)
    sparse_low_rank_linear_backward_cuda(context, dy, x, weights, transpose, hidden, grads);
  else
    sparse_low_rank_linear_backward_cpu(context, dy, x, weights, transpose, hidden, grads);
}

void sampled_matmul(const Context& context, ConstMatrixView dy, ConstMatrixView x,
                    const SparsePatternView& pattern, VectorView values) {
  constexpr const char* op = "sampled_matmul";
  const Checker check(op, dy.dtype);
  check_pattern(op, pattern);
  check.matrix("dy", dy, dy.rows, pattern.rows);
  check.matrix("x", x, dy.rows, pattern.cols);
  check.vector("values", values, pattern.nnz);
  check.workspace(context, sampled_matmul_workspace(context, dy.rows, pattern, dy.dtype));
  if (context.device == Device::cuda)
    sampled_matmul_cuda(context, dy, x, pattern, values);
  else
    sampled_matmul_cpu(context, dy, x, pattern, values);
}

}  // namespace structmat
