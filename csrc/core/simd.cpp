// SPDX-License-Identifier: Apache-2.0
#include "simd.h"

#include <cstdlib>
#include <string>

#include "structmat/error.h"
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

bool has_amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool usable = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (simd_level() != Simd::avx512 || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx))
      return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
    if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return usable;
#else
  return false;
#endif
}

bool has_avx512_bf16() {
#if defined(__x86_64__)
  return simd_level() == Simd::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace structmat
