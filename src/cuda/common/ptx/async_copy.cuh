// SPDX-License-Identifier: Apache-2.0
//
// cp.async (sm_80), one instruction per function.
#pragma once

#include <cstdint>

namespace msa::cuda::ptx {

/// 16 bytes past the L1 cache. Reads `valid_bytes` (0 or 16) of them and fills up with zeros.
__device__ __forceinline__ void cp_async_16(std::uint32_t to, const void* from,
                                            std::uint32_t valid_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid_bytes)
               : "memory");
}
/// 4 bytes, through the L1 cache; reads 0 or 4 as above.
__device__ __forceinline__ void cp_async_4(std::uint32_t to, const void* from,
                                           std::uint32_t valid_bytes = 4) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid_bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Asks for the line of an address that exists.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
/// All but the newest `kPending` groups of this thread have landed.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace msa::cuda::ptx
