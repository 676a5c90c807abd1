// SPDX-License-Identifier: Apache-2.0
#include "structmat/svd.h"

#include <vector>

#include "arrays.h"
#include "bindings.h"
#include "structmat/error.h"

namespace py = pybind11;

namespace structmat::python {
namespace {

// A matrix, what its errors begin with, and its decomposition.
struct Item {
  std::string name;
  Matrix a;
  py::array u, s, vh;
  SvdInfo info{};

  Item(const py::object& A, std::string what) : name(std::move(what)), a(A, name, "A") {}

  SvdProblem problem(const SvdOptions& options, std::int64_t k) {
    const DType dtype = result_dtype(a.view.dtype);
    SvdProblem problem;
    problem.a = a.view;
    problem.options = options;
    problem.u = new_matrix(u, dtype, a.view.rows, k);
    problem.s = new_vector(s, dtype, k);
    problem.vh = new_matrix(vh, dtype, k, a.view.cols);
    problem.info = &info;
    return problem;
  }
  py::tuple result() const { return py::make_tuple(u, s, vh, facts_of(info)); }
};

// A list side by side; one matrix has all threads.
void of_rank(const Context& context, std::vector<Item>& items, const SvdOptions& options) {
  std::vector<SvdProblem> problems;
  for (const Item& item : items)  // its checks, before anything is allocated
    named(item.name, [&] { return randomized_svd_workspace(context, item.a.view, options); });
  for (Item& item : items) problems.push_back(item.problem(options, options.rank));
  {
    const py::gil_scoped_release release;
    if (items.size() == 1) {
      const SvdProblem& p = problems[0];
      named(items[0].name,
            [&] { randomized_svd(context, p.a, p.options, p.u, p.s, p.vh, p.info); });
    } else {
      randomized_svd(context, problems.data(), static_cast<std::int64_t>(problems.size()));
    }
  }
  for (const Item& item : items)
    if (item.info.finite == 0)
      throw LinAlgError(item.name + ": A contains NaN or Inf, or a product overflows");
}

void to_tolerance(const Context& context, std::vector<Item>& items, const SvdOptions& options,
                  double rtol) {
  for (Item& item : items) {
    std::optional<SvdToTolerance> found;
    {
      const py::gil_scoped_release release;
      named(item.name, [&] { found.emplace(context, item.a.view, rtol, options); });
    }
    const SvdProblem p = item.problem(options, found->rank());
    const py::gil_scoped_release release;
    named(item.name, [&] { found->factors(p.u, p.s, p.vh, p.info); });
    found.reset();
  }
}

py::object svd(const py::object& A, std::optional<std::int64_t> rank, std::optional<double> rtol,
               std::optional<std::int64_t> oversample, std::optional<std::int64_t> sweeps,
               bool center, const py::object& seed, int threads) {
  const char* const op = "randomized_svd";
  if (rank.has_value() == rtol.has_value())
    throw py::value_error(std::string(op) + ": wanted one of rank and rtol, got " +
                          (rank ? "both" : "neither"));
  SvdOptions options;
  options.rank = rank.value_or(0);
  options.oversample = oversample;
  options.sweeps = sweeps;
  options.seed = seed_of(seed, op);
  options.center = center;
  Context context;
  context.threads = threads;
  std::vector<Item> items;
  if (is_list(A)) {
    for (const py::handle& one : py::list(A))
      items.emplace_back(py::reinterpret_borrow<py::object>(one), item_of(op, items.size()));
  } else {
    items.emplace_back(A, op);
  }
  rtol ? to_tolerance(context, items, options, *rtol) : of_rank(context, items, options);
  if (!is_list(A)) return items[0].result();
  py::list results;
  for (const Item& item : items) results.append(item.result());
  return results;
}

}  // namespace

void register_svd(py::module_& m) {
  m.def("randomized_svd", &svd, py::arg("A"), py::arg("rank") = py::none(), py::kw_only(),
        py::arg("rtol") = py::none(), py::arg("oversample") = py::none(),
        py::arg("sweeps") = py::none(), py::arg("center") = false, py::arg("seed") = 0,
        py::arg("threads") = 0,
        "U, S, Vh and a dict of facts: structmat.linalg.randomized_svd on a NumPy array, or a list "
        "of these for a list.");
}

}  // namespace structmat::python
