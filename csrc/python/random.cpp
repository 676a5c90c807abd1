// SPDX-License-Identifier: Apache-2.0
#include "structmat/random.h"

#include <pybind11/numpy.h>

#include "arrays.h"
#include "bindings.h"

namespace py = pybind11;

namespace structmat::python {
namespace {

template <class T>
py::array gaussian_of(std::int64_t rows, std::int64_t cols, std::uint64_t seed,
                      std::uint32_t stream, int threads) {
  if (rows < 0 || cols < 0) throw py::value_error("gaussian: a size is negative");
  py::array_t<T> out({rows, cols});
  T* data = out.mutable_data();
  const py::gil_scoped_release release;
  Context context;
  context.threads = threads;
  fill_gaussian(context, {data, rows, cols}, seed, stream);
  return out;
}

py::array gaussian(std::int64_t rows, std::int64_t cols, const py::object& seed_object,
                   std::uint32_t stream, const py::object& type, int threads) {
  const std::uint64_t seed = seed_of(seed_object, "gaussian");
  const py::dtype dtype = py::dtype::from_args(type);
  if (dtype.equal(py::dtype::of<double>()))
    return gaussian_of<double>(rows, cols, seed, stream, threads);
  if (dtype.equal(py::dtype::of<float>()))
    return gaussian_of<float>(rows, cols, seed, stream, threads);
  throw py::type_error("gaussian: dtype must be float32 or float64, got " +
                       py::str(dtype).cast<std::string>());
}

}  // namespace

void register_random(py::module_& m) {
  m.def("gaussian", &gaussian, py::arg("rows"), py::arg("cols"), py::kw_only(), py::arg("seed") = 0,
        py::arg("stream") = 0, py::arg("dtype") = py::dtype::of<float>(), py::arg("threads") = 0,
        "Independent standard normal numbers; entry (i, j) depends on (seed, stream, i, j) alone.");
}

}  // namespace structmat::python
