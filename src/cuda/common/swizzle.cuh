// SPDX-License-Identifier: Apache-2.0
//
// Byte offsets inside shared-memory tiles in the 128-byte swizzle, as TMA writes and wgmma reads
// them. Tiles start at multiples of 1024 bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace msa::cuda {

/// Bytes of a row of a swizzled panel.
inline constexpr std::uint32_t kPanelBytes = 128;

/// Byte `byte` (< 128) of row `row` of a panel: the 16-byte chunk index is xored with row mod 8.
__host__ __device__ constexpr std::uint32_t swizzled(std::uint32_t row, std::uint32_t byte) {
  return row * kPanelBytes + (byte ^ ((row & 7) << 4));
}

/// Byte `byte` of row `row` of a tile of `rows` rows whose rows are the operand's M or N axis (K is
/// contiguous): panels of 128 bytes along K follow each other.
__host__ __device__ constexpr std::uint32_t k_major(std::uint32_t rows, std::uint32_t row,
                                                    std::uint32_t byte) {
  return byte / kPanelBytes * rows * kPanelBytes + swizzled(row, byte % kPanelBytes);
}

/// Byte offset of the wgmma K step `step` (32 bytes of K) in such a tile.
__host__ __device__ constexpr std::uint32_t k_major_step(std::uint32_t rows, std::uint32_t step) {
  return step / 4 * rows * kPanelBytes + step % 4 * 32;
}

/// Byte offset of K step `step` (16 rows) in a tile whose rows are the K axis and whose contiguous
/// axis is M or N (V as [key][dim] of 16-bit elements).
__host__ __device__ constexpr std::uint32_t mn_major_step(std::uint32_t step) {
  return step * 16 * kPanelBytes;
}

}  // namespace msa::cuda
