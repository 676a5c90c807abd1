// SPDX-License-Identifier: Apache-2.0
#include "structmat/linalg.h"

#include <algorithm>
#include <cstdint>
#include <limits>

#include "arrays.h"
#include "bindings.h"
#include "structmat/error.h"

namespace py = pybind11;

namespace structmat::python {
namespace {

Context with_threads(int threads) {
  Context context;
  context.threads = threads;
  return context;
}

py::object orthonormalize(const py::object& Y, const py::object& seed, bool return_rank,
                          int threads) {
  const Matrix y(Y, "orthonormalize", "Y");
  const std::uint64_t from = seed_of(seed, "orthonormalize");
  const DType dtype = result_dtype(y.view.dtype);
  py::array q, residual;
  const MatrixView q_view = new_matrix(q, dtype, y.view.rows, y.view.cols);
  const VectorView r_view = new_vector(residual, DType::f64, y.view.cols);
  std::int64_t rank = 0;
  {
    const py::gil_scoped_release release;
    structmat::orthonormalize(with_threads(threads), y.view, from, q_view, r_view);
    const double eps = dtype == DType::f64 ? std::numeric_limits<double>::epsilon()
                                           : std::numeric_limits<float>::epsilon();
    const auto* left = static_cast<const double*>(r_view.data);
    rank = std::count_if(left, left + r_view.size, [&](double r) { return r > 16 * eps; });
  }
  if (!return_rank) return q;
  return py::make_tuple(q, rank);
}

py::object gram_matmul(const py::object& A, const py::object& X, bool return_moments, int threads) {
  const Matrix a(A, "gram_matmul", "A"), x(X, "gram_matmul", "X");
  require_dtype(x, a.view.dtype, "gram_matmul", "X");
  py::array z;
  const MatrixView z_view = new_matrix(z, a.view.dtype, a.view.cols, x.view.cols);
  py::array sums;
  double norm = 0;
  GramMoments moments;
  if (return_moments) moments = {new_vector(sums, DType::f64, a.view.cols), &norm};
  {
    const py::gil_scoped_release release;
    structmat::gram_matmul(with_threads(threads), a.view, x.view, z_view, moments);
  }
  if (!return_moments) return z;
  return py::make_tuple(z, sums, norm);
}

// The results and the problem of one pair of a list.
struct Step {
  Matrix a, q;
  py::array p, next, b;

  Step(const py::object& A, const py::object& Q, const std::string& op)
      : a(A, op, "A"), q(Q, op, "Q") {
    require_dtype(q, result_dtype(a.view.dtype), op, "Q");
  }
  RangeStep problem(double* finite) {
    const std::int64_t m = a.view.rows, n = a.view.cols, r = q.view.cols;
    const DType dtype = result_dtype(a.view.dtype);
    RangeStep step;
    step.a = a.view;
    step.q = q.view;
    step.p = new_matrix(p, dtype, m, r);
    step.next = new_matrix(next, dtype, n, r);
    step.b = new_matrix(b, dtype, n, r);
    step.finite = finite;
    return step;
  }
};

void run(std::vector<Step>& steps, bool listed, std::uint64_t seed, int threads) {
  std::vector<double> finite(steps.size());
  std::vector<RangeStep> problems;
  const auto name = [&](std::size_t i) {
    return listed ? item_of("range_step", i) : std::string("range_step");
  };
  for (std::size_t i = 0; i < steps.size(); ++i) {
    problems.push_back(steps[i].problem(&finite[i]));
    named(name(i), [&] { return range_step_workspace(Context(), &problems[i], 1); });  // its checks
  }
  {
    const py::gil_scoped_release release;
    structmat::range_step(with_threads(threads), problems.data(),
                          static_cast<std::int64_t>(problems.size()), seed);
  }
  for (std::size_t i = 0; i < steps.size(); ++i)
    if (finite[i] == 0)
      throw LinAlgError(name(i) + ": A or Q contains NaN or Inf, or a product overflows");
}

py::object range_step(const py::object& A, const py::object& Q, const py::object& seed,
                      int threads) {
  const std::uint64_t from = seed_of(seed, "range_step");
  std::vector<Step> steps;
  if (!is_list(A) || !is_list(Q)) {
    steps.emplace_back(A, Q, "range_step");
    run(steps, false, from, threads);
    return py::make_tuple(steps[0].p, steps[0].next, steps[0].b);
  }
  const py::list as(A), qs(Q);
  if (as.size() != qs.size())
    throw py::value_error("range_step: A is a list of " + std::to_string(as.size()) + ", Q of " +
                          std::to_string(qs.size()));
  for (std::size_t i = 0; i < as.size(); ++i)
    steps.emplace_back(as[i], qs[i], item_of("range_step", i));
  run(steps, true, from, threads);
  py::list found;
  for (const Step& s : steps) found.append(py::make_tuple(s.p, s.next, s.b));
  return found;
}

py::tuple svd_tail(const py::object& A, std::int64_t rank, std::optional<std::int64_t> oversample,
                   const py::object& seed, int threads) {
  const Matrix a(A, "svd_tail", "A");
  const SvdTailOptions options{rank, oversample, seed_of(seed, "svd_tail")};
  // A rank out of range is refused before anything is written.
  const std::int64_t k = std::clamp<std::int64_t>(rank, 0, std::min(a.view.rows, a.view.cols));
  const DType dtype = result_dtype(a.view.dtype);
  py::array u, s, vh;
  const MatrixView u_view = new_matrix(u, dtype, a.view.rows, k);
  const VectorView s_view = new_vector(s, dtype, k);
  const MatrixView vh_view = new_matrix(vh, dtype, k, a.view.cols);
  SvdInfo info{};
  {
    const py::gil_scoped_release release;
    structmat::svd_tail(with_threads(threads), a.view, options, u_view, s_view, vh_view, &info);
  }
  return py::make_tuple(u, s, vh, facts_of(info));
}

}  // namespace

void register_linalg(py::module_& m) {
  m.def("orthonormalize", &orthonormalize, py::arg("Y"), py::kw_only(), py::arg("seed") = 0,
        py::arg("return_rank") = false, py::arg("threads") = 0,
        "Q, or Q and the rank: structmat.linalg.orthonormalize on NumPy arrays.");
  m.def("gram_matmul", &gram_matmul, py::arg("A"), py::arg("X"), py::kw_only(),
        py::arg("return_moments") = false, py::arg("threads") = 0,
        "A^T (A X): structmat.linalg.gram_matmul on NumPy arrays.");
  m.def("range_step", &range_step, py::arg("A"), py::arg("Q"), py::kw_only(), py::arg("seed") = 0,
        py::arg("threads") = 0,
        "P, Q and B, or a list of these: structmat.linalg.range_step on NumPy arrays.");
  m.def("svd_tail", &svd_tail, py::arg("A"), py::arg("rank"), py::kw_only(),
        py::arg("oversample") = py::none(), py::arg("seed") = 0, py::arg("threads") = 0,
        "U, S, Vh and a dict of facts: structmat.linalg.svd_tail on NumPy arrays.");
}

}  // namespace structmat::python
