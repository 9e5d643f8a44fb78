// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "core/check.hpp"

/// Throws Error(cuda) with the call's text and the runtime's name for what went wrong.
#define MSA_CUDA_CHECK(call)                                                              \
  do {                                                                                    \
    if (const cudaError_t status = (call); status != cudaSuccess) {                       \
      throw ::msa::Error(::msa::ErrorCode::cuda,                                          \
                         ::msa::core::concat(#call, ": ", cudaGetErrorName(status), " (", \
                                             cudaGetErrorString(status), ")"));           \
    }                                                                                     \
  } while (false)
