// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/device.hpp"

#include <cuda_runtime_api.h>

namespace msa::cuda {

std::vector<DeviceInfo> devices(std::string& why_none) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    why_none = status != cudaSuccess ? cudaGetErrorString(status) : "no CUDA device";
    return {};
  }
  std::vector<DeviceInfo> found;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
      found.push_back({.name = "(unreadable)"});
      continue;
    }
    found.push_back({.name = properties.name,
                     .compute_capability = properties.major * 10 + properties.minor,
                     .num_sms = properties.multiProcessorCount,
                     .memory_gib = static_cast<double>(properties.totalGlobalMem) / (1 << 30)});
  }
  return found;
}

namespace {

/// Devices by index; an index that could not be read has capability 0.
const std::vector<DeviceInfo>& known_devices() {
  static const std::vector<DeviceInfo> known = [] {
    std::string why_none;
    return devices(why_none);
  }();
  return known;
}

}  // namespace

int compute_capability(int index) {
  const auto& known = known_devices();
  const auto i = static_cast<std::size_t>(index);
  return index >= 0 && i < known.size() ? known[i].compute_capability : 0;
}

int num_sms(int index) {
  const auto& known = known_devices();
  const auto i = static_cast<std::size_t>(index);
  return index >= 0 && i < known.size() ? known[i].num_sms : 0;
}

}  // namespace msa::cuda
