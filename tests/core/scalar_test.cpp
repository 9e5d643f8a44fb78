// SPDX-License-Identifier: Apache-2.0
#include "core/scalar.hpp"

#include <gtest/gtest.h>

#include <array>
#include <vector>

namespace msa::core {
namespace {

bool is_nan(float value) { return value != value; }

std::uint16_t bits16(int value) { return static_cast<std::uint16_t>(value); }

TEST(Bf16, EveryValueRoundTrips) {
  for (int i = 0; i < 65536; ++i) {
    const std::uint16_t bits = bits16(i);
    const float value = bf16_to_f32(bits);
    if (is_nan(value)) {
      EXPECT_TRUE((bits & 0x7f80) == 0x7f80 && (bits & 0x7f) != 0) << i;
      EXPECT_EQ(f32_to_bf16(value), bits | 0x40) << i;  // quiet, payload kept
    } else {
      EXPECT_EQ(f32_to_bf16(value), bits) << i;
    }
  }
}

TEST(F16, EveryValueRoundTrips) {
  for (int i = 0; i < 65536; ++i) {
    const std::uint16_t bits = bits16(i);
    const float value = f16_to_f32(bits);
    if (is_nan(value)) {
      EXPECT_TRUE((bits & 0x7c00) == 0x7c00 && (bits & 0x3ff) != 0) << i;
      EXPECT_EQ(f32_to_f16(value), (bits & 0x8000) | 0x7e00) << i;
    } else {
      EXPECT_EQ(f32_to_f16(value), bits) << i;
    }
  }
}

TEST(E4m3, EveryValueRoundTrips) {
  for (int i = 0; i < 256; ++i) {
    const auto bits = static_cast<std::uint8_t>(i);
    const float value = e4m3_to_f32(bits);
    EXPECT_EQ(is_nan(value), (bits & 0x7f) == 0x7f) << i;
    if (!is_nan(value)) {
      EXPECT_EQ(f32_to_e4m3(value), bits) << i;
    }
  }
  EXPECT_EQ(f32_to_e4m3(std::numeric_limits<float>::quiet_NaN()) & 0x7f, 0x7f);
}

/// Values of the 16-bit formats, written from their definition: sign, exponent, fraction.
double defined_value(int bits, int exponent_bits, int fraction_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, 1 - bias - fraction_bits)
                    : std::ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits);
  return (bits >> (exponent_bits + fraction_bits)) != 0 ? -magnitude : magnitude;
}

TEST(Scalars, DecodeAsDefined) {
  for (int i = 0; i < 65536; ++i) {
    if ((i & 0x7f80) != 0x7f80) {
      EXPECT_EQ(static_cast<double>(bf16_to_f32(bits16(i))), defined_value(i, 8, 7)) << i;
    }
    if ((i & 0x7c00) != 0x7c00) {
      EXPECT_EQ(static_cast<double>(f16_to_f32(bits16(i))), defined_value(i, 5, 10)) << i;
    }
  }
  for (int i = 0; i < 256; ++i) {
    if ((i & 0x7f) != 0x7f) {
      EXPECT_EQ(static_cast<double>(e4m3_to_f32(static_cast<std::uint8_t>(i))),
                defined_value(i, 4, 3))
          << i;
    }
  }
}

/// Between each two neighbours: the midpoint goes to the even one, its surroundings to the nearer.
/// All of it must hold straight from double, however close to the midpoint.
template <class Bits, class Encode>
void expect_nearest_even(int first, int last, double (*value)(Bits), Encode encode) {
  for (int i = first; i < last; ++i) {
    const double low = value(static_cast<Bits>(i));
    const double high = value(static_cast<Bits>(i + 1));
    const double middle = (low + high) / 2;
    const int even = i % 2 == 0 ? i : i + 1;
    ASSERT_EQ(encode(middle), even) << i;
    ASSERT_EQ(encode(std::nextafter(middle, low)), i) << i;
    ASSERT_EQ(encode(std::nextafter(middle, high)), i + 1) << i;
    ASSERT_EQ(encode(-std::nextafter(middle, high)) ^ encode(std::nextafter(middle, high)),
              1 << (8 * sizeof(Bits) - 1))
        << i;
  }
}

TEST(Scalars, NarrowToNearestEvenFromDouble) {
  const auto encode = [](DType dtype) {
    return [dtype](double value) {
      std::array<std::uint16_t, 4> bits{};  // room for any dtype
      store_element(bits.data(), dtype, value);
      return static_cast<int>(bits[0]);
    };
  };
  expect_nearest_even<std::uint16_t>(
      0, 0x7f7f, [](std::uint16_t bits) { return static_cast<double>(bf16_to_f32(bits)); },
      encode(DType::bf16));
  expect_nearest_even<std::uint16_t>(
      0, 0x7bff, [](std::uint16_t bits) { return static_cast<double>(f16_to_f32(bits)); },
      encode(DType::f16));
  expect_nearest_even<std::uint8_t>(
      0, 0x7e, [](std::uint8_t bits) { return static_cast<double>(e4m3_to_f32(bits)); },
      encode(DType::e4m3));
}

TEST(Scalars, NarrowNearestFloatWouldRoundTwice) {
  // Each value is just off a midpoint, by less than f32 can hold: rounding to f32 first loses the
  // side that it is on.
  const double just_above = 1.0 + 0x1p-8 + 0x1p-40;
  const double just_below = 1.0 + 0x1.8p-7 - 0x1p-40;
  EXPECT_EQ(f32_to_bf16(static_cast<float>(just_above)), 0x3f80);
  EXPECT_EQ(f32_to_bf16(f64_to_f32_round_to_odd(just_above)), 0x3f81);
  EXPECT_EQ(f32_to_bf16(static_cast<float>(just_below)), 0x3f82);
  EXPECT_EQ(f32_to_bf16(f64_to_f32_round_to_odd(just_below)), 0x3f81);
  EXPECT_EQ(f32_to_bf16(f64_to_f32_round_to_odd(-just_above)), 0xbf81);
}

TEST(RoundToOdd, KeepsWhatIsExactAndMarksWhatIsNot) {
  for (const double exact : {0.0, -0.0, 1.0, -0.1875, 0x1p-149, 0x1.fffffep127}) {
    const float rounded = f64_to_f32_round_to_odd(exact);
    EXPECT_EQ(static_cast<double>(rounded), exact);
    EXPECT_EQ(std::signbit(rounded), std::signbit(exact));
  }
  for (const double inexact : {0.1, -0.1, 1e-60, -1e-60, 1.0 + 0x1p-30, 0x1.fffffep127 + 0x1p100}) {
    const float rounded = f64_to_f32_round_to_odd(inexact);
    EXPECT_EQ(std::bit_cast<std::uint32_t>(rounded) & 1u, 1u) << inexact;
    EXPECT_NE(static_cast<double>(rounded), inexact);
    EXPECT_EQ(std::signbit(rounded), std::signbit(inexact));
  }
  EXPECT_TRUE(std::isinf(f64_to_f32_round_to_odd(1e300)));
  EXPECT_TRUE(std::isinf(f64_to_f32_round_to_odd(-std::numeric_limits<double>::infinity())));
  EXPECT_TRUE(is_nan(f64_to_f32_round_to_odd(std::numeric_limits<double>::quiet_NaN())));
}

TEST(Scalars, OverflowAndInfinity) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(f32_to_f16(65519.996f), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(f32_to_f16(-infinity), 0xfc00);
  EXPECT_EQ(f32_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(f32_to_bf16(infinity), 0x7f80);
  EXPECT_EQ(e4m3_to_f32(f32_to_e4m3(1e9f)), 448.0f);  // saturates
  EXPECT_EQ(e4m3_to_f32(f32_to_e4m3(-infinity)), -448.0f);
  EXPECT_EQ(f32_to_e4m3(-0.0f), 0x80);
}

TEST(ElementAccess, FollowsStridesForEveryDType) {
  std::array<std::byte, 256> bytes{};
  for (const DType dtype :
       {DType::f32, DType::f64, DType::f16, DType::bf16, DType::e4m3, DType::i8, DType::i32}) {
    TensorView view = TensorView::contiguous(bytes.data(), dtype, {}, {2, 3});
    view.stride = {7, 2};
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 3; ++j) store(view, 3.0 * i - j, i, j);
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 3; ++j) EXPECT_EQ(load(view, i, j), 3.0 * i - j) << name_of(dtype);
    }
    EXPECT_EQ(offset_of(view, 1, 2), 11);
  }
}

TEST(ElementAccess, WorksWithoutAlignment) {
  std::array<std::byte, 64> bytes{};
  const TensorView view = TensorView::contiguous(bytes.data() + 1, DType::f64, {}, {4});
  store(view, 2.5, 3);
  EXPECT_EQ(load(view, 3), 2.5);
  const TensorView ids = TensorView::contiguous(bytes.data() + 3, DType::i32, {}, {4});
  store_i32(ids, -7, 2);
  EXPECT_EQ(load_i32(ids, 2), -7);
}

TEST(TensorView, ContiguousStridesAndCounts) {
  const TensorView view = TensorView::contiguous(nullptr, DType::f16, {}, {2, 3, 4});
  EXPECT_EQ(view.stride[0], 12);
  EXPECT_EQ(view.stride[1], 4);
  EXPECT_EQ(view.stride[2], 1);
  EXPECT_EQ(view.num_elements(), 24);
  EXPECT_TRUE(view.given());
  EXPECT_FALSE(TensorView{}.given());
  EXPECT_EQ(TensorView{}.num_elements(), 0);
  EXPECT_EQ(TensorView::contiguous(nullptr, DType::f16, {}, {0, 3}).num_elements(), 0);
}

}  // namespace
}  // namespace msa::core
