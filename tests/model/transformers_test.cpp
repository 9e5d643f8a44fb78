// SPDX-License-Identifier: Apache-2.0
//
// The runtime against transformers: fixtures/ holds checkpoints and what transformers makes of them
// in f32 (make_model_fixtures.py); trained_smoke and its results are PyTorch's, from the training
// recipe (make_trained_fixture.py); mini_m3 is what `make run` runs (make_mini_m3_fixture.py).
// Logits may differ by 1e-4 of the largest one, the bound that the project set itself (f32 rounding
// reaches some 1e-6); what is chosen, blocks and tokens, must be the same.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>

#include "core/env.hpp"
#include "core/scalar.hpp"
#include "model/generate.hpp"
#include "model/safetensors.hpp"
#include "model/transformer.hpp"

namespace msa {
namespace {

using model::Transformer;

constexpr double kTolerance = 1e-4;

std::filesystem::path folder_of(const std::string& fixture) {
  return std::filesystem::path(MSA_SOURCE_DIR) / "tests/model/fixtures" / fixture;
}

std::filesystem::path checkpoint_of(const std::string& fixture) {
  const std::filesystem::path example =
      std::filesystem::path(MSA_SOURCE_DIR) / "examples" / fixture;
  return std::filesystem::exists(example) ? example : folder_of(fixture);
}

/// What transformers made of a checkpoint.
class Expected {
 public:
  explicit Expected(const std::string& fixture) {
    const std::string name = folder_of(fixture) / "expected.safetensors";
    std::ifstream file(name, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
    tensors_ = model::parse_safetensors(std::as_bytes(std::span(bytes_)), name);
  }

  template <class T>
  std::vector<T> values(const std::string& name) const {
    const model::StoredTensor& tensor = tensors_.at(name);
    EXPECT_EQ(tensor.dtype, (std::is_same_v<T, float> ? "F32" : "I32")) << name;
    std::vector<T> values(tensor.data.size() / sizeof(T));
    std::memcpy(values.data(), tensor.data.data(), tensor.data.size());
    return values;
  }
  const std::vector<std::int64_t>& shape(const std::string& name) const {
    return tensors_.at(name).shape;
  }

 private:
  std::vector<char> bytes_;
  std::map<std::string, model::StoredTensor> tensors_;
};

void expect_close(std::span<const float> actual, std::span<const float> expected) {
  ASSERT_EQ(actual.size(), expected.size());
  double largest = 0.0;
  double worst = 0.0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const auto value = static_cast<double>(expected[i]);
    largest = std::max(largest, std::fabs(value));
    const double difference = std::fabs(static_cast<double>(actual[i]) - value);
    if (!(difference <= worst)) worst = difference;  // NaN stays
  }
  EXPECT_LE(worst, kTolerance * largest) << "largest logit " << largest;
}

/// A backend forced for as long as this lives.
class Backend {
 public:
  explicit Backend(const char* name) : before_(core::env("MSA_BACKEND")) {
    setenv("MSA_BACKEND", name, 1);
  }
  ~Backend() { setenv("MSA_BACKEND", before_.c_str(), 1); }
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

 private:
  std::string before_;  // empty is like unset
};

class TransformersTest : public testing::TestWithParam<const char*> {
 protected:
  Transformer make(std::int64_t chunk_tokens) const {
    model::Config config = model::load_config(checkpoint_of(GetParam()));
    model::Weights weights = model::load_weights(checkpoint_of(GetParam()), config);
    const model::RuntimeOptions options{
        .max_context = num_tokens() + 64, .chunk_tokens = chunk_tokens, .cache_dtype = DType::f32};
    return Transformer(std::move(config), std::move(weights), options);
  }
  std::int64_t num_tokens() const { return static_cast<std::int64_t>(prompt_.size()); }

  /// The prompt in calls of `piece` tokens and chunks of `chunk_tokens`: logits and selected blocks
  /// of the recorded positions.
  void check_prompt(std::int64_t chunk_tokens, std::int64_t piece) {
    SCOPED_TRACE(testing::Message() << "chunks of " << chunk_tokens << ", calls of " << piece);
    Transformer model = make(chunk_tokens);
    std::map<std::int64_t, std::vector<std::int32_t>> selected;  // [rows, heads, top_k] per layer
    model.set_selection_hook(
        [&](std::int64_t layer, std::int64_t first, const TensorView& block_ids) {
          for (std::int32_t position : positions_) {
            const std::int64_t row = position - first;
            if (row < 0 || row >= block_ids.shape[1]) continue;
            for (std::int64_t head = 0; head < block_ids.shape[0]; ++head) {
              for (std::int64_t slot = 0; slot < block_ids.shape[2]; ++slot) {
                selected[layer].push_back(core::load_i32(block_ids, head, row, slot));
              }
            }
          }
        });
    std::vector<float> logits;
    for (std::int64_t begin = 0; begin < num_tokens(); begin += piece) {
      const std::int64_t count = std::min(piece, num_tokens() - begin);
      std::vector<std::int64_t> rows;
      for (std::int32_t position : positions_) {
        if (position >= begin && position < begin + count) rows.push_back(position - begin);
      }
      const auto result = model.forward(std::span(prompt_).subspan(static_cast<std::size_t>(begin),
                                                                   static_cast<std::size_t>(count)),
                                        {.logit_rows = rows});
      if (!rows.empty()) logits.insert(logits.end(), result.logits.begin(), result.logits.end());
    }
    expect_close(logits, expected_.values<float>("logits"));
    check_blocks(model.config(), selected);
  }

  void check_blocks(const model::Config& config,
                    const std::map<std::int64_t, std::vector<std::int32_t>>& selected) {
    for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
      if (config.attention_kinds[static_cast<std::size_t>(layer)] != model::AttentionKind::sparse) {
        EXPECT_EQ(selected.count(layer), 0u);
        continue;
      }
      const std::string name = "block_ids." + std::to_string(layer);
      const auto ids = expected_.values<std::int32_t>(name);
      const auto& shape = expected_.shape(name);  // [heads, rows, top_k]
      ASSERT_EQ(selected.at(layer).size(), ids.size());
      std::size_t i = 0;
      for (std::int64_t row = 0; row < shape[1]; ++row) {
        for (std::int64_t head = 0; head < shape[0]; ++head) {
          for (std::int64_t slot = 0; slot < shape[2]; ++slot) {
            ASSERT_EQ(selected.at(layer)[i++],
                      ids[static_cast<std::size_t>((head * shape[1] + row) * shape[2] + slot)])
                << "layer " << layer << " head " << head << " position "
                << positions_[static_cast<std::size_t>(row)] << " slot " << slot;
          }
        }
      }
    }
  }

  /// The greedy continuation with cached decoding, and the logits that chose each of its tokens.
  void check_continuation(std::int64_t chunk_tokens) {
    SCOPED_TRACE(testing::Message() << "chunks of " << chunk_tokens);
    Transformer model = make(chunk_tokens);
    const auto greedy = expected_.values<std::int32_t>("greedy");
    ASSERT_EQ(greedy.size(), GetParam() == std::string("mini_m3") ? 16u : 64u);
    std::vector<float> logits;
    auto result = model.forward(prompt_);
    for (std::size_t i = 0; i < greedy.size(); ++i) {
      ASSERT_EQ(model::Sampler().sample(result.logits), greedy[i]) << "token " << i;
      logits.insert(logits.end(), result.logits.begin(), result.logits.end());
      if (i + 1 < greedy.size()) result = model.forward({&greedy[i], 1});
    }
    expect_close(logits, expected_.values<float>("greedy_logits"));
  }

  const Expected expected_{GetParam()};
  const std::vector<std::int32_t> prompt_ = expected_.values<std::int32_t>("prompt");
  const std::vector<std::int32_t> positions_ = expected_.values<std::int32_t>("positions");
};

TEST_P(TransformersTest, PromptInOnePiece) { check_prompt(num_tokens(), num_tokens()); }

TEST_P(TransformersTest, PromptInOddChunks) { check_prompt(131, num_tokens()); }

TEST_P(TransformersTest, PromptInSeveralCalls) { check_prompt(128, 301); }

TEST_P(TransformersTest, GreedyContinuationWithCache) { check_continuation(512); }

INSTANTIATE_TEST_SUITE_P(SlowFixtures, TransformersTest,
                         testing::Values("group2_block16", "group8_block128", "group1_all_blocks",
                                         "group4_released", "trained_smoke", "mini_m3"),
                         [](const auto& fixture) { return std::string(fixture.param); });

class ShortTransformersTest : public TransformersTest {};

TEST_P(ShortTransformersTest, PromptInPiecesOfManySizes) {
  for (std::int64_t chunk_tokens : {1, 16, 77, 128}) check_prompt(chunk_tokens, num_tokens());
  for (std::int64_t piece : {1, 3, 16}) check_prompt(512, piece);
}

TEST_P(ShortTransformersTest, Generate) {
  Transformer model = make(100);
  EXPECT_EQ(model::generate(model, prompt_, {.max_tokens = 64}).tokens,
            expected_.values<std::int32_t>("greedy"));
}

TEST_P(ShortTransformersTest, ReferenceBackend) {
  const Backend backend("reference");
  check_prompt(100, num_tokens());
  check_continuation(512);
}

// Those of at most 517 tokens.
INSTANTIATE_TEST_SUITE_P(Fixtures, ShortTransformersTest,
                         testing::Values("group2_block16", "group1_all_blocks", "trained_smoke"),
                         [](const auto& fixture) { return std::string(fixture.param); });

}  // namespace
}  // namespace msa
