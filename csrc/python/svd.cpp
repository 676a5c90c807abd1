// SPDX-License-Identifier: Apache-2.0
#include "structmat/svd.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "bindings.h"

namespace py = pybind11;

namespace structmat::python {
namespace {

DType dtype_of_array(const py::array& a) {
  const py::dtype dtype = a.dtype();
  if (dtype.equal(py::dtype::of<float>())) return DType::f32;
  if (dtype.equal(py::dtype::of<double>())) return DType::f64;
  if (dtype.equal(py::dtype("e"))) return DType::f16;
  throw py::type_error("randomized_svd: A must be float32, float64 or float16, got " +
                       py::str(dtype).cast<std::string>());
}

py::dict dict_of(const SvdInfo& info) {
  py::dict facts;
  facts["error"] = info.error;
  facts["norm"] = info.norm;
  facts["rank"] = static_cast<std::int64_t>(info.rank);
  facts["sweeps"] = static_cast<std::int64_t>(info.sweeps);
  facts["converged"] = info.converged != 0;
  return facts;
}

template <class T>
struct Factors {
  py::array_t<T> u, s, vh;

  Factors(const StridedMatrixView& a, std::int64_t k) : u({a.rows, k}), s(k), vh({k, a.cols}) {}
  MatrixView u_view() { return {u.mutable_data(), u.shape(0), u.shape(1)}; }
  VectorView s_view() { return {s.mutable_data(), s.shape(0)}; }
  MatrixView vh_view() { return {vh.mutable_data(), vh.shape(0), vh.shape(1)}; }
  py::tuple with(const SvdInfo& info) const { return py::make_tuple(u, s, vh, dict_of(info)); }
};

template <class T>
py::tuple decompose(const Context& context, const StridedMatrixView& a, const SvdOptions& options,
                    std::optional<double> rtol) {
  SvdInfo info{};
  if (rtol) {
    std::optional<SvdToTolerance> found;
    {
      const py::gil_scoped_release release;
      found.emplace(context, a, *rtol, options);
    }
    Factors<T> factors(a, found->rank());
    found->factors(factors.u_view(), factors.s_view(), factors.vh_view(), &info);
    return factors.with(info);
  }
  // A rank out of range is refused before anything is written.
  Factors<T> factors(a, std::clamp<std::int64_t>(options.rank, 0, std::min(a.rows, a.cols)));
  const MatrixView u = factors.u_view(), vh = factors.vh_view();
  const VectorView s = factors.s_view();
  {
    const py::gil_scoped_release release;
    randomized_svd(context, a, options, u, s, vh, &info);
  }
  return factors.with(info);
}

py::tuple of_array(const py::array& A, std::optional<std::int64_t> rank, std::optional<double> rtol,
                   SvdOptions options, int threads) {
  if (A.ndim() != 2)
    throw py::value_error("randomized_svd: A must have 2 dimensions, got " +
                          std::to_string(A.ndim()));
  const DType dtype = dtype_of_array(A);
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  if (A.strides(0) % size != 0 || A.strides(1) % size != 0)
    throw py::value_error("randomized_svd: A's strides are not multiples of its element size");
  if (rank.has_value() == rtol.has_value())
    throw py::value_error(std::string("randomized_svd: wanted one of rank and rtol, got ") +
                          (rank ? "both" : "neither"));
  const StridedMatrixView a(A.data(), dtype, A.shape(0), A.shape(1), A.strides(0) / size,
                            A.strides(1) / size);
  options.rank = rank.value_or(0);
  Context context;
  context.threads = threads;
  return dtype == DType::f64 ? decompose<double>(context, a, options, rtol)
                             : decompose<float>(context, a, options, rtol);
}

py::object svd(const py::object& A, std::optional<std::int64_t> rank, std::optional<double> rtol,
               std::optional<std::int64_t> oversample, std::optional<std::int64_t> sweeps,
               bool center, std::uint64_t seed, int threads) {
  SvdOptions options;
  options.oversample = oversample;
  options.sweeps = sweeps;
  options.seed = seed;
  options.center = center;
  if (!py::isinstance<py::list>(A)) return of_array(py::array(A), rank, rtol, options, threads);
  py::list results;
  for (const py::handle& one : py::list(A))
    results.append(
        of_array(py::array(py::reinterpret_borrow<py::object>(one)), rank, rtol, options, threads));
  return results;
}

}  // namespace

void register_svd(py::module_& m) {
  m.def("randomized_svd", &svd, py::arg("A"), py::arg("rank") = py::none(), py::kw_only(),
        py::arg("rtol") = py::none(), py::arg("oversample") = py::none(),
        py::arg("sweeps") = py::none(), py::arg("center") = false, py::arg("seed") = 0,
        py::arg("threads") = 0,
        "U, S, Vh and a dict of facts: structmat.linalg.randomized_svd on a NumPy array, or a list "
        "of them.");
}

}  // namespace structmat::python
