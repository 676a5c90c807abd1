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
}
STRUCTMAT_IMPL(CompositeExplicitAutograd, m) {
  m.impl("has_cuda", TORCH_BOX(&has_cuda));
}

}  // namespace structmat::torch_bindings
