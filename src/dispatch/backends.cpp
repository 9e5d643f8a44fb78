// SPDX-License-Identifier: Apache-2.0
#include "core/check.hpp"
#include "core/operation.hpp"
#include "cpu/cpu.hpp"
#include "dispatch/lists.hpp"
#include "msa/backend.hpp"

namespace msa {

std::vector<ImplementationInfo> implementations() {
  std::vector<ImplementationInfo> rows;
  dispatch::for_each_operation([&]<class Args>(const Args& args) {
    for (const auto* row : dispatch::implementations_of<Args>()) {
      rows.push_back({core::operation_name(args), row->name, row->dtypes});
    }
  });
  return rows;
}

std::vector<BackendInfo> backends() {
  const char* const no_cuda = "built without CUDA (configure with -DMSA_CUDA=ON)";
  return {{"cuda_sm90", false, no_cuda},
          {"cuda_generic", false, no_cuda},
          {"cpu", true,
           core::concat("SIMD target ", cpu::simd_target(), ", ", num_threads(), " threads")},
          {"reference", true, "double precision, one thread: the specification"}};
}

const char* version() { return MSA_VERSION; }

}  // namespace msa
