// SPDX-License-Identifier: Apache-2.0
#include "model/transformer.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <numeric>

#include "core/tensor.hpp"
#include "msa/error.hpp"
#include "tests/model/naive_model.hpp"
#include "tests/model/random_model.hpp"

namespace msa {
namespace {

using model::AttentionMode;
using model::Transformer;

std::vector<std::int64_t> all_rows(std::size_t count) {
  std::vector<std::int64_t> rows(count);
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

/// Logits of every token, `piece` tokens per call.
std::vector<float> logits_of(Transformer& model, std::span<const std::int32_t> tokens,
                             std::size_t piece) {
  std::vector<float> logits;
  for (std::size_t begin = 0; begin < tokens.size(); begin += piece) {
    const auto part = tokens.subspan(begin, std::min(piece, tokens.size() - begin));
    const auto rows = all_rows(part.size());
    const auto result = model.forward(part, {.logit_rows = rows});
    logits.insert(logits.end(), result.logits.begin(), result.logits.end());
  }
  return logits;
}

double largest(const test::Rows& rows) {
  double value = 0.0;
  for (const auto& row : rows) {
    for (double x : row) value = std::max(value, std::fabs(x));
  }
  return value;
}

double largest_difference(std::span<const float> logits, const test::Rows& expected) {
  double worst = 0.0;
  std::size_t i = 0;
  for (const auto& row : expected) {
    for (double x : row) worst = std::max(worst, std::fabs(static_cast<double>(logits[i++]) - x));
  }
  EXPECT_EQ(i, logits.size());
  return worst;
}

/// The project's bound for f32 against another implementation: 1e-4 of the largest logit. f32
/// rounding reaches some 1e-6 here; a wrong formula, expert or block some 1e-1.
void expect_close(std::span<const float> logits, const test::Rows& expected) {
  EXPECT_LE(largest_difference(logits, expected), 1e-4 * largest(expected));
}

struct Variant {
  const char* name;
  int top_k;
  int num_init_blocks;
  int num_local_blocks;
  DType dtype;
};

class TransformerTest : public testing::TestWithParam<Variant> {
 protected:
  static constexpr std::int64_t kTokens = 150;  // 9 blocks and a bit

  TransformerTest() {
    config_.attention.top_k = GetParam().top_k;
    config_.attention.num_init_blocks = GetParam().num_init_blocks;
    config_.attention.num_local_blocks = GetParam().num_local_blocks;
    weights_ = test::random_weights(config_, GetParam().dtype, 11);
    tokens_ = test::random_tokens(kTokens, config_.vocab_size, 12);
  }
  Transformer make(std::int64_t chunk_tokens, AttentionMode mode = AttentionMode::msa) const {
    return Transformer(config_, weights_,
                       {.max_context = 200,
                        .chunk_tokens = chunk_tokens,
                        .attention = mode,
                        .cache_dtype = DType::f32});
  }

  model::Config config_ = test::small_config();
  model::Weights weights_;
  std::vector<std::int32_t> tokens_;
};

TEST_P(TransformerTest, AgreesWithTheNaiveModelInAnyPieces) {
  const test::Rows expected = test::naive_forward(config_, weights_, tokens_);
  for (std::int64_t chunk : {512, 150, 64, 16, 7}) {
    Transformer model = make(chunk);
    SCOPED_TRACE(chunk);
    expect_close(logits_of(model, tokens_, tokens_.size()), expected);
    EXPECT_EQ(model.position(), kTokens);
  }
  Transformer model = make(32);
  for (std::size_t piece : {std::size_t{1}, std::size_t{45}}) {
    SCOPED_TRACE(piece);
    model.reset();
    expect_close(logits_of(model, tokens_, piece), expected);
  }
}

TEST_P(TransformerTest, DenseModeAttendsEverything) {
  const test::Rows expected = test::naive_forward(config_, weights_, tokens_, true);
  Transformer model = make(40, AttentionMode::dense);
  expect_close(logits_of(model, tokens_, tokens_.size()), expected);
}

INSTANTIATE_TEST_SUITE_P(Variants, TransformerTest,
                         testing::Values(Variant{"top3_f32", 3, 0, 1, DType::f32},
                                         Variant{"top4_init1_local2_f32", 4, 1, 2, DType::f32},
                                         Variant{"top16_more_than_blocks_f32", 16, 0, 1,
                                                 DType::f32},
                                         Variant{"top3_bf16", 3, 0, 1, DType::bf16},
                                         Variant{"top3_f16", 3, 0, 1, DType::f16}),
                         [](const auto& variant) { return variant.param.name; });

class TransformerContract : public testing::Test {
 protected:
  model::Config config_ = test::small_config();
  model::Weights weights_ = test::random_weights(config_, DType::f32, 21);
  std::vector<std::int32_t> tokens_ = test::random_tokens(100, config_.vocab_size, 22);
};

TEST_F(TransformerContract, SparseSelectionMatters) {
  // Otherwise the comparisons above would compare dense models.
  const test::Rows sparse = test::naive_forward(config_, weights_, tokens_);
  const test::Rows dense = test::naive_forward(config_, weights_, tokens_, true);
  double difference = 0.0;
  for (std::size_t i = 0; i < sparse.back().size(); ++i) {
    difference = std::max(difference, std::fabs(sparse.back()[i] - dense.back()[i]));
  }
  EXPECT_GT(difference, 1e-2 * largest(sparse));
}

TEST_F(TransformerContract, LogitRowsAreThoseOfTheCall) {
  Transformer model(config_, weights_, {.max_context = 100, .chunk_tokens = 30});
  const std::vector<float> all = logits_of(model, tokens_, tokens_.size());
  model.reset();
  const std::vector<std::int64_t> rows = {0, 29, 30, 99};
  const auto some = model.forward(tokens_, {.logit_rows = rows}).logits;
  ASSERT_EQ(some.size(), rows.size() * 61);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    for (std::size_t i = 0; i < 61; ++i) {
      // The head multiplies other groups of rows: sums of 48 products may round differently.
      EXPECT_NEAR(some[r * 61 + i], all[static_cast<std::size_t>(rows[r]) * 61 + i], 1e-5);
    }
  }
  model.reset();
  EXPECT_EQ(model.forward(tokens_).logits.size(), 61u);
  const std::vector<std::int64_t> outside = {100};
  model.reset();
  EXPECT_THROW(model.forward(tokens_, {.logit_rows = outside}), Error);
}

TEST_F(TransformerContract, RefusesContextPastItsLimitsBeforeComputing) {
  try {
    const Transformer too_long(config_, weights_, {.max_context = 513});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    EXPECT_STREQ(error.what(),
                 "Transformer: max_context is 513 tokens, but the model's max_position_embeddings "
                 "is 512");
  }
  Transformer model(config_, weights_, {.max_context = 99});
  try {
    model.forward(tokens_);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(
        error.what(),
        "Transformer: 0 tokens of context and 100 more are 100, but max_context is 99 (the "
        "model's max_position_embeddings is 512)");
  }
  EXPECT_EQ(model.position(), 0);
  model.forward(std::span(tokens_).first(99));  // exactly full
  EXPECT_THROW(model.forward(std::span(tokens_).first(1)), Error);
  EXPECT_EQ(Transformer(config_, weights_).max_context(), 512);
}

TEST_F(TransformerContract, RefusesTokensThatAreNone) {
  Transformer model(config_, weights_);
  EXPECT_THROW(model.forward(std::vector<std::int32_t>{}), Error);
  EXPECT_THROW(model.forward(std::vector<std::int32_t>{61}), Error);
  EXPECT_THROW(model.forward(std::vector<std::int32_t>{-1}), Error);
}

TEST_F(TransformerContract, CancelledCallsKeepWholeChunksAndCanGoOn) {
  Transformer model(config_, weights_, {.max_context = 100, .chunk_tokens = 30});
  const auto logits = model.forward(tokens_).logits;
  const std::vector<float> expected(logits.begin(), logits.end());
  model.reset();
  std::atomic<bool> cancel{false};
  model::ForwardOptions options;
  options.cancel = &cancel;
  options.on_chunk = [&](std::int64_t done, std::int64_t total) {
    EXPECT_EQ(total, 100);
    cancel = done >= 60;
  };
  const auto stopped = model.forward(tokens_, options);
  EXPECT_TRUE(stopped.cancelled);
  EXPECT_TRUE(stopped.logits.empty());
  EXPECT_EQ(model.position(), 60);
  const auto rest = model.forward(std::span(tokens_).subspan(60)).logits;
  for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(rest[i], expected[i], 1e-5);
}

TEST_F(TransformerContract, SelectionHookSeesEverySparseLayerAndToken) {
  Transformer model(config_, weights_, {.max_context = 100, .chunk_tokens = 30});
  std::map<std::int64_t, std::int64_t> tokens_seen;  // per layer
  model.set_selection_hook(
      [&](std::int64_t layer, std::int64_t first, const TensorView& block_ids) {
        EXPECT_EQ(first, tokens_seen[layer]);
        tokens_seen[layer] += block_ids.shape[1];
        for (std::int64_t i = 0; i < block_ids.shape[1]; ++i) {
          // Ascending, so the local block is the last of those that exist.
          const std::int64_t local = (first + i) / 16;
          const std::int64_t last = std::min<std::int64_t>(local, 2);
          EXPECT_EQ(core::load_i32(block_ids, 1, i, last), local);
        }
      });
  model.forward(tokens_);
  EXPECT_EQ(tokens_seen, (std::map<std::int64_t, std::int64_t>{{1, 100}, {2, 100}}));
}

TEST_F(TransformerContract, TimesPrefillAndDecodingApart) {
  Transformer model(config_, weights_, {.max_context = 100, .chunk_tokens = 30});
  model.forward(std::span(tokens_).first(50));
  model.forward(std::span(tokens_).subspan(50, 1));
  model.forward(std::span(tokens_).subspan(51, 1));
  const model::Timings& timings = model.timings();
  EXPECT_EQ(timings.prefill.tokens, 50);
  EXPECT_EQ(timings.decode.tokens, 2);
  for (const model::PhaseTimes& times : {timings.prefill, timings.decode}) {
    EXPECT_GT(times.indexer, 0.0);
    EXPECT_GT(times.selection, 0.0);
    EXPECT_GT(times.attention, 0.0);
    EXPECT_GT(times.rest(), 0.0);
  }
  model.reset();
  EXPECT_EQ(model.timings().prefill.tokens, 0);
  EXPECT_EQ(model.position(), 0);
}

TEST_F(TransformerContract, CacheUsesPagesAsItGrows) {
  Transformer model(config_, weights_, {.max_context = 500, .cache_dtype = DType::bf16});
  model.forward(std::span(tokens_).first(33));
  // 3 pages of 16 tokens in 3 layers: K and V of 2 heads of 32, and in 2 of them 16 of index K.
  EXPECT_EQ(model.cache().bytes_in_use(), 2 * 3 * 16 * (3 * 2 * 2 * 32 + 2 * 16));
  EXPECT_EQ(model.cache().dtype(), DType::bf16);
}

TEST_F(TransformerContract, NarrowCachesChangeLittle) {
  Transformer exact(config_, weights_, {.max_context = 100});
  EXPECT_EQ(exact.cache().dtype(), DType::f32);
  const auto expected = exact.forward(std::span(tokens_).first(40)).logits;
  for (DType dtype : {DType::f16, DType::bf16}) {
    Transformer model(config_, weights_, {.max_context = 100, .cache_dtype = dtype});
    const auto logits = model.forward(std::span(tokens_).first(40)).logits;
    double scale = 0.0;
    double worst = 0.0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      scale = std::max(scale, std::fabs(static_cast<double>(expected[i])));
      worst = std::max(worst, std::fabs(static_cast<double>(expected[i] - logits[i])));
    }
    // 40 tokens are 3 blocks, all of them selected, so only values round: by 2^-9 (bf16) or 2^-12
    // (f16) each, through 3 layers that may magnify it a few times.
    EXPECT_LE(worst, (dtype == DType::bf16 ? 0x1p-5 : 0x1p-8) * scale) << name_of(dtype);
    EXPECT_GT(worst, 0.0);
  }
}

TEST_F(TransformerContract, LongContextsGetShorterChunks) {
  config_.max_position_embeddings = 1 << 20;
  config_.attention.num_kv_heads = 2;
  // 65536 blocks of 16 tokens make rows of 512 KiB for 2 heads: 128 of them are 64 MiB.
  const model::Attention attention(config_, weights_, {.max_context = 1 << 20, .max_tokens = 512});
  EXPECT_EQ(attention.chunk_limit(0, 512), 512);
  EXPECT_EQ(attention.chunk_limit((1 << 20) - 512, 512), 128);
  EXPECT_EQ(attention.chunk_limit((1 << 20) - 3, 3), 3);
}

}  // namespace
}  // namespace msa
