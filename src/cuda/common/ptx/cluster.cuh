// SPDX-License-Identifier: Apache-2.0
//
// Shared memory of a thread block cluster (sm_90).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

namespace msa::cuda::ptx {

/// What lies at the place of `own`, a shared variable, in CTA `rank` of the cluster. 8 or 16 bytes.
template <class V>
__device__ __forceinline__ V load_remote(const V* own, int rank) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(own));
  std::uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  V value;
  if constexpr (std::is_same_v<V, float4>) {
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(remote)
                 : "memory");
  } else {
    static_assert(std::is_same_v<V, float2>);
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
                 : "=f"(value.x), "=f"(value.y)
                 : "r"(remote)
                 : "memory");
  }
  return value;
}

}  // namespace msa::cuda::ptx
