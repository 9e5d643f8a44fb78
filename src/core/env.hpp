// SPDX-License-Identifier: Apache-2.0
//
// The environment variables that the library reads, in one place:
//   MSA_BACKEND      implementation to use for every plan ("reference", "cpu", ...)
//   MSA_VERBOSE=1    one line on stderr per plan: operation, shapes, choice, refusals
//   MSA_NUM_THREADS  threads of the CPU backend
//   MSA_CPU_TARGET   best SIMD target the CPU backend may use ("AVX2", ...)
#pragma once

#include <cstdlib>
#include <string>

namespace msa::core {

/// Value of the variable, "" where unset.
inline std::string env(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace msa::core
