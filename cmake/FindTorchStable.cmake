# SPDX-License-Identifier: Apache-2.0
# TorchStable::torch: headers and libraries of the installed torch wheel, stable ABI only.
# torch's own TorchConfig.cmake is not used: for a CUDA wheel it demands the whole CUDA toolkit.
# site-packages is searched by path, which works inside pip's build isolation too.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import sys, sysconfig as s; print(';'.join([s.get_path('platlib'), s.get_path('purelib'), *filter(None, sys.path)]))"
  OUTPUT_VARIABLE _site OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_path(TorchStable_INCLUDE_DIR torch/csrc/stable/library.h
          HINTS ${_site} PATH_SUFFIXES torch/include NO_DEFAULT_PATH)
foreach(_name torch torch_cpu)
  find_library(TorchStable_${_name} ${_name} HINTS "${TorchStable_INCLUDE_DIR}/../lib" NO_DEFAULT_PATH)
endforeach()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchStable REQUIRED_VARS
  TorchStable_INCLUDE_DIR TorchStable_torch TorchStable_torch_cpu)
if(TorchStable_FOUND AND NOT TARGET TorchStable::torch)
  add_library(TorchStable::torch INTERFACE IMPORTED)
  target_include_directories(TorchStable::torch SYSTEM INTERFACE "${TorchStable_INCLUDE_DIR}")
  target_compile_definitions(TorchStable::torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)  # 2.11
  # A DT_NEEDED on libtorch, used or not: weak references are resolved through it.
  target_link_options(TorchStable::torch INTERFACE "LINKER:--no-as-needed")
  target_link_libraries(TorchStable::torch INTERFACE ${TorchStable_torch} ${TorchStable_torch_cpu})
endif()
