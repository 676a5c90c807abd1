// SPDX-License-Identifier: Apache-2.0
// What each file of structmat._C registers.
#pragma once
#include <pybind11/pybind11.h>

namespace structmat::python {

void register_linalg(pybind11::module_& m);
void register_random(pybind11::module_& m);
void register_streaming_svd(pybind11::module_& m);
void register_svd(pybind11::module_& m);

}  // namespace structmat::python
