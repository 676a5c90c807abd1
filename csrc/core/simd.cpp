// SPDX-License-Identifier: Apache-2.0
#include "simd.h"

#include <algorithm>
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

// Linux gives a process the matrix unit's registers when it asks for them. Sums are rounded by an
// instruction of avx512bf16.
bool amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Simd detected(Simd wanted) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Simd::avx512;
    return wanted == Simd::amx && amx_bf16() ? Simd::amx : Simd::avx512bf16;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Simd::avx2;
#endif
  return Simd::baseline;
}

Simd chosen() {
  const char* wanted = std::getenv("STRUCTMAT_SIMD");
  if (wanted == nullptr || *wanted == '\0') return detected(Simd::amx);
  for (Simd level : {Simd::baseline, Simd::avx2, Simd::avx512, Simd::avx512bf16, Simd::amx})
    if (std::string(wanted) == name_of(level)) return std::min(level, detected(level));
  detail::fail(std::string("STRUCTMAT_SIMD is '") + wanted +
               "', but takes baseline, avx2, avx512, avx512bf16 or amx");
}

}  // namespace

const char* name_of(Simd level) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};
  return names[static_cast<int>(level)];
}

Simd simd_level() {
  static const Simd level = chosen();
  return level;
}

}  // namespace structmat
