// SPDX-License-Identifier: Apache-2.0
// structmat._C: the core for NumPy users, and what was built. Imports no torch.
#include <pybind11/pybind11.h>

#include "bindings.h"
#include "structmat/structmat.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "structmat's core on NumPy arrays, without torch.";
  // Local: a global translator would also change what torch's operators raise.
  py::register_local_exception<structmat::Error>(m, "Error", PyExc_ValueError);
  py::register_local_exception<structmat::LinAlgError>(
      m, "LinAlgError", py::module_::import("numpy").attr("linalg").attr("LinAlgError"));
  const structmat::Info info = structmat::info();
  m.attr("version") = info.version;
  m.attr("blas") = info.blas;
  m.attr("simd") = info.simd;
  m.attr("cuda") = *info.cuda_architectures != '\0';
  m.attr("cuda_architectures") = info.cuda_architectures;
  structmat::python::register_linalg(m);
  structmat::python::register_random(m);
  structmat::python::register_streaming_svd(m);
  structmat::python::register_svd(m);
}
