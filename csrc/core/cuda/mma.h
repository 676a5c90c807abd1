// SPDX-License-Identifier: Apache-2.0
// Matrix instructions of a warp for the 16-bit types, on registers that hold two numbers each
// (PTX ISA: ldmatrix, mma.m16n8k16). With g = lane / 4 and t = lane % 4 a lane holds
//
//   a[0], a[1]  A(g, 2t..), A(g + 8, 2t..)          A is 16 x 16
//   a[2], a[3]  A(g, 2t + 8..), A(g + 8, 2t + 8..)
//   b[0], b[1]  B(2t.., g), B(2t + 8.., g)          B is 16 x 8
//   c[0..3]     C(g, 2t), C(g, 2t + 1), C(g + 8, 2t), C(g + 8, 2t + 1)
//
// where 2t.. stands for 2t and 2t + 1, the lower in the lower half.
#pragma once
#include <type_traits>

#include "cuda/device.h"
#include "half.h"

#ifdef STRUCTMAT_EMULATE
#include "emulate_instructions.h"
#else
namespace structmat::cuda {

// Four 8 x 8 matrices: row r of matrix i begins at the address, a multiple of 16, that lane 8 i + r
// gives. out[i] is M(g, 2t..) of matrix i or, transposed, M(2t.., g).
template <bool kTransposed>
__device__ void load_matrices(unsigned (&out)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// C += A B, sums in fp32.
template <class T>
__device__ void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace structmat::cuda
#endif
