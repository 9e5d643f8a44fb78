// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>
#include <string>
#include <vector>

#include "msa/export.h"

namespace msa {

/// One row of the support matrix: which implementation of which operation, best first.
struct ImplementationInfo {
  const char* operation = nullptr;       ///< "SparseAttentionForward"
  const char* implementation = nullptr;  ///< "cpu"
  const char* dtypes = nullptr;          ///< "f32 f16 bf16"
};

/// Every implementation compiled into this library, in the order in which plan() asks them.
MSA_API std::vector<ImplementationInfo> implementations();

struct BackendInfo {
  const char* name = nullptr;  ///< "reference", "cpu", "cuda_generic", "cuda_sm90"
  bool available = false;      ///< Usable on this machine now.
  std::string detail;          ///< SIMD target and threads, device name, or why it is unavailable.
};

MSA_API std::vector<BackendInfo> backends();

/// Threads of the CPU backend, the caller's included. Starts as $MSA_NUM_THREADS, or else the
/// number of hardware threads. Takes effect at the next run(); not to be called during one. Throws
/// Error(invalid_argument) outside 1 to 1024.
MSA_API void set_num_threads(int num_threads);
MSA_API int num_threads();

/// "0.1.0"
MSA_API const char* version();

}  // namespace msa
