// SPDX-License-Identifier: Apache-2.0
#include "model/generate.hpp"

#include <gtest/gtest.h>

#include "msa/error.hpp"
#include "tests/model/random_model.hpp"

namespace msa {
namespace {

using model::FinishReason;

class GenerateTest : public testing::Test {
 protected:
  model::Config config_ = test::small_config();
  model::Transformer model_{config_,
                            test::random_weights(config_, DType::f32, 31),
                            {.max_context = 100, .chunk_tokens = 16}};
  std::vector<std::int32_t> prompt_ = test::random_tokens(70, config_.vocab_size, 32);
};

TEST_F(GenerateTest, GreedyIsTheArgmaxOfEachStep) {
  const auto result = model::generate(model_, prompt_, {.max_tokens = 12});
  ASSERT_EQ(result.tokens.size(), 12u);
  EXPECT_EQ(result.finish_reason, FinishReason::length);
  EXPECT_EQ(result.prompt_tokens, 70);
  EXPECT_EQ(result.timings.prefill.tokens, 70);
  EXPECT_EQ(result.timings.decode.tokens, 11);
  EXPECT_GT(result.peak_memory_bytes, 1 << 20);
  std::vector<std::int32_t> context = prompt_;
  for (std::int32_t token : result.tokens) {
    model_.reset();
    const auto logits = model_.forward(context).logits;
    EXPECT_EQ(std::max_element(logits.begin(), logits.end()) - logits.begin(), token);
    context.push_back(token);
  }
}

TEST_F(GenerateTest, SeedsRepeat) {
  model::GenerateOptions options{.max_tokens = 20};
  options.sampling = {.temperature = 1.0, .top_p = 0.9, .seed = 5};
  const auto first = model::generate(model_, prompt_, options);
  EXPECT_EQ(first.tokens, model::generate(model_, prompt_, options).tokens);
  options.sampling.seed = 6;
  EXPECT_NE(first.tokens, model::generate(model_, prompt_, options).tokens);
}

TEST_F(GenerateTest, StopsAtAnEndToken) {
  const auto all = model::generate(model_, prompt_, {.max_tokens = 12});
  const std::int32_t end = all.tokens[5];
  std::vector<std::int32_t> seen;
  model::GenerateOptions options{.max_tokens = 12};
  options.eos_token_ids = {1000, end};
  options.on_token = [&](std::int32_t id) { seen.push_back(id); };
  const auto result = model::generate(model_, prompt_, options);
  EXPECT_EQ(result.finish_reason, FinishReason::eos);
  const auto first = std::find(all.tokens.begin(), all.tokens.end(), end);
  EXPECT_EQ(result.tokens, std::vector<std::int32_t>(all.tokens.begin(), first));
  EXPECT_EQ(seen, result.tokens);
}

TEST_F(GenerateTest, ReportsPrefillProgress) {
  std::vector<std::int64_t> done;
  model::GenerateOptions options{.max_tokens = 3};
  options.on_prefill_progress = [&](std::int64_t tokens, std::int64_t total) {
    EXPECT_EQ(total, 70);
    done.push_back(tokens);
  };
  model::generate(model_, prompt_, options);
  EXPECT_EQ(done, (std::vector<std::int64_t>{16, 32, 48, 64, 70}));
}

TEST_F(GenerateTest, CancelsDuringPrefillAndDuringDecoding) {
  std::atomic<bool> cancel{false};
  model::GenerateOptions options{.max_tokens = 20};
  options.cancel = &cancel;
  options.on_prefill_progress = [&](std::int64_t done, std::int64_t) { cancel = done == 32; };
  auto result = model::generate(model_, prompt_, options);
  EXPECT_EQ(result.finish_reason, FinishReason::cancelled);
  EXPECT_TRUE(result.tokens.empty());
  EXPECT_EQ(result.timings.prefill.tokens, 32);

  cancel = false;
  options.on_prefill_progress = nullptr;
  int drawn = 0;
  options.on_token = [&](std::int32_t) { cancel = ++drawn == 4; };
  result = model::generate(model_, prompt_, options);
  EXPECT_EQ(result.finish_reason, FinishReason::cancelled);
  EXPECT_EQ(result.tokens.size(), 4u);
}

TEST_F(GenerateTest, RefusesWhatExceedsTheContext) {
  try {
    model::generate(model_, prompt_, {.max_tokens = 31});
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "generate: 70 prompt tokens and max_tokens 31 need a context of 101, but "
                 "max_context is 100 (the model's max_position_embeddings is 512)");
  }
  EXPECT_EQ(model::generate(model_, prompt_, {.max_tokens = 30}).tokens.size(), 30u);
  EXPECT_THROW(model::generate(model_, {}, {.max_tokens = 1}), Error);
  EXPECT_THROW(model::generate(model_, prompt_, {.max_tokens = 0}), Error);
}

}  // namespace
}  // namespace msa
