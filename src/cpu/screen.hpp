// SPDX-License-Identifier: Apache-2.0
//
// What screening by int8 codes works on (screen-inl.hpp).
#pragma once

#include <cstdint>

#include "core/index_code.hpp"

namespace msa::cpu {

inline constexpr std::int64_t kCodesPerPiece = 16;  ///< codes of a token that are loaded at a time
/// Covers every underflow in a score and in its bounds: at most dim + 16 of them, 2^-126 each.
inline constexpr float kTinyScore = 0x1p-104f;

/// A coded query row, and how its error bound depends on a key's scale and error.
struct ScreenRow {
  float scale;
  float slope;
  float factor;
};

/// The codes of one block's tokens; strides in elements.
struct CodedBlock {
  const std::int8_t* codes;
  std::int64_t code_stride;
  const std::uint16_t* scales;  ///< (scale, error) as bf16
  std::int64_t scale_stride;
  std::int64_t num_tokens;
};

}  // namespace msa::cpu
