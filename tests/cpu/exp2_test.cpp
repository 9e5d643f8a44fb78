// SPDX-License-Identifier: Apache-2.0
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "tests/cpu/targets.hpp"

namespace msa::testing {
namespace {

std::vector<float> exp2_of(const std::vector<float>& x) {
  std::vector<float> y(x.size());
  cpu::exp2_nonpositive(x.data(), y.data(), static_cast<std::int64_t>(x.size()));
  return y;
}

TEST(Exp2, IsWithinItsStatedBound) {
  // Every 499th float from -0 down to -126: 2.2 million values, odd spacing in every binade.
  std::vector<float> x;
  for (std::uint32_t bits = 0x80000000u; bits <= std::bit_cast<std::uint32_t>(-126.0f);
       bits += 499) {
    x.push_back(std::bit_cast<float>(bits));
  }
  for_each_simd_target([&](const char*) {
    const std::vector<float> y = exp2_of(x);
    double worst = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double exact = std::exp2(static_cast<double>(x[i]));
      worst = std::max(worst, std::fabs(static_cast<double>(y[i]) / exact - 1.0));
    }
    EXPECT_LE(worst, 4 * 0x1p-24);  // the bound of exp2-inl.hpp
  });
}

TEST(Exp2, SpecialValues) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for_each_simd_target([&](const char*) {
    const std::vector<float> y = exp2_of({0.0f, -0.0f, -1.0f, -126.0f, -126.001f, -127.0f, -150.0f,
                                          -1e30f, std::numeric_limits<float>::lowest(), -kInf});
    EXPECT_EQ(y, (std::vector<float>{1.0f, 1.0f, 0.5f, 0x1p-126f, 0, 0, 0, 0, 0, 0}));
    for (const std::uint32_t nan : {0x7fc00000u, 0xffc00000u, 0xffffffffu, 0x7f800001u}) {
      EXPECT_TRUE(std::isnan(exp2_of({std::bit_cast<float>(nan)})[0])) << std::hex << nan;
    }
  });
}

}  // namespace
}  // namespace msa::testing
