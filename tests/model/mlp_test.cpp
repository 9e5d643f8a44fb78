// SPDX-License-Identifier: Apache-2.0
#include "model/mlp.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/model/naive_model.hpp"
#include "tests/model/random_model.hpp"

namespace msa {
namespace {

std::vector<model::ExpertChoice> choose(const std::vector<float>& scores,
                                        const std::vector<float>& bias, std::size_t count) {
  std::vector<model::ExpertChoice> choices(count);
  model::choose_experts(scores, bias, choices);
  return choices;
}

TEST(Router, BiasDecidesTheChoiceButNotTheWeights) {
  const auto choices = choose({0.75f, 0.5f, 0.25f, 0.375f}, {0.0f, -0.5f, 0.5f, 0.0f}, 2);
  EXPECT_EQ(choices[0].expert, 0);
  EXPECT_EQ(choices[1].expert, 2);
  EXPECT_EQ(choices[0].weight, 0.75f);
  EXPECT_EQ(choices[1].weight, 0.25f);
}

TEST(Router, WeightsSumToOne) {
  const auto choices = choose({0.5f, 0.5f, 0.25f, 0.0f}, std::vector<float>(4), 3);
  EXPECT_EQ(choices[0].weight, 0.4f);
  EXPECT_EQ(choices[2].weight, 0.2f);
}

TEST(Router, TiesGoToTheLowestExpert) {
  const auto choices = choose({0.1f, 0.2f, 0.1f, 0.2f, 0.2f}, std::vector<float>(5), 2);
  EXPECT_EQ(choices[0].expert, 1);
  EXPECT_EQ(choices[1].expert, 3);
  EXPECT_EQ(choices[0].weight, 0.5f);
}

TEST(Router, TakesEveryExpertOnceWhateverTheScores) {
  const auto choices = choose({NAN, NAN, 0.0f, NAN}, std::vector<float>(4), 4);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(choices[i].expert, static_cast<std::int64_t>(i));
}

class MlpTest : public testing::TestWithParam<DType> {
 protected:
  static constexpr std::int64_t kTokens = 40;

  /// Against the double loops. The bound is the naive model's own sensitivity to f32 rounding: a
  /// sum of n products per stage, three stages, each magnified by at most the activation's slope.
  void check(std::span<const float> out, const std::function<test::Row(const test::Row&)>& naive) {
    double largest = 0.0;
    double worst = 0.0;
    for (std::size_t t = 0; t < static_cast<std::size_t>(kTokens); ++t) {
      const auto width = static_cast<std::size_t>(config_.hidden_size);
      const std::span<const float> row = std::span(x_).subspan(t * width, width);
      const test::Row expected = naive({row.begin(), row.end()});
      for (std::size_t i = 0; i < width; ++i) {
        largest = std::max(largest, std::fabs(expected[i]));
        worst = std::max(worst, std::fabs(static_cast<double>(out[t * width + i]) - expected[i]));
      }
    }
    const auto terms =
        static_cast<double>(2 * config_.hidden_size + config_.dense_intermediate_size);
    EXPECT_LE(worst, terms * 0x1p-24 * largest) << "largest output " << largest;
  }

  model::Config config_ = test::small_config();
  model::Weights weights_ = test::random_weights(config_, GetParam(), 5);
  std::vector<float> x_ = [this] {
    test::Uniform uniform(6);
    return test::random_vector(kTokens * config_.hidden_size, uniform, 1.7);
  }();
  std::vector<float> out_ = std::vector<float>(x_.size(), NAN);
  model::LinearScratch scratch_;
};

TEST_P(MlpTest, DenseAgreesWithDoubleLoops) {
  model::Mlp mlp(config_, kTokens);
  mlp.run_dense(weights_.layers[0].mlp, x_, kTokens, out_, scratch_);
  check(out_,
        [&](const test::Row& x) { return test::naive_mlp(config_, weights_.layers[0].mlp, x); });
}

TEST_P(MlpTest, MoeAgreesWithDoubleLoops) {
  model::Mlp mlp(config_, kTokens);
  mlp.run_moe(weights_.layers[1].moe, x_, kTokens, out_, scratch_);
  check(out_,
        [&](const test::Row& x) { return test::naive_moe(config_, weights_.layers[1].moe, x); });
}

TEST_P(MlpTest, MoeWithoutSharedExpertAgreesWithDoubleLoops) {
  model::MoeWeights moe = weights_.layers[1].moe;
  moe.shared = {};
  model::Mlp mlp(config_, kTokens);
  mlp.run_moe(moe, x_, kTokens, out_, scratch_);
  check(out_, [&](const test::Row& x) { return test::naive_moe(config_, moe, x); });
}

INSTANTIATE_TEST_SUITE_P(Dtypes, MlpTest, testing::Values(DType::f32, DType::f16, DType::bf16),
                         [](const auto& dtype) { return name_of(dtype.param); });

}  // namespace
}  // namespace msa
