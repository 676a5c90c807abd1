// SPDX-License-Identifier: Apache-2.0
#include "cuda/cublas_api.h"

#include <dlfcn.h>

#include <string>

#include "structmat/error.h"

namespace structmat::cuda {
namespace {

void* open_library() {
  // PyTorch, or the host application, has usually loaded it already; its own copy must be the one.
  for (const int mode : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY | RTLD_LOCAL})
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
      if (void* library = dlopen(name, mode)) return library;
  detail::fail(
      "structmat: CUDA products need cuBLAS, but neither libcublasLt.so.13 nor libcublasLt.so.12 "
      "was "
      "found");
}

template <class F>
void bind(void* library, F& function, const char* symbol) {
  function = reinterpret_cast<F>(dlsym(library, symbol));
  STRUCTMAT_CHECK(function != nullptr, std::string("structmat: cuBLAS has no ") + symbol);
}

}  // namespace

const CublasLt& cublas_lt() {
  static const CublasLt table = [] {
    void* library = open_library();
    CublasLt t;
    bind(library, t.create, "cublasLtCreate");
    bind(library, t.desc_create, "cublasLtMatmulDescCreate");
    bind(library, t.desc_destroy, "cublasLtMatmulDescDestroy");
    bind(library, t.desc_set, "cublasLtMatmulDescSetAttribute");
    bind(library, t.layout_create, "cublasLtMatrixLayoutCreate");
    bind(library, t.layout_destroy, "cublasLtMatrixLayoutDestroy");
    bind(library, t.preference_create, "cublasLtMatmulPreferenceCreate");
    bind(library, t.preference_destroy, "cublasLtMatmulPreferenceDestroy");
    bind(library, t.preference_set, "cublasLtMatmulPreferenceSetAttribute");
    bind(library, t.heuristic, "cublasLtMatmulAlgoGetHeuristic");
    bind(library, t.matmul, "cublasLtMatmul");
    return t;
  }();
  return table;
}

}  // namespace structmat::cuda
