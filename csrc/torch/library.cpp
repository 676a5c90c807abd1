// SPDX-License-Identifier: Apache-2.0
// Every operator's schema, one line each: the index of operators.
#include "convert.h"

namespace structmat::torch_bindings {
namespace {

bool has_cuda() {
#ifdef STRUCTMAT_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

STRUCTMAT_LIBRARY(m) {
  m.def("has_cuda() -> bool");
  m.def("block_svd(Tensor A, int rank) -> (Tensor U, Tensor S, Tensor Vh, Tensor norms)");
  m.def(
      "block_sweep(Tensor A, Tensor X, Tensor(a!) Y, Tensor(b!) Z, Tensor(c!) facts, bool measure) "
      "-> ()");
  m.def("gram_matmul(Tensor A, Tensor X) -> Tensor");
  m.def("gram_matmul_moments(Tensor A, Tensor X) -> (Tensor Z, Tensor sums, Tensor norm)");
  m.def("orthonormalize(Tensor Y, int seed) -> (Tensor Q, Tensor residual)");
  m.def(
      "range_step(Tensor[] A, Tensor[] Q, int seed) -> "
      "(Tensor[] P, Tensor[] next, Tensor[] B, Tensor finite)");
  m.def("gaussian(Tensor like, int rows, int cols, int seed, int stream) -> Tensor");
  m.def(
      "kronecker_sparse_linear(Tensor x, Tensor W, Tensor? bias=None, int activation=0) -> "
      "Tensor");
  m.def(
      "kronecker_sparse_linear_backward(Tensor dy, Tensor? x, Tensor W, bool need_x, bool need_W, "
      "bool need_bias) -> (Tensor dx, Tensor dW, Tensor dbias)");
  m.def("low_rank_linear(Tensor x, Tensor U, Tensor V, Tensor? bias=None) -> Tensor");
  m.def(
      "low_rank_linear_train(Tensor x, Tensor U, Tensor V, Tensor? bias, bool keep_hidden) -> "
      "(Tensor y, Tensor hidden)");
  m.def(
      "low_rank_linear_backward(Tensor dy, Tensor? x, Tensor U, Tensor V, Tensor? hidden, "
      "bool need_x, bool need_bias) -> (Tensor dx, Tensor dU, Tensor dV, Tensor dbias)");
  m.def(  // activation: 0 none, 1 relu, 2 gelu, 3 silu
      "monarch_linear(Tensor x, Tensor W1, Tensor W2, Tensor? bias=None, int activation=0, "
      "bool interleaved_hidden=False, bool interleaved_output=False) -> Tensor");
  m.def(
      "monarch_linear_train(Tensor x, Tensor W1, Tensor W2, Tensor? bias, bool interleaved_hidden, "
      "bool interleaved_output, bool keep_hidden) -> (Tensor y, Tensor hidden)");
  m.def(
      "monarch_linear_backward(Tensor dy, Tensor? x, Tensor W1, Tensor W2, Tensor? hidden, "
      "bool interleaved_hidden, bool interleaved_output, bool need_x, bool need_W1, bool need_W2, "
      "bool need_bias) -> (Tensor dx, Tensor dW1, Tensor dW2, Tensor dbias)");
  m.def(  // on the CPU alone
      "svd_tail(Tensor A, int rank, int? oversample, int seed) -> "
      "(Tensor U, Tensor S, Tensor Vh, Tensor info)");
  m.def(
      "randomized_svd(Tensor A, int rank, int? oversample, int? sweeps, int seed, "
      "bool center) -> "
      "(Tensor U, Tensor S, Tensor Vh, Tensor info)");
  m.def(
      "randomized_svd_list(Tensor[] A, int[] rank, int? oversample, int? sweeps, int seed, "
      "bool center) -> "
      "(Tensor[] U, Tensor[] S, Tensor[] Vh, Tensor info)");
  m.def(
      "randomized_svd_to_tolerance(Tensor A, float rtol, int? oversample, int? sweeps, int seed, "
      "bool center) -> (Tensor U, Tensor S, Tensor Vh, Tensor info)");
  m.def(  // its kernel is python/structmat/linalg/svd_gradient.py
      "randomized_svd_backward(Tensor A, Tensor U, Tensor S, Tensor Vh, Tensor? dU, Tensor? dS, "
      "Tensor? dVh, bool center) -> Tensor");
  m.def("random_subsets(Tensor like, int groups, int count, int per_group, int seed) -> Tensor");
  m.def(
      "sampled_matmul(Tensor dy, Tensor x, Tensor starts, Tensor columns, int rows, int cols, "
      "int group, int nnz) -> Tensor");
  m.def(
      "sparse_low_rank_linear(Tensor x, Tensor? U, Tensor? V, Tensor starts, Tensor columns, "
      "int rows, int cols, int group, Tensor values, Tensor? bias, Tensor? base, bool keep_hidden) "
      "-> (Tensor y, Tensor hidden)");
  m.def(
      "sparse_low_rank_linear_backward(Tensor dy, Tensor? x, Tensor? U, Tensor? V, Tensor starts, "
      "Tensor columns, int rows, int cols, int group, Tensor values, Tensor? base, "
      "Tensor? transposed_starts, Tensor? transposed_columns, Tensor? permutation, int strip, "
      "Tensor? hidden, bool need_x, bool need_V, bool need_values, bool need_bias) -> "
      "(Tensor dx, Tensor dU, Tensor dV, Tensor dvalues, Tensor dbias)");
  m.def(
      "sparse_transpose(Tensor starts, Tensor columns, int rows, int cols, int group, int nnz) -> "
      "(Tensor starts, Tensor columns, Tensor permutation)");
  m.def("streaming_svd_shape(int n, int rank) -> (int keep, int chunk)");
  m.def("streaming_svd_check(Tensor rows) -> Tensor");
  m.def(
      "streaming_svd_update(Tensor(a!) buffer, Tensor(b!) factor, Tensor(c!) mean, "
      "Tensor(d!) facts, int rank, float decay, bool center, int seen, int buffered, Tensor rows) "
      "-> ()");
  m.def(
      "streaming_svd_update_csr(Tensor(a!) buffer, Tensor(b!) factor, Tensor(c!) mean, "
      "Tensor(d!) facts, int rank, float decay, bool center, int seen, int buffered, "
      "Tensor starts, Tensor columns, Tensor values) -> ()");
  m.def(
      "streaming_svd_fold(Tensor(a!) buffer, Tensor(b!) factor, Tensor(c!) mean, "
      "Tensor(d!) facts, int rank, float decay, bool center, int seen, int buffered) -> ()");
  m.def(
      "streaming_svd_merge(Tensor(a!) buffer, Tensor(b!) factor, Tensor(c!) mean, "
      "Tensor(d!) facts, int rank, float decay, bool center, int seen, int buffered, "
      "Tensor other_buffer, Tensor other_factor, Tensor other_mean, Tensor other_facts, "
      "int other_seen, int other_buffered) -> ()");
  m.def(
      "streaming_svd_result(Tensor buffer, Tensor factor, Tensor mean, Tensor facts, int rank, "
      "float decay, bool center, int seen, int seed) -> (Tensor S, Tensor Vh, Tensor info)");
}
STRUCTMAT_IMPL(CompositeExplicitAutograd, m) {
  m.impl("has_cuda", TORCH_BOX(&has_cuda));
}

}  // namespace structmat::torch_bindings
