// SPDX-License-Identifier: Apache-2.0
// Run-time choice of the instruction set. Files listed under structmat_simd_sources are compiled
// once per level with STRUCTMAT_SIMD naming their namespace; STRUCTMAT_SIMD_CALL picks the best
// one.
#pragma once

namespace structmat {

// avx512bf16: avx512 and its products of pairs of bfloat16. amx: these and a matrix unit for
// bfloat16 that the system lets us use. The code of all three is compiled as avx512.
enum class Simd : int { baseline = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };

// The best level of this machine, or the lower one asked for by the environment variable
// STRUCTMAT_SIMD (baseline, avx2, avx512, avx512bf16, amx), read once.
Simd simd_level();
const char* name_of(Simd level);

}  // namespace structmat

#if defined(__x86_64__)
#define STRUCTMAT_SIMD_CALL(function, ...)                                                \
  (::structmat::simd_level() >= ::structmat::Simd::avx512 ? avx512::function(__VA_ARGS__) \
   : ::structmat::simd_level() == ::structmat::Simd::avx2 ? avx2::function(__VA_ARGS__)   \
                                                          : baseline::function(__VA_ARGS__))
#else
#define STRUCTMAT_SIMD_CALL(function, ...) baseline::function(__VA_ARGS__)
#endif
