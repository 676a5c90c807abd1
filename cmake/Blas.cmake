# SPDX-License-Identifier: Apache-2.0
# Target structmat_blas: a BLAS and LAPACK with the Fortran interface.
#   bundled  the scipy-openblas32 wheel of the build environment; its library is installed beside ours
#   system   find_package(LAPACK), for distributions and for applications that embed the core
if(STRUCTMAT_BLAS STREQUAL "bundled")
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c [[
import importlib.metadata
import scipy_openblas32
print(scipy_openblas32.get_lib_dir())
files = importlib.metadata.files("scipy-openblas32")
print(next(file.locate() for file in files if file.name == "LICENSE.txt"))]]
                  OUTPUT_VARIABLE _blas_found OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _blas_failed)
  if(_blas_failed)
    message(FATAL_ERROR "STRUCTMAT_BLAS=bundled needs the Python package scipy-openblas32, with its licence, in "
                        "${Python_EXECUTABLE}; or configure with -DSTRUCTMAT_BLAS=system")
  endif()
  string(REPLACE "\n" ";" _blas_found "${_blas_found}")
  list(POP_FRONT _blas_found _blas_dir _blas_licence)
  add_library(structmat_blas SHARED IMPORTED)
  set_target_properties(structmat_blas PROPERTIES IMPORTED_LOCATION "${_blas_dir}/libscipy_openblas.so")
  target_compile_definitions(structmat_blas INTERFACE STRUCTMAT_BLAS_SCIPY_OPENBLAS)
  install(FILES "${_blas_dir}/libscipy_openblas.so" DESTINATION lib)
  # It asks that binary copies carry it.
  install(FILES "${_blas_licence}" DESTINATION lib RENAME LICENSE.scipy-openblas32.txt)
else()
  find_package(LAPACK REQUIRED)
  add_library(structmat_blas INTERFACE)
  target_link_libraries(structmat_blas INTERFACE LAPACK::LAPACK)
endif()
