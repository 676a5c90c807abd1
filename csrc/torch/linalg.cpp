// SPDX-License-Identifier: Apache-2.0
#include "structmat/linalg.h"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "convert.h"
#include "structmat/error.h"

namespace structmat::torch_bindings {
namespace {

// The matrices of t (..., rows, cols), one after another.
class Batch {
 public:
  Batch(const Tensor& t, const char* op, const char* name) : tensor_(t) {
    STD_TORCH_CHECK(t.dim() >= 2, op, ": ", name, " must have at least 2 dimensions, got ",
                    t.dim());
    dtype_ = dtype_of(t, op, name);
    const auto d = static_cast<std::size_t>(t.dim());
    rows_ = t.size(t.dim() - 2), cols_ = t.size(t.dim() - 1);
    for (std::size_t i = 0; i + 2 < d; ++i) {
      sizes_.push_back(t.sizes()[i]);
      count_ *= sizes_.back();
    }
  }
  std::int64_t count() const { return count_; }
  const std::vector<std::int64_t>& sizes() const { return sizes_; }
  StridedMatrixView operator[](std::int64_t index) const {
    std::int64_t offset = 0;
    for (std::size_t i = sizes_.size(); i-- > 0;) {
      offset += index % sizes_[i] * tensor_.stride(static_cast<std::int64_t>(i));
      index /= sizes_[i];
    }
    const std::int64_t d = tensor_.dim();
    const char* data = static_cast<const char*>(tensor_.data_ptr()) +
                       offset * static_cast<std::int64_t>(size_of(dtype_));
    return {data, dtype_, rows_, cols_, tensor_.stride(d - 2), tensor_.stride(d - 1)};
  }

 private:
  const Tensor& tensor_;
  DType dtype_ = DType::f32;
  std::vector<std::int64_t> sizes_;
  std::int64_t count_ = 1, rows_ = 0, cols_ = 0;
};

// Q and the residuals. Where Y holds NaN or Inf both are NaN, on the CPU too: the Python function
// raises, compiled graphs go on with NaN.
std::tuple<Tensor, Tensor> orthonormalize(const Tensor& Y, std::int64_t seed) {
  constexpr const char* op = "orthonormalize";
  STD_TORCH_CHECK(seed >= 0, op, ": seed is ", seed, ", wanted 0 to 2^63 - 1");
  const Batch batch(Y, op, "Y");
  std::vector<std::int64_t> sizes = batch.sizes();
  const std::int64_t m = Y.size(Y.dim() - 2), l = Y.size(Y.dim() - 1);
  const bool wide = Y.scalar_type() == ScalarType::Double;
  const DType dtype = wide ? DType::f64 : DType::f32;
  sizes.push_back(l);
  Tensor residual = torch::stable::new_empty(Y, sizes, ScalarType::Double);
  sizes.back() = m;
  sizes.push_back(l);
  Tensor Q = torch::stable::new_empty(Y, sizes, wide ? ScalarType::Double : ScalarType::Float);
  Scope scope(Y);
  const StridedMatrixView shape{nullptr, dtype, m, l, l, 1};
  scope.lend_workspace(Y, orthonormalize_workspace(scope.context, shape));
  for (std::int64_t i = 0; i < batch.count(); ++i) {
    auto* q =
        static_cast<char*>(Q.data_ptr()) + i * m * l * static_cast<std::int64_t>(size_of(dtype));
    auto* r = static_cast<double*>(residual.data_ptr()) + i * l;
    try {
      structmat::orthonormalize(scope.context, batch[i], static_cast<std::uint64_t>(seed),
                                {q, dtype, m, l, l}, {r, l});
    } catch (const LinAlgError&) {
      constexpr double nan = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(r, l, nan);
      if (wide)
        std::fill_n(reinterpret_cast<double*>(q), m * l, nan);
      else
        std::fill_n(reinterpret_cast<float*>(q), m * l, std::numeric_limits<float>::quiet_NaN());
    }
  }
  return {Q, residual};
}

// Z, and with moments the column sums (..., n) and the norms (...), float64.
std::tuple<Tensor, Tensor, Tensor> gram(const Tensor& A, const Tensor& X, bool moments) {
  constexpr const char* op = "gram_matmul";
  check_same_device(A, X, op, "X");
  const Batch a(A, op, "A"), x(X, op, "X");
  STD_TORCH_CHECK(a.sizes() == x.sizes(), op, ": A and X have other leading dimensions");
  const std::int64_t n = A.size(A.dim() - 1), l = X.size(X.dim() - 1);
  std::vector<std::int64_t> sizes = a.sizes();
  sizes.push_back(n);
  Tensor sums = torch::stable::new_empty(A, moments ? sizes : std::vector<std::int64_t>{0},
                                         ScalarType::Double);
  Tensor norm = torch::stable::new_empty(A, moments ? a.sizes() : std::vector<std::int64_t>{0},
                                         ScalarType::Double);
  sizes.push_back(l);
  Tensor Z = torch::stable::new_empty(A, sizes);
  const DType dtype = dtype_of(A, op, "A");
  Scope scope(A);
  if (a.count() > 0) scope.lend_workspace(A, gram_matmul_workspace(scope.context, a[0], x[0]));
  for (std::int64_t i = 0; i < a.count(); ++i) {
    GramMoments wanted;
    if (moments)
      wanted = {{static_cast<double*>(sums.data_ptr()) + i * n, n},
                static_cast<double*>(norm.data_ptr()) + i};
    structmat::gram_matmul(
        scope.context, a[i], x[i],
        {static_cast<char*>(Z.data_ptr()) + i * n * l * static_cast<std::int64_t>(size_of(dtype)),
         dtype, n, l, l},
        wanted);
  }
  return {Z, sums, norm};
}

Tensor gram_matmul(const Tensor& A, const Tensor& X) {
  return std::get<0>(gram(A, X, false));
}

std::tuple<Tensor, Tensor, Tensor> gram_matmul_moments(const Tensor& A, const Tensor& X) {
  return gram(A, X, true);
}

// (..., rows, cols) like `like`, float32 or float64, and its matrices' views.
class Result {
 public:
  Result(const Tensor& like, const Batch& batch, DType dtype, std::int64_t rows, std::int64_t cols)
      : dtype_(dtype), rows_(rows), cols_(cols) {
    std::vector<std::int64_t> sizes = batch.sizes();
    sizes.push_back(rows);
    sizes.push_back(cols);
    tensor = torch::stable::new_empty(like, sizes,
                                      dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  }
  MatrixView operator[](std::int64_t index) const {
    const std::int64_t offset = index * rows_ * cols_ * static_cast<std::int64_t>(size_of(dtype_));
    return {static_cast<char*>(tensor.data_ptr()) + offset, dtype_, rows_, cols_, cols_};
  }
  Tensor tensor;

 private:
  DType dtype_;
  std::int64_t rows_, cols_;
};

// `finite` has an entry for every matrix; where it is 0 results are NaN, on the CPU too: the Python
// function raises, compiled graphs go on with NaN.
std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor> range_step(
    const std::vector<Tensor>& A, const std::vector<Tensor>& Q, std::int64_t seed) {
  constexpr const char* op = "range_step";
  STD_TORCH_CHECK(seed >= 0, op, ": seed is ", seed, ", wanted 0 to 2^63 - 1");
  STD_TORCH_CHECK(!A.empty() && A.size() == Q.size(), op, ": A is a list of ", A.size(), ", Q of ",
                  Q.size(), ", wanted as many and at least one");
  std::vector<RangeStep> steps;
  std::vector<Tensor> P, next, B;
  for (std::size_t i = 0; i < A.size(); ++i) {
    check_same_device(A[0], A[i], op, "a matrix of the list");
    check_same_device(A[0], Q[i], op, "Q");
    const Batch a(A[i], op, "A"), q(Q[i], op, "Q");
    STD_TORCH_CHECK(a.sizes() == q.sizes(), op, ": A and Q have other leading dimensions");
    const DType dtype = dtype_of(A[i], op, "A") == DType::f64 ? DType::f64 : DType::f32;
    const std::int64_t m = A[i].size(A[i].dim() - 2), n = A[i].size(A[i].dim() - 1);
    const std::int64_t r = Q[i].size(Q[i].dim() - 1);
    const Result p(A[i], a, dtype, m, r), x(A[i], a, dtype, n, r), b(A[i], a, dtype, n, r);
    for (std::int64_t k = 0; k < a.count(); ++k) steps.push_back({a[k], q[k], p[k], x[k], b[k]});
    P.push_back(p.tensor);
    next.push_back(x.tensor);
    B.push_back(b.tensor);
  }
  const auto count = static_cast<std::int64_t>(steps.size());
  Tensor finite = torch::stable::new_empty(A[0], {count}, ScalarType::Double);
  for (std::int64_t k = 0; k < count; ++k)
    steps[static_cast<std::size_t>(k)].finite = static_cast<double*>(finite.data_ptr()) + k;
  Scope scope(A[0]);
  scope.lend_workspace(A[0], range_step_workspace(scope.context, steps.data(), count));
  structmat::range_step(scope.context, steps.data(), count, static_cast<std::uint64_t>(seed));
  return {P, next, B, finite};
}

// Where A holds NaN or Inf or LAPACK fails all is NaN and `finite` 0: the Python function raises.
std::tuple<Tensor, Tensor, Tensor, Tensor> svd_tail(const Tensor& A, std::int64_t rank,
                                                    std::optional<std::int64_t> oversample,
                                                    std::int64_t seed) {
  constexpr const char* op = "svd_tail";
  STD_TORCH_CHECK(seed >= 0, op, ": seed is ", seed, ", wanted 0 to 2^63 - 1");
  const StridedMatrixView a = strided_matrix_view(A, op, "A");
  // Refused before U is made, whose size it is.
  const std::int64_t k = std::clamp<std::int64_t>(rank, 0, std::min(a.rows, a.cols));
  const auto dtype = a.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  Tensor U = torch::stable::new_empty(A, {a.rows, k}, dtype);
  Tensor S = torch::stable::new_empty(A, {k}, dtype);
  Tensor Vh = torch::stable::new_empty(A, {k, a.cols}, dtype);
  Tensor info = torch::stable::new_empty(
      A, {static_cast<std::int64_t>(sizeof(SvdInfo) / sizeof(double))}, ScalarType::Double);
  try {
    structmat::svd_tail(Context{}, a, {rank, oversample, static_cast<std::uint64_t>(seed)},
                        matrix_view(U, op, "U"), vector_view(S, op, "S"), matrix_view(Vh, op, "Vh"),
                        static_cast<SvdInfo*>(info.data_ptr()));
  } catch (const LinAlgError&) {
    for (Tensor* t : {&U, &S, &Vh, &info})
      torch::stable::fill_(*t, std::numeric_limits<double>::quiet_NaN());
    static_cast<SvdInfo*>(info.data_ptr())->finite = 0;
  }
  return {U, S, Vh, info};
}

}  // namespace

STRUCTMAT_IMPL(CPU, m) {
  m.impl("svd_tail", TORCH_BOX(&svd_tail));
}
STRUCTMAT_REGISTER("range_step", &range_step)
STRUCTMAT_REGISTER("orthonormalize", &orthonormalize)
STRUCTMAT_REGISTER("gram_matmul", &gram_matmul)
STRUCTMAT_REGISTER("gram_matmul_moments", &gram_matmul_moments)

}  // namespace structmat::torch_bindings
