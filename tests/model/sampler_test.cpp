// SPDX-License-Identifier: Apache-2.0
#include "model/sampler.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "msa/error.hpp"

namespace msa {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const std::vector<float> kLogits = {0.0f, std::log(2.0f), std::log(4.0f), std::log(3.0f)};

/// How often each token came out of `count` draws.
std::vector<int> histogram(const model::SamplingOptions& options, int count) {
  model::Sampler sampler(options);
  std::vector<int> counts(kLogits.size());
  for (int i = 0; i < count; ++i) ++counts[static_cast<std::size_t>(sampler.sample(kLogits))];
  return counts;
}

TEST(Sampler, GreedyTakesTheLargestAndTheLowestOfTies) {
  model::Sampler sampler;
  EXPECT_EQ(sampler.sample(kLogits), 2);
  EXPECT_EQ(sampler.sample(std::vector<float>{1.0f, 3.0f, 3.0f}), 1);
  EXPECT_EQ(sampler.sample(std::vector<float>{-kInfinity, -5.0f}), 1);
}

TEST(Sampler, FollowsTheProbabilities) {
  const int count = 20000;
  const auto counts = histogram({.temperature = 1.0, .seed = 3}, count);
  const double expected[] = {0.1, 0.2, 0.4, 0.3};
  for (std::size_t i = 0; i < 4; ++i) {
    // Five standard deviations of a binomial.
    const double deviation = std::sqrt(count * expected[i] * (1.0 - expected[i]));
    EXPECT_NEAR(counts[i], count * expected[i], 5.0 * deviation);
  }
}

TEST(Sampler, TemperatureSharpens) {
  const int count = 20000;
  const auto counts = histogram({.temperature = 0.5, .seed = 3}, count);
  const double expected[] = {1.0 / 30, 4.0 / 30, 16.0 / 30, 9.0 / 30};  // squares
  for (std::size_t i = 0; i < 4; ++i) {
    const double deviation = std::sqrt(count * expected[i] * (1.0 - expected[i]));
    EXPECT_NEAR(counts[i], count * expected[i], 5.0 * deviation);
  }
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesIt) {
  auto counts = histogram({.temperature = 1.0, .top_p = 0.65, .seed = 4}, 2000);  // 0.4 + 0.3
  EXPECT_EQ(counts[0], 0);
  EXPECT_EQ(counts[1], 0);
  EXPECT_GT(counts[2], 0);
  EXPECT_GT(counts[3], 0);
  counts = histogram({.temperature = 1.0, .top_p = 1e-9, .seed = 4}, 100);
  EXPECT_EQ(counts[2], 100);
}

TEST(Sampler, TopKKeepsTheLikeliest) {
  const auto counts = histogram({.temperature = 1.0, .top_k = 3, .seed = 5}, 2000);
  EXPECT_EQ(counts[0], 0);
  EXPECT_GT(counts[1], 0);
  EXPECT_EQ(histogram({.temperature = 1.0, .top_k = 1, .seed = 5}, 100)[2], 100);
}

TEST(Sampler, SeedDecidesTheTokens) {
  const auto draw = [](std::uint64_t seed) {
    model::Sampler sampler({.temperature = 1.0, .top_p = 0.95, .seed = seed});
    std::vector<std::int32_t> ids;
    for (int i = 0; i < 50; ++i) ids.push_back(sampler.sample(kLogits));
    return ids;
  };
  EXPECT_EQ(draw(7), draw(7));
  EXPECT_NE(draw(7), draw(8));
}

TEST(Sampler, RefusesBadLogitsAndOptions) {
  model::Sampler sampler({.temperature = 1.0});
  EXPECT_THROW(sampler.sample(std::vector<float>{0.0f, NAN}), Error);
  EXPECT_THROW(sampler.sample(std::vector<float>{0.0f, kInfinity}), Error);
  EXPECT_THROW(sampler.sample(std::vector<float>{-kInfinity, -kInfinity}), Error);
  EXPECT_THROW(sampler.sample({}), Error);
  try {
    model::Sampler().sample(std::vector<float>{0.0f, NAN});
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "Sampler: the logit of token 1 is nan");
  }
  EXPECT_THROW(model::Sampler({.temperature = -1.0}), Error);
  EXPECT_THROW(model::Sampler({.temperature = NAN}), Error);
  EXPECT_THROW(model::Sampler({.top_p = 0.0}), Error);
  EXPECT_THROW(model::Sampler({.top_p = 1.5}), Error);
  EXPECT_THROW(model::Sampler({.top_k = -1}), Error);
}

}  // namespace
}  // namespace msa
