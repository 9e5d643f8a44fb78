// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

namespace msa::cuda {

/// Exclusive sum over a CTA of kThreads threads, all of which call it; `total` gets the sum of all.
/// `scratch` has kThreads / 32 elements of shared memory, free again on return.
template <int kThreads, class T>
__device__ __forceinline__ T exclusive_sum(T value, T* scratch, T& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  T sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  T before = 0;
  total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i < warp) before += scratch[i];
    total += scratch[i];
  }
  __syncthreads();
  return before + sum - value;
}

}  // namespace msa::cuda
