// SPDX-License-Identifier: Apache-2.0
#include "model/layers.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/model/naive_model.hpp"
#include "tests/model/random_model.hpp"

namespace msa {
namespace {

constexpr double kUnit = 0x1p-24;  // largest relative error of one f32 operation

test::Row as_row(std::span<const float> values) { return {values.begin(), values.end()}; }

TEST(Layers, NormMultipliesByOnePlusWeight) {
  test::Uniform uniform(1);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (std::int64_t width : {1, 5, 128, 6144}) {
      const core::Tensor weight(dtype, {width});
      test::fill(weight, uniform, 0.5);
      const std::int64_t rows = 3;
      const std::vector<float> x = test::random_vector(rows * width, uniform, 3.0);
      std::vector<float> y(x.size());
      model::rms_norm(x, rows, model::norm_scale(weight), 1e-6, y);
      std::vector<float> in_place = x;
      model::rms_norm(in_place, rows, model::norm_scale(weight), 1e-6, in_place);
      EXPECT_EQ(y, in_place);
      for (std::size_t r = 0; r < 3; ++r) {
        const auto begin = r * static_cast<std::size_t>(width);
        const test::Row expected = test::naive_norm(
            weight, as_row(std::span(x).subspan(begin, static_cast<std::size_t>(width))), 1e-6);
        for (std::size_t i = 0; i < expected.size(); ++i) {
          // Four roundings: the factor, 1 + weight and two products.
          ASSERT_NEAR(static_cast<double>(y[begin + i]), expected[i],
                      4.01 * kUnit * std::fabs(expected[i]));
        }
      }
    }
  }
}

TEST(Layers, NormOfZerosIsZero) {
  const core::Tensor weight(DType::f32, {4});
  std::vector<float> x(4, 0.0f);
  model::rms_norm(x, 1, model::norm_scale(weight), 1e-6, x);
  EXPECT_EQ(x, std::vector<float>(4, 0.0f));
}

TEST(Layers, RotationTurnsPairsOfHalvesAndLeavesTheRest) {
  const std::int64_t rotary_dim = 8;
  const double theta = 5e6;
  model::RotaryEmbedding rope(rotary_dim, theta, 16);
  test::Uniform uniform(2);
  for (std::int64_t first : {0, 1000, 1048570}) {
    rope.prepare(first, 5);
    for (std::int64_t token = 0; token < 5; ++token) {
      const std::vector<float> x = test::random_vector(12, uniform);
      std::vector<float> y = x;
      rope.rotate(y.data(), token);
      for (std::size_t i = 0; i < 4; ++i) {
        const double position = static_cast<double>(first + token);
        const double angle = position * std::pow(theta, -2.0 * static_cast<double>(i) / 8.0);
        const auto a = static_cast<double>(x[i]);
        const auto b = static_cast<double>(x[i + 4]);
        // The angle carries roundings of exponent, power, reciprocal and product, the exponent's
        // scaled by ln(theta) * 2i / rotary_dim < 16; magnitudes are below 1; three more follow.
        const double bound = (20.0 * angle + 6.0) * kUnit * (std::fabs(a) + std::fabs(b));
        EXPECT_NEAR(static_cast<double>(y[i]), a * std::cos(angle) - b * std::sin(angle), bound);
        EXPECT_NEAR(static_cast<double>(y[i + 4]), b * std::cos(angle) + a * std::sin(angle),
                    bound);
      }
      for (std::size_t i = 8; i < 12; ++i) EXPECT_EQ(x[i], y[i]);
    }
  }
}

TEST(Layers, HeadsAreNormalisedThenRotated) {
  test::Uniform uniform(3);
  const core::Tensor weight(DType::f32, {12});
  test::fill(weight, uniform, 0.5);
  const std::vector<float> scale = model::norm_scale(weight);
  model::RotaryEmbedding rope(8, 100.0, 16);
  rope.prepare(7, 4);
  std::vector<float> heads = test::random_vector(4 * 3 * 12, uniform);
  std::vector<float> expected = heads;
  model::rms_norm(expected, 4 * 3, scale, 1e-6, expected);
  for (std::int64_t i = 0; i < 12; ++i) rope.rotate(expected.data() + i * 12, i / 3);
  model::norm_and_rotate(heads, 4, 3, scale, 1e-6, rope);
  EXPECT_EQ(heads, expected);
}

TEST(Layers, SwigluClampsGateAboveAndUpBothWays) {
  const std::vector<float> gates = {-1e30f, -100.0f, -51.0f, -7.5f, -1.0f, 0.0f,
                                    0.5f,   6.9f,    7.0f,   9.0f,  1e30f};
  const std::vector<float> ups = {-1e30f, -7.1f, -1.0f, 0.0f, 2.0f, 7.1f, 1e30f};
  for (float gate : gates) {
    for (float up : ups) {
      std::vector<float> value = {gate};
      model::swiglu_oai(value, std::vector<float>{up}, 1.702, 7.0);
      const double g = std::min(static_cast<double>(gate), 7.0);
      const double u = std::min(std::max(static_cast<double>(up), -7.0), 7.0);
      const double expected = g / (1.0 + std::exp(-1.702 * g)) * (u + 1.0);
      // exp magnifies the roundings of its argument by |alpha g| and has three of its own; the rest
      // are six operations. Below sigmoids of e^-87 the result may be 0: |g (u + 1)| e^-87 at most.
      EXPECT_NEAR(static_cast<double>(value[0]), expected,
                  (2.0 * 1.702 * std::fabs(g) + 12.0) * kUnit * std::fabs(expected) +
                      std::min(std::fabs(g), 60.0) * 8.0 * std::exp(-87.0))
          << gate << " " << up;
    }
  }
}

TEST(Layers, SwigluKeepsNaN) {
  std::vector<float> gate = {NAN, 1.0f};
  model::swiglu_oai(gate, std::vector<float>{1.0f, NAN}, 1.702, 7.0);
  EXPECT_TRUE(std::isnan(gate[0]));
  EXPECT_TRUE(std::isnan(gate[1]));
}

}  // namespace
}  // namespace msa
