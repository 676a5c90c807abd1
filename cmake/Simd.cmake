# SPDX-License-Identifier: Apache-2.0
# structmat_simd_sources(target file.cpp ...): compiles each file once per instruction set, with STRUCTMAT_SIMD naming
# the namespace (baseline, avx2, avx512). simd.h picks one at run time. Such a file keeps everything but its entry
# points in an anonymous namespace: a shared inline function compiled for AVX-512 could be linked into the baseline.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(STRUCTMAT_SIMD_LEVELS baseline avx2 avx512)
else()
  set(STRUCTMAT_SIMD_LEVELS baseline)
endif()
set(STRUCTMAT_SIMD_FLAGS_baseline "")
set(STRUCTMAT_SIMD_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(STRUCTMAT_SIMD_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)

function(structmat_simd_sources target)
  foreach(_source IN LISTS ARGN)
    get_filename_component(_stem ${_source} NAME_WE)
    foreach(_level IN LISTS STRUCTMAT_SIMD_LEVELS)
      set(_copy ${CMAKE_CURRENT_BINARY_DIR}/simd/${_stem}_${_level}.cpp)
      file(CONFIGURE OUTPUT ${_copy} CONTENT
           "#define STRUCTMAT_SIMD ${_level}\n#include \"${CMAKE_CURRENT_SOURCE_DIR}/${_source}\"\n")
      set_source_files_properties(${_copy} PROPERTIES COMPILE_OPTIONS "${STRUCTMAT_SIMD_FLAGS_${_level}}")
      target_sources(${target} PRIVATE ${_copy})
    endforeach()
  endforeach()
endfunction()
