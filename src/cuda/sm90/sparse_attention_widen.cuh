// SPDX-License-Identifier: Apache-2.0
//
// e4m3 K and V for the union kernel: TMA brings raw tiles into a ring of their own, and a fourth
// warpgroup widens them to 16 bits, which is exact, where TMA would have put 16-bit tiles. Scales
// are not applied here: they are factors of a head's scores and outputs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/swizzle.cuh"

namespace msa::cuda::sm90 {

inline constexpr int kWidenThreads = 128;
/// Tiles, of K and V by turns. A row is 128 bytes: a head_dim of 64 is filled up with zeros.
inline constexpr int kRawSlots = 3;

struct WidenShared {
  std::uint64_t full[kRawSlots], empty[kRawSlots];
  int4 entry[kRawSlots];  ///< block, member tokens, 1: ends a tile; negative: no tile is left
};

template <int kBlock>
inline constexpr int kRawTileBytes = kBlock * static_cast<int>(kPanelBytes);

inline __device__ void init_raw_barriers(WidenShared& raw) {
  for (int i = 0; i < kRawSlots; ++i) {
    ptx::mbarrier_init(ptx::smem_address(&raw.full[i]), 1);
    ptx::mbarrier_init(ptx::smem_address(&raw.empty[i]), kWidenThreads);
  }
}

/// Four e4m3 elements in order. In bf16 NaN becomes 480, beyond the largest number of e4m3: see
/// nan_bits().
template <class T>
__device__ __forceinline__ uint2 widen4(std::uint32_t four);

template <>
__device__ __forceinline__ uint2 widen4<__half>(std::uint32_t four) {
  const auto two = [](std::uint32_t bits) {
    const __half2_raw pair =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(bits), __NV_E4M3);
    return std::uint32_t{pair.x} | std::uint32_t{pair.y} << 16;
  };
  return {two(four & 0xffffu), two(four >> 16)};
}

/// bf16 has the same fields four bits further down, and an exponent whose bias is larger by 120;
/// the product is exact for subnormal numbers too.
template <>
__device__ __forceinline__ uint2 widen4<__nv_bfloat16>(std::uint32_t four) {
  const auto two = [](std::uint32_t high_bytes) {
    const std::uint32_t bits = (high_bytes >> 4 & 0x07f007f0u) | (high_bytes & 0x80008000u);
    constexpr std::uint32_t kTwoTo120 = 0x7b807b80u;
    const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(bits),
                                           reinterpret_cast<const __nv_bfloat162&>(kTwoTo120));
    return reinterpret_cast<const std::uint32_t&>(product);
  };
  return {two(__byte_perm(four, 0, 0x1404)), two(__byte_perm(four, 0, 0x3424))};
}

/// The upper bits of bytes that are NaN; widen4() to f16 needs no help.
template <class T>
__device__ __forceinline__ std::uint32_t nan_bits(std::uint32_t four) {
  if constexpr (std::is_same_v<T, __half>) return 0;
  return ((four & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}

/// By a warpgroup: rows of 128 bytes, swizzled, to panels of 64 elements, swizzled alike. A thread
/// takes 16 elements of a row at a time; of the lanes that share a row, the upper half stores its
/// second 16 bytes first, so that eight lanes always meet eight different bank groups.
template <class T, int kDim, int kBlock>
__device__ __forceinline__ void widen_tile(const std::uint8_t* raw, std::uint8_t* wide) {
  constexpr int kLanes = kDim / 16;  // of a row
  constexpr int kRows = kWidenThreads / kLanes;
  constexpr int kPasses = kBlock / kRows;
  constexpr int kPassBytes = kRows * static_cast<int>(kPanelBytes);
  const int thread = static_cast<int>(threadIdx.x) % kWidenThreads;
  const int chunk = thread % kLanes;
  const int row = thread / kLanes;
  const int twist = row % 8;  // the same in all passes: kRows is a multiple of 8
  const bool swap = chunk >= 4;
  const int first = 2 * (chunk % 4) + (swap ? 1 : 0);
  const std::uint8_t* const from = raw + row * kPanelBytes + ((chunk ^ twist) << 4);
  std::uint8_t* const to = wide + chunk / 4 * kBlock * kPanelBytes + row * kPanelBytes;
  std::uint8_t* const to_first = to + ((first ^ twist) << 4);
  std::uint8_t* const to_second = to + ((first ^ 1 ^ twist) << 4);
  constexpr int kAtOnce = kPasses < 4 ? kPasses : 4;  // a warp hides its own latencies
  std::uint32_t nans = 0;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; pass += kAtOnce) {
    uint4 bytes[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      bytes[i] = *reinterpret_cast<const uint4*>(from + (pass + i) * kPassBytes);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint4 b = bytes[i];
      const int at = (pass + i) * kPassBytes;
      nans |= nan_bits<T>(b.x) | nan_bits<T>(b.y) | nan_bits<T>(b.z) | nan_bits<T>(b.w);
      const auto store = [&](std::uint8_t* target, std::uint32_t low, std::uint32_t high) {
        const uint2 l = widen4<T>(low);
        const uint2 h = widen4<T>(high);
        *reinterpret_cast<uint4*>(target + at) = uint4{l.x, l.y, h.x, h.y};
      };
      store(to_first, swap ? b.z : b.x, swap ? b.w : b.y);
      store(to_second, swap ? b.x : b.z, swap ? b.y : b.w);
    }
  }
  if (nans == 0) return;
  // What came out as 480 was NaN.
#pragma unroll 1
  for (int word = 0; word < kPasses * 8; ++word) {
    std::uint8_t* const target = (word % 8 < 4 ? to_first : to_second) + word / 8 * kPassBytes;
    std::uint32_t& pair = reinterpret_cast<std::uint32_t*>(target)[word % 4];
    if ((pair & 0x7fffu) == 0x43f0u) pair |= 0x7fffu;
    if ((pair & 0x7fff0000u) == 0x43f00000u) pair |= 0x7fff0000u;
  }
}

/// load_keys() of the union kernel for e4m3: one thread, raw tiles.
template <int kBlock, class Shared>
__device__ __forceinline__ void load_raw_keys(Shared& shared, WidenShared& raw,
                                              std::uint32_t raw_tiles, const CUtensorMap& k_map,
                                              const CUtensorMap& v_map) {
  constexpr int kNumChunks = sizeof(shared.chunk_full) / sizeof(shared.chunk_full[0]);
  int slot = 0;
  std::uint32_t parity = 1;
  std::uint32_t chunk_parity = 0;
  const auto wait_for_slot = [&] {
    ptx::mbarrier_wait(ptx::smem_address(&raw.empty[slot]), parity);
  };
  for (int chunk = 0;;) {
    ptx::mbarrier_wait(ptx::smem_address(&shared.chunk_full[chunk]), chunk_parity);
    const int4 info = shared.chunk_info[chunk];
    if (info.x < 0) break;
    for (int i = 0; i < info.x; ++i) {
      const int4 entry = shared.chunk[chunk][i];
      const auto load = [&](const CUtensorMap& map) {
        wait_for_slot();
        raw.entry[slot] = {entry.x, entry.w, i + 1 == info.x ? info.y : 0, 0};
        const std::uint32_t full = ptx::smem_address(&raw.full[slot]);
        if (entry.w == 0) {
          ptx::mbarrier_arrive(full);
        } else {
          ptx::mbarrier_expect_tx(full, kRawTileBytes<kBlock>);
          ptx::tma_load_4d(raw_tiles + slot * kRawTileBytes<kBlock>, &map, 0, entry.y, info.z,
                           entry.z, full);
        }
        if (++slot == kRawSlots) {
          slot = 0;
          parity ^= 1;
        }
      };
      load(k_map);
      load(v_map);
    }
    ptx::mbarrier_arrive(ptx::smem_address(&shared.chunk_empty[chunk]));
    if (++chunk == kNumChunks) {
      chunk = 0;
      chunk_parity ^= 1;
    }
  }
  wait_for_slot();
  raw.entry[slot] = {0, 0, -1, 0};
  ptx::mbarrier_arrive(ptx::smem_address(&raw.full[slot]));
}

/// The fourth warpgroup, all threads. The consumers' wgmma reads what ordinary stores wrote here.
template <class T, int kDim, int kBlock, class Shared>
__device__ __forceinline__ void widen_keys(int num_stages, Shared& shared, WidenShared& raw,
                                           const std::uint8_t* raw_tiles, std::uint8_t* stages) {
  constexpr int kTileBytes = kBlock * kDim * 2;
  int stage = 0;
  std::uint32_t parity = 1;
  int slot = 0;
  std::uint32_t raw_parity = 0;
  while (true) {
    ptx::mbarrier_wait(ptx::smem_address(&raw.full[slot]), raw_parity);
    const int4 entry = raw.entry[slot];
    if (entry.z < 0) return;
    ptx::mbarrier_wait(ptx::smem_address(&shared.k_empty[stage]), parity);
    if (threadIdx.x % kWidenThreads == 0) shared.stage[stage] = {entry.x, entry.y, entry.z, 0};
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
      if (part == 1) {
        ptx::mbarrier_wait(ptx::smem_address(&raw.full[slot]), raw_parity);
        ptx::mbarrier_wait(ptx::smem_address(&shared.v_empty[stage]), parity);
      }
      if (entry.y != 0) {
        widen_tile<T, kDim, kBlock>(raw_tiles + slot * kRawTileBytes<kBlock>,
                                    stages + (2 * stage + part) * kTileBytes);
        ptx::fence_proxy_async();
      }
      ptx::mbarrier_arrive(ptx::smem_address(&raw.empty[slot]));
      ptx::mbarrier_arrive(
          ptx::smem_address(part == 0 ? &shared.k_full[stage] : &shared.v_full[stage]));
      if (++slot == kRawSlots) {
        slot = 0;
        raw_parity ^= 1;
      }
    }
    if (++stage == num_stages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

}  // namespace msa::cuda::sm90
