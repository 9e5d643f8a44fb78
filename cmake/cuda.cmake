# SPDX-License-Identifier: Apache-2.0
if(MSA_CUDA)
  # sm_90a code can't be built for a plain architecture list, so every CUDA target names its own.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 90a-real)
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 13.0)
    message(FATAL_ERROR "MSA_CUDA needs nvcc 13.0 or later, found ${CMAKE_CUDA_COMPILER_VERSION} "
                        "(${CMAKE_CUDA_COMPILER})")
  endif()
  find_package(CUDAToolkit REQUIRED)
endif()

# architectures: for example 90a-real, or 80-real 90-virtual
function(msa_set_cuda target)
  set_target_properties(${target} PROPERTIES CUDA_ARCHITECTURES "${ARGN}")
  # CMake 3.25 knows no CUDA C++20, hence the explicit flag. A spilling kernel is an error.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20 -lineinfo -Xptxas=-warn-spills,-Werror>)
  target_compile_definitions(${target} PRIVATE $<$<BOOL:${MSA_DEVICE_CHECKS}>:MSA_DEVICE_CHECKS>)
endfunction()
