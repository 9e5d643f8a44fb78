// SPDX-License-Identifier: Apache-2.0
//
// The planned memory against what the runtime allocates, and against the bounds that are promised.
#include "model/memory.hpp"

#include <gtest/gtest.h>
#include <malloc.h>

#include <numeric>

#include "model/transformer.hpp"
#include "msa/backend.hpp"
#include "msa/error.hpp"
#include "tests/model/naive_model.hpp"
#include "tests/model/random_model.hpp"

// Bytes in use, where a sanitizer has replaced malloc.
extern "C" [[gnu::weak]] std::size_t __sanitizer_get_current_allocated_bytes();

namespace msa {
namespace {

using model::AttentionMode;
using model::MemoryPlan;
using model::plan_memory;
using model::RuntimeOptions;
using model::Transformer;

constexpr std::int64_t k128K = 128 << 10;
constexpr std::int64_t k1M = 1 << 20;

std::int64_t heap_bytes() {
  if (__sanitizer_get_current_allocated_bytes != nullptr) {
    return static_cast<std::int64_t>(__sanitizer_get_current_allocated_bytes());
  }
  const struct mallinfo2 info = mallinfo2();
  return static_cast<std::int64_t>(info.uordblks + info.hblkhd);
}

/// The small model of the memory targets: 16 / 4 heads of 128 in each layer, hidden size 256.
model::Config target_config(std::int64_t num_layers = 1) {
  model::Config config = test::small_config();
  config.hidden_size = 256;
  config.num_layers = num_layers;
  config.vocab_size = 2048;
  config.attention = {.num_q_heads = 16, .num_kv_heads = 4};
  config.rotary_dim = 64;
  config.max_position_embeddings = k1M;
  config.dense_intermediate_size = 512;
  config.expert_intermediate_size = 256;
  config.shared_intermediate_size = 256;
  config.attention_kinds.assign(static_cast<std::size_t>(num_layers), model::AttentionKind::sparse);
  config.mlp_kinds.assign(static_cast<std::size_t>(num_layers), model::MlpKind::moe);
  return config;
}

model::Config released_config() {
  model::Config config = test::small_config();
  config.hidden_size = 6144;
  config.num_layers = 60;
  config.vocab_size = 200064;
  config.attention = {};
  config.rotary_dim = 64;
  config.max_position_embeddings = k1M;
  config.dense_intermediate_size = 12288;
  config.expert_intermediate_size = 3072;
  config.shared_intermediate_size = 3072;
  config.num_experts = 128;
  config.num_experts_per_token = 4;
  config.attention_kinds.assign(60, model::AttentionKind::sparse);
  config.mlp_kinds.assign(60, model::MlpKind::moe);
  for (std::size_t layer = 0; layer < 3; ++layer) {
    config.attention_kinds[layer] = model::AttentionKind::dense;
    config.mlp_kinds[layer] = model::MlpKind::dense;
  }
  return config;
}

/// The shapes of a checkpoint's matrices, which is all that a plan reads of them.
model::Weights shapes_only(const model::Config& c, DType dtype) {
  const auto matrix = [&](std::int64_t out, std::int64_t in) {
    return TensorView::contiguous(nullptr, dtype, {}, {out, in});
  };
  const auto mlp = [&](std::int64_t width) {
    return model::MlpWeights{.gate = matrix(width, c.hidden_size),
                             .up = matrix(width, c.hidden_size),
                             .down = matrix(c.hidden_size, width)};
  };
  model::Weights weights;
  weights.embed_tokens = weights.lm_head = matrix(c.vocab_size, c.hidden_size);
  for (const model::MlpKind kind : c.mlp_kinds) {
    model::LayerWeights& layer = weights.layers.emplace_back();
    layer.o_proj = matrix(c.hidden_size, c.attention.num_q_heads * c.attention.head_dim);
    if (kind == model::MlpKind::dense) layer.mlp = mlp(c.dense_intermediate_size);
    if (kind == model::MlpKind::moe) layer.moe.experts = {mlp(c.expert_intermediate_size)};
  }
  return weights;
}

class Memory : public testing::Test {
 protected:
  void SetUp() override { threads_ = num_threads(); }
  void TearDown() override { set_num_threads(threads_); }

 private:
  int threads_ = 1;
};

TEST_F(Memory, StaysWithinItsBoundsAtLongContexts) {
  const auto working = [](const model::Config& config, std::int64_t context) {
    return plan_memory(config, shapes_only(config, DType::bf16), {.max_context = context})
        .working.total();
  };
  for (const int threads : {1, 2, 16}) {
    set_num_threads(threads);
    for (const std::int64_t layers : {1, 60}) {
      EXPECT_LE(working(target_config(layers), k128K), 256'000'000) << threads << " " << layers;
      EXPECT_LE(working(target_config(layers), k1M), 512'000'000) << threads << " " << layers;
    }
  }
  set_num_threads(2);
  EXPECT_LE(working(released_config(), k128K), 256'000'000);
  EXPECT_LE(working(released_config(), k1M), 512'000'000);
}

TEST_F(Memory, GrowsWithTheContextOnlyUpToTheBoundOfTheScores) {
  const model::Config config = target_config();
  const model::Weights weights = shapes_only(config, DType::bf16);
  const auto plan = [&](std::int64_t context) {
    return plan_memory(config, weights, {.max_context = context}).working;
  };
  // f32 scores of 512 tokens, 4 heads and a block per 128 tokens: 8 MiB.
  EXPECT_EQ(plan(k128K).block_scores, 4 * 512 * 4 * 1024);
  EXPECT_EQ(plan(k1M).block_scores, 64 << 20);
  EXPECT_EQ(plan_memory(config, weights, {.max_context = k1M, .max_score_bytes = 1 << 20})
                .working.block_scores,
            1 << 20);
  EXPECT_EQ(plan(k1M).activations, plan(k128K).activations);
  EXPECT_EQ(plan(k1M).expanded_weights, plan(k128K).expanded_weights);
  // Page ids and their owners, 20 bytes per page.
  EXPECT_EQ(plan(k1M).tables - plan(k128K).tables, 20 * (k1M - k128K) / 128);
}

TEST_F(Memory, PlansCachesByKindOfLayer) {
  const model::Config config = released_config();
  const model::Weights weights = shapes_only(config, DType::bf16);
  const MemoryPlan plan = plan_memory(config, weights, {.max_context = 32768});
  ASSERT_EQ(plan.caches.size(), 2u);
  EXPECT_EQ(plan.caches[0].kind, model::AttentionKind::dense);
  EXPECT_EQ(plan.caches[0].num_layers, 3);
  EXPECT_EQ(plan.caches[0].k, std::int64_t{2} * 3 * 32768 * 4 * 128);
  EXPECT_EQ(plan.caches[0].v, plan.caches[0].k);
  EXPECT_EQ(plan.caches[0].index_k, 0);
  EXPECT_EQ(plan.caches[1].num_layers, 57);
  EXPECT_EQ(plan.caches[1].index_k, std::int64_t{2} * 57 * 32768 * 128);
  EXPECT_EQ(plan.cache_total(), std::int64_t{32768} * 137472);  // docs/model.md
  const MemoryPlan dense =
      plan_memory(config, weights, {.max_context = 32768, .attention = AttentionMode::dense});
  EXPECT_EQ(dense.caches[1].index_k, 0);
  EXPECT_EQ(dense.working.block_scores, 0);
  EXPECT_THROW(plan_memory(config, weights, {.max_context = k1M + 1}), Error);
}

struct Measured {
  const char* name;
  bool target;  // else the small model with dense and sparse layers, dense MLPs and experts
  DType dtype;
  AttentionMode mode;
  std::int64_t max_context;
};

void PrintTo(const Measured& measured, std::ostream* out) { *out << measured.name; }

class MemoryOfRuns : public testing::TestWithParam<Measured> {
 protected:
  void TearDown() override { set_num_threads(threads_); }

 private:
  int threads_ = num_threads();
};

TEST_P(MemoryOfRuns, IsWhatWasPlanned) {
  const Measured& measured = GetParam();
  const model::Config config = measured.target ? target_config() : test::small_config();
  const model::Weights weights = test::random_weights(config, measured.dtype, 1);
  const auto tokens = test::random_tokens(300, config.vocab_size, 2);
  const RuntimeOptions options{
      .max_context = measured.max_context, .chunk_tokens = 256, .attention = measured.mode};
  // One thread: oneDNN keeps memory for each thread that has ever called it, and which call is a
  // worker's first depends on when it wakes.
  set_num_threads(1);
  const auto run_to_the_end = [&](Transformer& model) {
    model.fill_context(measured.max_context - 310, 3);
    model.forward(tokens);
    for (int i = 0; i < 10; ++i) model.forward(std::span(tokens).first(1));
  };
  {  // oneDNN's kernels for these shapes and gtest's own memory exist before the measurement.
    Transformer model(config, weights, options);
    run_to_the_end(model);
  }

  const MemoryPlan plan = plan_memory(config, weights, options);
  const std::int64_t before = heap_bytes();
  Transformer model(config, weights, options);
  const std::int64_t made = heap_bytes() - before;
  run_to_the_end(model);
  const std::int64_t run = heap_bytes() - before;

  // Beside the planned buffers there are copies of Config and Weights, at most 16 KiB for each
  // layer here, and what malloc adds: 32 bytes or, for the 20 large ones, a page of 4 KiB each.
  const std::int64_t rest = (std::int64_t{16} << 10) * config.num_layers + 20 * 4096;
  const std::int64_t planned = plan.working.total();
  // Large buffers count as whole pages: what the first model had to spare of one, this may lack.
  EXPECT_GE(run, planned - 4096 - 20 * measured.max_context / config.attention.block_size);
  EXPECT_LE(run, planned + rest);
  // A later call allocates nothing that stays, but the list of the cache's pages.
  EXPECT_LE(run - made, 16 * measured.max_context / config.attention.block_size + 4096);
  EXPECT_EQ(model.position(), measured.max_context);
  EXPECT_EQ(model.cache().bytes_in_use(), plan.cache_total());
}

INSTANTIATE_TEST_SUITE_P(
    Models, MemoryOfRuns,
    testing::Values(Measured{"small_f32", false, DType::f32, AttentionMode::msa, 512},
                    Measured{"small_bf16", false, DType::bf16, AttentionMode::msa, 512},
                    Measured{"small_bf16_dense", false, DType::bf16, AttentionMode::dense, 512},
                    Measured{"target_8k", true, DType::bf16, AttentionMode::msa, 8192},
                    Measured{"target_2k_dense", true, DType::bf16, AttentionMode::dense, 2048}),
    [](const auto& measured) { return measured.param.name; });

TEST_F(Memory, ShorterChunksForTheBoundChangeNothing) {
  const model::Config config = test::small_config();
  const model::Weights weights = test::random_weights(config, DType::f32, 1);
  const auto tokens = test::random_tokens(300, config.vocab_size, 2);
  const test::Rows expected = test::naive_forward(config, weights, tokens);
  std::vector<std::int64_t> rows(tokens.size());
  std::iota(rows.begin(), rows.end(), 0);
  // A token at the end has 2 heads x 19 blocks x 4 bytes of scores: 1000 bytes hold 6 of them, and
  // 1 byte none, so that chunks get one token.
  for (const std::int64_t bytes : {std::int64_t{1000}, std::int64_t{1}}) {
    Transformer model(config, weights, {.max_context = 300, .max_score_bytes = bytes});
    std::int64_t longest_at_end = 0;
    std::int64_t before = 0;
    const auto result = model.forward(
        tokens, {.logit_rows = rows, .on_chunk = [&](std::int64_t done, std::int64_t) {
                   longest_at_end = done - before;
                   before = done;
                 }});
    EXPECT_LE(longest_at_end, bytes == 1 ? 1 : 6);
    double largest = 0.0;
    double worst = 0.0;
    std::size_t i = 0;
    for (const auto& row : expected) {
      for (const double x : row) {
        largest = std::max(largest, std::fabs(x));
        worst = std::max(worst, std::fabs(static_cast<double>(result.logits[i++]) - x));
      }
    }
    // As in transformer_test.cpp: f32 rounding reaches 1e-6, a wrong block 1e-1.
    EXPECT_LE(worst, 1e-4 * largest);
  }
}

TEST_F(Memory, NoChunkNeedsMoreThanThePlannedWorkspace) {
  // The plan looks at some lengths of chunks only; the runtime's workspace would grow past it
  // wherever an operation needs more for another one.
  for (const AttentionMode mode : {AttentionMode::msa, AttentionMode::dense}) {
    for (const int threads : {1, 2, 7}) {
      set_num_threads(threads);
      const model::AttentionOptions options{.max_context = k1M, .max_tokens = 512, .mode = mode};
      const std::int64_t planned = model::Attention::memory(target_config(), options).workspaces;
      for (const std::int64_t end : {std::int64_t{1000}, std::int64_t{40000}, k128K, k1M}) {
        for (std::int64_t count = 1; count <= 512; ++count) {
          ASSERT_LE(model::Attention::chunk_workspace(target_config(), options, end, count),
                    planned)
              << count << " tokens that end " << end << " with " << threads << " threads";
        }
      }
    }
  }
}

}  // namespace
}  // namespace msa
