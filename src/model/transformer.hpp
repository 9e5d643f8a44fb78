// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "model/attention.hpp"
#include "model/config.hpp"
#include "model/mlp.hpp"
#include "model/timing.hpp"
#include "model/weights.hpp"

namespace msa::model {

struct RuntimeOptions {
  std::int64_t max_context = 0;     ///< Tokens; 0: the model's max_position_embeddings.
  std::int64_t chunk_tokens = 512;  ///< Tokens that pass through the layers together.
  AttentionMode attention = AttentionMode::msa;
  std::optional<DType>
      cache_dtype{};  ///< f32, f16 or bf16; not given: f32 for f32 weights, else bf16.
  /// Bound of the block scores, the one buffer that grows with the context.
  std::int64_t max_score_bytes = AttentionOptions{}.max_score_bytes;
};

struct ForwardOptions {
  /// Which of the call's tokens to compute logits for, ascending from 0; empty: the last one.
  std::span<const std::int64_t> logit_rows{};
  const std::atomic<bool>* cancel = nullptr;  ///< Looked at before every layer.
  std::function<void(std::int64_t done, std::int64_t total)> on_chunk{};  ///< After every chunk.
};

struct ForwardResult {
  std::span<const float> logits;  ///< [rows, vocab_size], valid until the next call.
  bool cancelled = false;         ///< Then there are no logits; whole chunks stay in the context.
};

/// A MiniMax-M3 text model with the context of one sequence.
class Transformer {
 public:
  Transformer(Config config, Weights weights, const RuntimeOptions& options = {});

  /// Appends tokens to the context, chunk by chunk. Throws Error(invalid_argument) before computing
  /// anything where they don't fit into the context or are no tokens of the vocabulary.
  ForwardResult forward(std::span<const std::int32_t> tokens, const ForwardOptions& options = {});

  /// Puts `tokens` tokens of random keys and values into the context without computing anything:
  /// for timing what comes after a long context. No token was read, so logits mean nothing then.
  void fill_context(
      std::int64_t tokens, std::uint64_t seed,
      const std::function<void(std::int64_t done, std::int64_t total)>& on_chunk = {});

  /// What the constructor allocates beside the cache's pages, with the options resolved by
  /// plan_memory(); forward() allocates more only for logits of more rows than one.
  static WorkingMemory memory(const Config& config, const Weights& weights,
                              const AttentionOptions& options);
  /// `options` with its defaults filled in. Throws Error(invalid_argument) for what the model or
  /// the checkpoint can't do.
  static AttentionOptions resolve(const Config& config, const Weights& weights,
                                  const RuntimeOptions& options);

  /// Forgets the context and the timings.
  void reset();

  /// Called for every chunk and sparse layer; empty: not called.
  void set_selection_hook(SelectionHook hook) { attention_.set_selection_hook(std::move(hook)); }

  const Config& config() const { return config_; }
  const Weights& weights() const { return weights_; }
  const KvCache& cache() const { return attention_.cache(); }
  std::int64_t position() const { return position_; }  ///< Tokens in the context.
  std::int64_t max_context() const { return max_context_; }
  /// A call with one token that is not the first counts as decoding, any other as prefill.
  const Timings& timings() const { return timings_; }

 private:
  Transformer(const AttentionOptions& options, Config&& config, Weights&& weights);
  bool run_chunk(std::span<const std::int32_t> tokens, const std::atomic<bool>* cancel,
                 PhaseTimes& times);
  void run_head(std::span<const std::int64_t> rows, std::int64_t chunk_begin,
                std::span<float> logits);

  Config config_;
  Weights weights_;
  std::int64_t max_context_ = 0;
  std::int64_t chunk_tokens_ = 0;
  std::int64_t position_ = 0;
  Timings timings_{};
  Attention attention_;
  Mlp mlp_;
  LinearScratch scratch_;
  std::vector<std::vector<float>> input_norms_;           // per layer: [hidden], 1 + weight
  std::vector<std::vector<float>> post_attention_norms_;  // likewise
  std::vector<float> final_norm_;
  std::vector<float> hidden_;      // [tokens, hidden]: the residual stream
  std::vector<float> normalised_;  // [tokens, hidden]
  std::vector<float> update_;      // [tokens, hidden]: what a half layer adds
  std::vector<float> logits_;      // [rows, vocab]
};

}  // namespace msa::model
