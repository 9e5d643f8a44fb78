// SPDX-License-Identifier: Apache-2.0
#include "core/index_code.hpp"

#include <gtest/gtest.h>

#include <random>
#include <vector>

namespace msa::core {
namespace {

struct Code {
  std::vector<std::int8_t> codes;
  double scale;
  double error;
};

Code encode(const std::vector<double>& key) {
  Code code{.codes = std::vector<std::int8_t>(key.size()), .scale = 0.0, .error = 0.0};
  std::uint16_t parts[2];
  encode_index_key(reinterpret_cast<const std::byte*>(key.data()), DType::f64,
                   static_cast<std::int64_t>(key.size()), code.codes.data(), parts);
  code.scale = static_cast<double>(bf16_to_f32(parts[0]));
  code.error = static_cast<double>(bf16_to_f32(parts[1]));
  return code;
}

TEST(Bf16AtLeast, IsTheNextOneUp) {
  EXPECT_EQ(bf16_to_f32(bf16_at_least(0.0)), 0.0f);
  EXPECT_EQ(bf16_to_f32(bf16_at_least(1.0)), 1.0f);
  EXPECT_EQ(bf16_to_f32(bf16_at_least(1.0 + 0x1p-50)), 1.0f + 0x1p-7f);
  EXPECT_EQ(bf16_to_f32(bf16_at_least(1.0 + 0x1p-20)), 1.0f + 0x1p-7f);
  EXPECT_EQ(bf16_to_f32(bf16_at_least(1e-300)), 0x1p-133f);
  EXPECT_EQ(bf16_to_f32(bf16_at_least(3.4e38)), std::numeric_limits<float>::infinity());
  EXPECT_EQ(bf16_to_f32(bf16_at_least(std::numeric_limits<double>::infinity())),
            std::numeric_limits<float>::infinity());
}

TEST(IndexCode, ErrorIsABoundAndATightOne) {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (const double magnitude : {1.0, 1e-38, 1e-30, 1e-5, 300.0, 1e8}) {
    for (int i = 0; i < 500; ++i) {
      std::vector<double> key(96);
      for (double& element : key) element = magnitude * normal(random);
      if (i % 5 == 0) key[7] *= 100.0;
      const Code code = encode(key);
      double squares = 0.0;
      double largest = 0.0;
      for (std::size_t d = 0; d < key.size(); ++d) {
        EXPECT_LE(std::abs(code.codes[d]), 127);
        const double rest = key[d] - code.scale * code.codes[d];
        squares += rest * rest;
        largest = std::max(largest, std::fabs(key[d]));
      }
      EXPECT_GE(code.scale * 127.0, largest);
      EXPECT_GE(code.error, std::sqrt(squares));
      // bf16 steps are 2^-7 apart, or 2^-133 near zero.
      EXPECT_LE(code.error, std::sqrt(squares) * (1.0 + 0x1p-6) + 0x1p-133);
      EXPECT_LE(code.scale, largest / 127.0 * (1.0 + 0x1p-6) + 0x1p-133);
    }
  }
}

TEST(IndexCode, KnownValues) {
  const Code code = encode({127.0, -127.0, 3.25, 0.5, -0.5, 1.5});
  EXPECT_EQ(code.codes, (std::vector<std::int8_t>{127, -127, 3, 0, 0, 2}));
  EXPECT_EQ(code.scale, 1.0);
  EXPECT_GE(code.error, std::sqrt(0.0625 + 0.75));
}

TEST(IndexCode, ZerosAreExact) {
  const Code code = encode({0.0, -0.0, 0.0});
  EXPECT_EQ(code.codes, (std::vector<std::int8_t>{0, 0, 0}));
  EXPECT_EQ(code.scale, 0.0);
  EXPECT_EQ(code.error, 0.0);
}

TEST(IndexCode, WhatCannotBeCodedHasNoBound) {
  for (const double bad :
       {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
        std::numeric_limits<double>::quiet_NaN(), 0x1p41}) {
    const Code code = encode({1.0, bad, 2.0});
    EXPECT_EQ(code.codes, (std::vector<std::int8_t>{0, 0, 0})) << bad;
    EXPECT_EQ(code.scale, 0.0) << bad;
    EXPECT_EQ(code.error, std::numeric_limits<double>::infinity()) << bad;
  }
}

}  // namespace
}  // namespace msa::core
