// SPDX-License-Identifier: Apache-2.0
#include "core/check.hpp"
#include "core/operation.hpp"
#include "cpu/cpu.hpp"
#include "dispatch/lists.hpp"
#include "msa/backend.hpp"
#if defined(MSA_WITH_CUDA)
#include "cuda/common/device.hpp"
#endif

namespace msa {
namespace {

/// A GPU backend is available where the library has rows for it and a device can run them.
BackendInfo cuda_backend(const char* name, [[maybe_unused]] int lowest_compute_capability,
                         [[maybe_unused]] int highest_compute_capability) {
  BackendInfo info{.name = name, .detail = "built without CUDA (configure with -DMSA_CUDA=ON)"};
#if defined(MSA_WITH_CUDA)
  const auto found = cuda::devices(info.detail);
  bool runs = false;
  for (const cuda::DeviceInfo& device : found) {
    if (info.detail.empty() || !runs) {
      info.detail =
          core::concat(device.name, ", compute capability ", device.compute_capability / 10, ".",
                       device.compute_capability % 10, ", ", device.num_sms, " SMs, ",
                       static_cast<std::int64_t>(device.memory_gib + 0.5), " GiB");
    }
    runs = runs || (device.compute_capability >= lowest_compute_capability &&
                    device.compute_capability <= highest_compute_capability);
  }
  bool has_rows = false;
  for (const ImplementationInfo& row : implementations()) {
    has_rows = has_rows || std::string(row.implementation) == name;
  }
  info.available = runs && has_rows;
  if (!has_rows) info.detail += "; this version has no kernels for it";
#endif
  return info;
}

}  // namespace

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
  return {cuda_backend("cuda_sm90", 90, 90),
          cuda_backend("cuda_generic", 80, 999),
          {"cpu", true,
           core::concat("SIMD target ", cpu::simd_target(), ", ", num_threads(), " threads")},
          {"reference", true, "double precision, one thread: the specification"}};
}

const char* version() { return MSA_VERSION; }

}  // namespace msa
