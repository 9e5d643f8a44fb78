// SPDX-License-Identifier: Apache-2.0
//
// Scalars that C++20 lacks, and element access for any dtype. Every narrowing rounds once, to
// nearest even, straight from double (through a float rounded to odd, so no double rounding).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "msa/tensor.hpp"

namespace msa::core {

inline float bf16_to_f32(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

inline std::uint16_t f32_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (value != value) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);  // stay a quiet NaN
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_f32(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1fu;
  const std::uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline std::uint16_t f32_to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // >= 65520
  if (magnitude < 0x38800000u) {  // subnormal in f16: adding 0.5 aligns the mantissa and rounds
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

/// OCP FP8 E4M3: no infinities, one NaN pattern, largest finite value 448.
inline float e4m3_to_f32(std::uint8_t bits) {
  const int exponent = (bits >> 3) & 15;
  const int mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

/// Saturates to +-448, as GPU conversions with satfinite do.
inline std::uint8_t f32_to_e4m3(float value) {
  const std::uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (value != value) return static_cast<std::uint8_t>(sign | 0x7f);
  const float magnitude = std::fabs(value);
  if (magnitude == 0.0f) return sign;  // frexp knows no exponent for it
  if (magnitude >= 448.0f) return static_cast<std::uint8_t>(sign | 0x7e);
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude = m * 2^exponent, m in [0.5, 1)
  const int quantum = exponent - 4 < -9 ? -9 : exponent - 4;  // 2^quantum is the spacing here
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -quantum)));
  // Counting steps of the subnormal grid makes the bit pattern linear within a binade.
  const int code = quantum == -9 ? steps : ((quantum + 9) << 3) + steps;
  return static_cast<std::uint8_t>(sign | code);
}

/// A float from which any narrower format rounds as if straight from `value`.
inline float f64_to_f32_round_to_odd(double value) {
  auto nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || value != value || std::isinf(nearest))
    return nearest;
  auto bits = std::bit_cast<std::uint32_t>(nearest);
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) --bits;  // truncate
  return std::bit_cast<float>(bits | 1u);
}

inline double load_element(const void* address, DType dtype) {
  const auto read = [address]<class T>(T value) {
    std::memcpy(&value, address, sizeof(T));
    return value;
  };
  switch (dtype) {
    case DType::f64:
      return read(double{});
    case DType::f32:
      return static_cast<double>(read(float{}));
    case DType::f16:
      return static_cast<double>(f16_to_f32(read(std::uint16_t{})));
    case DType::bf16:
      return static_cast<double>(bf16_to_f32(read(std::uint16_t{})));
    case DType::e4m3:
      return static_cast<double>(e4m3_to_f32(read(std::uint8_t{})));
    case DType::i8:
      return read(std::int8_t{});
    case DType::i32:
      return read(std::int32_t{});
  }
  return 0.0;
}

inline void store_element(void* address, DType dtype, double value) {
  const auto write = [address](auto narrow) { std::memcpy(address, &narrow, sizeof(narrow)); };
  switch (dtype) {
    case DType::f64:
      return write(value);
    case DType::f32:
      return write(static_cast<float>(value));
    case DType::f16:
      return write(f32_to_f16(f64_to_f32_round_to_odd(value)));
    case DType::bf16:
      return write(f32_to_bf16(f64_to_f32_round_to_odd(value)));
    case DType::e4m3:
      return write(f32_to_e4m3(f64_to_f32_round_to_odd(value)));
    case DType::i8:
      return write(static_cast<std::int8_t>(value));
    case DType::i32:
      return write(static_cast<std::int32_t>(value));
  }
}

/// Offset in elements of view[indices...].
template <class... Indices>
std::int64_t offset_of(const TensorView& view, Indices... indices) {
  std::int64_t offset = 0;
  std::size_t axis = 0;
  ((offset += static_cast<std::int64_t>(indices) * view.stride[axis++]), ...);
  return offset;
}

inline std::byte* address_at(const TensorView& view, std::int64_t offset) {
  return static_cast<std::byte*>(view.data) +
         offset * static_cast<std::int64_t>(size_of(view.dtype));
}

/// view[indices...] as a double.
template <class... Indices>
double load(const TensorView& view, Indices... indices) {
  return load_element(address_at(view, offset_of(view, indices...)), view.dtype);
}

/// view[indices...] = value, rounded to the view's dtype.
template <class... Indices>
void store(const TensorView& view, double value, Indices... indices) {
  store_element(address_at(view, offset_of(view, indices...)), view.dtype, value);
}

template <class... Indices>
std::int32_t load_i32(const TensorView& view, Indices... indices) {
  std::int32_t value = 0;
  std::memcpy(&value, address_at(view, offset_of(view, indices...)), sizeof(value));
  return value;
}

template <class... Indices>
void store_i32(const TensorView& view, std::int32_t value, Indices... indices) {
  std::memcpy(address_at(view, offset_of(view, indices...)), &value, sizeof(value));
}

template <class... Indices>
void store_i8(const TensorView& view, std::int8_t value, Indices... indices) {
  std::memcpy(address_at(view, offset_of(view, indices...)), &value, sizeof(value));
}

}  // namespace msa::core
