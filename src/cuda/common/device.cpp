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
    if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) continue;
    found.push_back({.name = properties.name,
                     .compute_capability = properties.major * 10 + properties.minor,
                     .num_sms = properties.multiProcessorCount,
                     .memory_gib = static_cast<double>(properties.totalGlobalMem) / (1 << 30)});
  }
  return found;
}

}  // namespace msa::cuda
