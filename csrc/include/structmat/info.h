// SPDX-License-Identifier: Apache-2.0
// What this library was built with, and what it uses on this machine.
#pragma once
#include "structmat/export.h"

namespace structmat {

struct Info {
  const char* version;
  const char* blas;  // name, version and build options of the BLAS in use
  const char* simd;  // baseline, avx2, avx512, avx512bf16 or amx: the level the kernels run at here
  const char* cuda_architectures;  // "80-real, 90a-real, ...", empty without the CUDA back end
};

STRUCTMAT_API Info info();

}  // namespace structmat
