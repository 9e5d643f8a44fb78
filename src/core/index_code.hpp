// SPDX-License-Identifier: Apache-2.0
//
// The int8 code of an index key: what AppendKv writes beside it and what a screening indexer may
// rely on. With scale c, codes n[d] and error e: |n[d]| <= 127 and ||k - c n||_2 <= e.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/scalar.hpp"

namespace msa::core {

inline constexpr double kMaxIndexCode = 127.0;
/// Keys (and queries) with a larger element, or one that is not finite, are not screened: products
/// of norms up to here cannot overflow an f32 score.
inline constexpr double kMaxCodedElement = 0x1p40;

/// The least bf16 >= value, for value >= 0; +inf where there is none.
inline std::uint16_t bf16_at_least(double value) {
  auto nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) < value) {
    nearest = std::nextafter(nearest, std::numeric_limits<float>::infinity());
  }
  const auto bits = std::bit_cast<std::uint32_t>(nearest);
  return static_cast<std::uint16_t>((bits + 0xffffu) >> 16);
}

/// Writes codes[0, dim) and scale_and_error[0, 2) (bf16) of the key of `dim` elements of `dtype` at
/// `key`. A key that cannot be coded gets codes 0, scale 0 and error +inf.
inline void encode_index_key(const std::byte* key, DType dtype, std::int64_t dim,
                             std::int8_t* codes, std::uint16_t* scale_and_error) {
  const std::size_t size = size_of(dtype);
  const auto element = [&](std::int64_t d) {
    return load_element(key + static_cast<std::size_t>(d) * size, dtype);
  };
  double largest = 0.0;
  bool coded = true;
  for (std::int64_t d = 0; d < dim; ++d) {
    const double magnitude = std::fabs(element(d));
    coded = coded && magnitude <= kMaxCodedElement;  // a NaN is not
    largest = std::max(largest, magnitude);
  }
  scale_and_error[0] = coded ? bf16_at_least(largest / kMaxIndexCode) : std::uint16_t{0};
  const auto scale = static_cast<double>(bf16_to_f32(scale_and_error[0]));
  double squares = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) {
    double code = 0.0;
    if (scale > 0.0) {
      code = std::clamp(std::nearbyint(element(d) / scale), -kMaxIndexCode, kMaxIndexCode);
    }
    codes[d] = static_cast<std::int8_t>(code);
    const double rest = element(d) - scale * code;
    squares += rest * rest;
  }
  // The sum is within dim * 2^-53 of itself.
  scale_and_error[1] = bf16_at_least(coded ? std::sqrt(squares) * (1.0 + 0x1p-30)
                                           : std::numeric_limits<double>::infinity());
}

}  // namespace msa::core
