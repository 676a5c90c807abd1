// SPDX-License-Identifier: Apache-2.0
#include "structmat/info.h"

#include "blas.h"
#include "simd.h"

namespace structmat {

Info info() {
  return {STRUCTMAT_VERSION, blas::name(), name_of(simd_level()), STRUCTMAT_CUDA_ARCHITECTURES};
}

}  // namespace structmat
