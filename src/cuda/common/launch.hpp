// SPDX-License-Identifier: Apache-2.0
//
// For .cu files: starts a kernel with a checked result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "cuda/common/check.hpp"

namespace msa::cuda {

struct LaunchConfig {
  dim3 grid{1};
  int threads = 128;
  std::size_t smem_bytes = 0;  ///< dynamic
  int cluster = 1;             ///< CTAs, along x
  bool dependent = false;      ///< may start before the kernel ahead of it in the stream has ended
                               ///< (programmatic dependent launch); the kernel waits by itself
};

/// Launches on the stream's device, which must be the current one. A grid without CTAs is no
/// launch.
template <class... Params, class... Given>
void launch(void (*kernel)(Params...), const LaunchConfig& config, cudaStream_t stream,
            Given&&... given) {
  if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return;
  constexpr std::size_t kDefaultSmem = 48 * 1024;
  if (config.smem_bytes > kDefaultSmem) {
    MSA_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(config.smem_bytes)));
  }
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(config.cluster);
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  if (config.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t runtime{};
  runtime.gridDim = config.grid;
  runtime.blockDim = dim3(static_cast<unsigned>(config.threads));
  runtime.dynamicSmemBytes = config.smem_bytes;
  runtime.stream = stream;
  runtime.attrs = attributes;
  runtime.numAttrs = count;
  MSA_CUDA_CHECK(cudaLaunchKernelEx(&runtime, kernel, std::forward<Given>(given)...));
}

}  // namespace msa::cuda
