// SPDX-License-Identifier: Apache-2.0
#include "simd.h"

#include <cstdlib>
#include <string>

#include "structmat/error.h"

namespace structmat {
namespace {

Simd detected() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Simd::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Simd::avx2;
#endif
  return Simd::baseline;
}

Simd chosen() {
  const char* wanted = std::getenv("STRUCTMAT_SIMD");
  if (wanted == nullptr || *wanted == '\0') return detected();
  for (Simd level : {Simd::baseline, Simd::avx2, Simd::avx512})
    if (std::string(wanted) == name_of(level)) return level < detected() ? level : detected();
  detail::fail(std::string("STRUCTMAT_SIMD is '") + wanted +
               "', but takes baseline, avx2 or avx512");
}

}  // namespace

const char* name_of(Simd level) {
  return level == Simd::avx512 ? "avx512" : level == Simd::avx2 ? "avx2" : "baseline";
}

Simd simd_level() {
  static const Simd level = chosen();
  return level;
}

bool has_avx512_bf16() {
#if defined(__x86_64__)
  return simd_level() == Simd::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace structmat
