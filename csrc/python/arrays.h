// SPDX-License-Identifier: Apache-2.0
// NumPy arrays as the core's views, read where they lie.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "structmat/error.h"
#include "structmat/linalg.h"
#include "structmat/svd.h"

namespace structmat::python {

inline DType dtype_of_array(const pybind11::dtype& dtype, const std::string& op, const char* name) {
  namespace py = pybind11;
  if (dtype.equal(py::dtype::of<float>())) return DType::f32;
  if (dtype.equal(py::dtype::of<double>())) return DType::f64;
  if (dtype.equal(py::dtype("e"))) return DType::f16;
  throw py::type_error(op + ": " + name + " must be float32, float64 or float16, got " +
                       py::str(dtype).cast<std::string>());
}

inline pybind11::dtype numpy_dtype(DType dtype) {
  return pybind11::dtype(dtype == DType::f64 ? "d" : dtype == DType::f32 ? "f" : "e");
}
// What the core answers with.
inline DType result_dtype(DType dtype) {
  return dtype == DType::f64 ? DType::f64 : DType::f32;
}

// Copied only where elements do not lie at multiples of their size.
inline pybind11::array readable(const pybind11::array& a) {
  bool fine = (a.flags() & pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_) != 0;
  for (pybind11::ssize_t i = 0; i < a.ndim(); ++i) fine &= a.strides(i) % a.itemsize() == 0;
  return fine ? a : a.attr("copy")().cast<pybind11::array>();
}

inline std::string type_name(const pybind11::handle& value) {
  namespace py = pybind11;
  return py::str(py::type::of(value).attr("__name__")).cast<std::string>();
}

inline bool is_list(const pybind11::object& value) {
  return pybind11::isinstance<pybind11::list>(value) ||
         pybind11::isinstance<pybind11::tuple>(value);
}

// An integer from 0 to 2^63 - 1.
inline std::int64_t natural(const pybind11::object& value, const std::string& op,
                            const char* name) {
  namespace py = pybind11;
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(op + ": " + name + " must be an integer, got " + type_name(value));
  }
  int overflow = 0;
  const std::int64_t found = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow != 0 || found < 0)
    throw py::value_error(op + ": " + name + " is " + py::str(index).cast<std::string>() +
                          ", wanted 0 to 2^63 - 1");
  return found;
}
inline std::uint64_t seed_of(const pybind11::object& seed, const std::string& op) {
  return static_cast<std::uint64_t>(natural(seed, op, "seed"));
}

// What `call` returns. Errors of the core, "function: what", begin with `op` instead.
template <class Call>
auto named(const std::string& op, const Call& call) {
  const auto message = [&](const Error& e) {
    const std::string what = e.what();
    const std::size_t colon = what.find(':');
    return op + (colon == std::string::npos ? ": " + what : what.substr(colon));
  };
  try {
    return call();
  } catch (const LinAlgError& e) {
    throw LinAlgError(message(e));
  } catch (const Error& e) {
    throw Error(message(e));
  }
}
inline std::string item_of(const char* op, std::size_t i) {
  return std::string(op) + ": item " + std::to_string(i);
}

// A matrix to read; keeps its memory alive.
struct Matrix {
  pybind11::array array;
  StridedMatrixView view;

  Matrix(const pybind11::object& from, const std::string& op, const char* name) {
    namespace py = pybind11;
    if (!py::isinstance<py::array>(from))
      throw py::type_error(op + ": " + name + " must be an array, got " + type_name(from));
    const py::array a = py::reinterpret_borrow<py::array>(from);
    const DType dtype = dtype_of_array(a.dtype(), op, name);
    if (a.ndim() != 2)
      throw py::value_error(op + ": " + name + " must have 2 dimensions, got " +
                            std::to_string(a.ndim()));
    array = readable(a);
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    view = {array.data(),           dtype, array.shape(0), array.shape(1), array.strides(0) / size,
            array.strides(1) / size};
  }
};

inline void require_dtype(const Matrix& m, DType wanted, const std::string& op, const char* name) {
  if (m.view.dtype != wanted)
    throw pybind11::type_error(op + ": " + name + " is " + name_of(m.view.dtype) + ", wanted " +
                               name_of(wanted));
}

// A matrix, a vector to write.
inline MatrixView new_matrix(pybind11::array& out, DType dtype, std::int64_t rows,
                             std::int64_t cols) {
  out = pybind11::array(numpy_dtype(dtype), std::vector<std::int64_t>{rows, cols});
  return {out.mutable_data(), dtype, rows, cols, cols};
}
inline VectorView new_vector(pybind11::array& out, DType dtype, std::int64_t size) {
  out = pybind11::array(numpy_dtype(dtype), std::vector<std::int64_t>{size});
  return {out.mutable_data(), dtype, size};
}

inline pybind11::dict facts_of(const SvdInfo& info) {
  pybind11::dict facts;
  facts["error"] = info.error;
  facts["norm"] = info.norm;
  facts["rank"] = static_cast<std::int64_t>(info.rank);
  facts["sweeps"] = static_cast<std::int64_t>(info.sweeps);
  facts["converged"] = info.converged != 0;
  return facts;
}

}  // namespace structmat::python
