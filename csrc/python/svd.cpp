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

template <class T>
py::tuple decompose(const StridedMatrixView& a, const SvdOptions& options, int threads) {
  // A rank out of range is refused before anything is written.
  const std::int64_t k = std::clamp<std::int64_t>(options.rank, 0, std::min(a.rows, a.cols));
  py::array_t<T> u({a.rows, k}), s(k), vh({k, a.cols});
  T *u_data = u.mutable_data(), *s_data = s.mutable_data(), *vh_data = vh.mutable_data();
  SvdInfo info{};
  {
    const py::gil_scoped_release release;
    Context context;
    context.threads = threads;
    randomized_svd(context, a, options, {u_data, a.rows, k}, {s_data, k}, {vh_data, k, a.cols},
                   &info);
  }
  py::dict facts;
  facts["error"] = info.error;
  facts["norm"] = info.norm;
  facts["rank"] = static_cast<std::int64_t>(info.rank);
  facts["sweeps"] = static_cast<std::int64_t>(info.sweeps);
  return py::make_tuple(u, s, vh, facts);
}

py::tuple svd(const py::array& A, std::int64_t rank, std::optional<std::int64_t> oversample,
              std::optional<std::int64_t> sweeps, std::uint64_t seed, int threads) {
  if (A.ndim() != 2)
    throw py::value_error("randomized_svd: A must have 2 dimensions, got " +
                          std::to_string(A.ndim()));
  const DType dtype = dtype_of_array(A);
  const auto size = static_cast<std::int64_t>(size_of(dtype));
  if (A.strides(0) % size != 0 || A.strides(1) % size != 0)
    throw py::value_error("randomized_svd: A's strides are not multiples of its element size");
  const StridedMatrixView a(A.data(), dtype, A.shape(0), A.shape(1), A.strides(0) / size,
                            A.strides(1) / size);
  const SvdOptions options{rank, oversample, sweeps, seed};
  return dtype == DType::f64 ? decompose<double>(a, options, threads)
                             : decompose<float>(a, options, threads);
}

}  // namespace

void register_svd(py::module_& m) {
  m.def("randomized_svd", &svd, py::arg("A"), py::arg("rank"), py::kw_only(),
        py::arg("oversample") = py::none(), py::arg("sweeps") = py::none(), py::arg("seed") = 0,
        py::arg("threads") = 0,
        "U, S, Vh and a dict of facts: structmat.linalg.randomized_svd on NumPy arrays.");
}

}  // namespace structmat::python
