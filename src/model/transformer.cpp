// SPDX-License-Identifier: Apache-2.0
#include "model/transformer.hpp"

#include <algorithm>
#include <utility>

#include "core/check.hpp"
#include "model/layers.hpp"
#include "model/linear.hpp"
#include "msa/backend.hpp"

namespace msa::model {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

/// The context length to provide for, checked against the model's.
std::int64_t context_of(const Config& config, const Weights& weights,
                        const RuntimeOptions& options) {
  MSA_CHECK(static_cast<std::int64_t>(weights.layers.size()) == config.num_layers,
            "Transformer: the weights have ", weights.layers.size(), " layers, the config has ",
            config.num_layers);
  MSA_CHECK(options.chunk_tokens > 0, "Transformer: chunk_tokens is ", options.chunk_tokens,
            ", expected > 0");
  MSA_CHECK(options.max_context >= 0, "Transformer: max_context is ", options.max_context,
            ", expected >= 0");
  MSA_CHECK(options.max_context <= config.max_position_embeddings, "Transformer: max_context is ",
            options.max_context, " tokens, but the model's max_position_embeddings is ",
            config.max_position_embeddings);
  return options.max_context == 0 ? config.max_position_embeddings : options.max_context;
}

DType default_cache_dtype(const Weights& weights) {
  return weights.embed_tokens.dtype == DType::f32 ? DType::f32 : DType::bf16;
}

/// What linear() asks of its scratch for the widest matrix that has to be expanded.
std::int64_t largest_scratch(const Weights& weights) {
  std::int64_t largest = linear_scratch(weights.lm_head);
  const auto consider = [&](const TensorView& matrix) {
    if (matrix.given()) largest = std::max(largest, linear_scratch(matrix));
  };
  const auto consider_mlp = [&](const MlpWeights& mlp) {
    for (const TensorView* matrix : {&mlp.gate, &mlp.up, &mlp.down}) consider(*matrix);
  };
  for (const LayerWeights& layer : weights.layers) {
    for (const TensorView* matrix : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj,
                                     &layer.index_q_proj, &layer.index_k_proj, &layer.moe.router}) {
      consider(*matrix);
    }
    consider_mlp(layer.mlp);
    consider_mlp(layer.moe.shared);
    for (const MlpWeights& expert : layer.moe.experts) consider_mlp(expert);
  }
  return largest;
}

}  // namespace

AttentionOptions Transformer::resolve(const Config& config, const Weights& weights,
                                      const RuntimeOptions& options) {
  const std::int64_t max_context = context_of(config, weights, options);
  return {.max_context = max_context,
          .max_tokens = std::min(options.chunk_tokens, max_context),
          .mode = options.attention,
          .cache_dtype = options.cache_dtype.value_or(default_cache_dtype(weights)),
          .max_score_bytes = options.max_score_bytes};
}

WorkingMemory Transformer::memory(const Config& config, const Weights& weights,
                                  const AttentionOptions& options) {
  constexpr auto kFloat = static_cast<std::int64_t>(sizeof(float));
  const WorkingMemory attention = Attention::memory(config, options);
  const WorkingMemory mlp = Mlp::memory(config, options.max_tokens);
  WorkingMemory memory = attention;
  memory.activations +=
      mlp.activations + kFloat * (3 * options.max_tokens * config.hidden_size + config.vocab_size);
  memory.expanded_weights = LinearScratch::bytes(num_threads(), largest_scratch(weights));
  memory.tables += mlp.tables + kFloat * (2 * config.num_layers + 1) * config.hidden_size;
  return memory;
}

Transformer::Transformer(Config config, Weights weights, const RuntimeOptions& options)
    : Transformer(resolve(config, weights, options), std::move(config), std::move(weights)) {}

Transformer::Transformer(const AttentionOptions& options, Config&& config, Weights&& weights)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      max_context_(options.max_context),
      chunk_tokens_(options.max_tokens),
      attention_(config_, weights_, options),
      mlp_(config_, chunk_tokens_),
      final_norm_(norm_scale(weights_.final_norm)),
      hidden_(size(chunk_tokens_ * config_.hidden_size)),
      normalised_(hidden_.size()),
      update_(hidden_.size()) {
  for (const LayerWeights& layer : weights_.layers) {
    input_norms_.push_back(norm_scale(layer.input_norm));
    post_attention_norms_.push_back(norm_scale(layer.post_attention_norm));
  }
  logits_.reserve(size(config_.vocab_size));
  scratch_.reserve(num_threads(), largest_scratch(weights_));
}

void Transformer::fill_context(
    std::int64_t tokens, std::uint64_t seed,
    const std::function<void(std::int64_t done, std::int64_t total)>& on_chunk) {
  MSA_CHECK(tokens >= 0 && tokens <= max_context_ - position_, "Transformer: ", position_,
            " tokens of context can't be filled with ", tokens, " more, max_context is ",
            max_context_);
  for (std::int64_t done = 0; done < tokens;) {
    const std::int64_t count =
        attention_.chunk_limit(position_, std::min(chunk_tokens_, tokens - done));
    attention_.begin_chunk(position_, count);
    attention_.fill_chunk(seed + static_cast<std::uint64_t>(position_));
    position_ += count;
    done += count;
    if (on_chunk) on_chunk(done, tokens);
  }
}

void Transformer::reset() {
  position_ = 0;
  timings_ = {};
}

ForwardResult Transformer::forward(std::span<const std::int32_t> tokens,
                                   const ForwardOptions& options) {
  const auto total = static_cast<std::int64_t>(tokens.size());
  MSA_CHECK(total > 0, "Transformer: no tokens are given");
  MSA_CHECK(position_ + total <= max_context_, "Transformer: ", position_,
            " tokens of context and ", total, " more are ", position_ + total,
            ", but max_context is ", max_context_, " (the model's max_position_embeddings is ",
            config_.max_position_embeddings, ")");
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    MSA_CHECK(tokens[i] >= 0 && tokens[i] < config_.vocab_size, "Transformer: token ", i,
              " has id ", tokens[i], ", but vocab_size is ", config_.vocab_size);
  }
  const std::int64_t last = total - 1;
  const std::span<const std::int64_t> rows =
      options.logit_rows.empty() ? std::span(&last, 1) : options.logit_rows;
  MSA_CHECK(rows.front() >= 0 && rows.back() < total && std::is_sorted(rows.begin(), rows.end()),
            "Transformer: logit_rows must ascend within [0, ", total, "), the tokens of this call");

  PhaseTimes& times = total == 1 && position_ > 0 ? timings_.decode : timings_.prefill;
  const Stopwatch watch(times.total);
  logits_.resize(rows.size() * size(config_.vocab_size));
  auto next_row = rows.begin();
  for (std::int64_t begin = 0; begin < total;) {
    const std::int64_t count =
        attention_.chunk_limit(position_, std::min(chunk_tokens_, total - begin));
    if (!run_chunk(tokens.subspan(size(begin), size(count)), options.cancel, times)) {
      return {.logits = {}, .cancelled = true};
    }
    const auto end_row = std::lower_bound(next_row, rows.end(), begin + count);
    run_head({next_row, end_row}, begin,
             {logits_.data() + (next_row - rows.begin()) * config_.vocab_size,
              size((end_row - next_row) * config_.vocab_size)});
    next_row = end_row;
    begin += count;
    position_ += count;
    times.tokens += count;
    if (options.on_chunk) options.on_chunk(begin, total);
  }
  return {.logits = logits_, .cancelled = false};
}

bool Transformer::run_chunk(std::span<const std::int32_t> tokens, const std::atomic<bool>* cancel,
                            PhaseTimes& times) {
  const auto count = static_cast<std::int64_t>(tokens.size());
  const std::span<float> x(hidden_.data(), size(count * config_.hidden_size));
  const std::span<float> normalised(normalised_.data(), x.size());
  const std::span<float> update(update_.data(), x.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    expand_row(weights_.embed_tokens, tokens[i],
               x.subspan(i * size(config_.hidden_size), size(config_.hidden_size)));
  }
  attention_.begin_chunk(position_, count);
  for (std::int64_t layer = 0; layer < config_.num_layers; ++layer) {
    if (cancel != nullptr && cancel->load(std::memory_order_relaxed)) return false;
    const LayerWeights& weights = weights_.layers[size(layer)];
    rms_norm(x, count, input_norms_[size(layer)], config_.rms_norm_eps, normalised);
    attention_.run(layer, weights, normalised, update, scratch_, times);
    add(x, update);
    rms_norm(x, count, post_attention_norms_[size(layer)], config_.rms_norm_eps, normalised);
    if (config_.mlp_kinds[size(layer)] == MlpKind::dense) {
      mlp_.run_dense(weights.mlp, normalised, count, update, scratch_);
    } else {
      mlp_.run_moe(weights.moe, normalised, count, update, scratch_);
    }
    add(x, update);
  }
  return true;
}

void Transformer::run_head(std::span<const std::int64_t> rows, std::int64_t chunk_begin,
                           std::span<float> logits) {
  // As many rows as a chunk has, or a caller's repeated rows would not fit.
  const std::int64_t hidden = config_.hidden_size;
  const auto count = static_cast<std::int64_t>(rows.size());
  for (std::int64_t begin = 0; begin < count; begin += chunk_tokens_) {
    const std::int64_t some = std::min(chunk_tokens_, count - begin);
    for (std::int64_t i = 0; i < some; ++i) {
      const std::int64_t token = rows[size(begin + i)] - chunk_begin;
      std::copy_n(hidden_.data() + token * hidden, hidden, update_.data() + i * hidden);
    }
    rms_norm(update_, some, final_norm_, config_.rms_norm_eps, normalised_);
    linear(weights_.lm_head, normalised_, some, logits.subspan(size(begin * config_.vocab_size)),
           scratch_);
  }
}

}  // namespace msa::model
