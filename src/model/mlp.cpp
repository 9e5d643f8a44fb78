// SPDX-License-Identifier: Apache-2.0
#include "model/mlp.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/check.hpp"
#include "model/layers.hpp"
#include "model/pieces.hpp"

namespace msa::model {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

}  // namespace

void choose_experts(std::span<const float> scores, std::span<const float> bias,
                    std::span<ExpertChoice> choices) {
  std::size_t taken = 0;
  const auto is_taken = [&](std::size_t expert) {
    return std::any_of(choices.begin(), choices.begin() + static_cast<std::ptrdiff_t>(taken),
                       [&](const ExpertChoice& choice) {
                         return choice.expert == static_cast<std::int64_t>(expert);
                       });
  };
  for (; taken < choices.size(); ++taken) {
    std::size_t best = scores.size();
    float best_rank = 0.0f;
    for (std::size_t expert = 0; expert < scores.size(); ++expert) {
      const float rank = scores[expert] + bias[expert];
      if ((best == scores.size() || rank > best_rank) && !is_taken(expert)) {
        best = expert;
        best_rank = rank;
      }
    }
    choices[taken] = {.expert = static_cast<std::int64_t>(best), .weight = scores[best]};
  }
  float sum = 0.0f;
  for (const ExpertChoice& choice : choices) sum += choice.weight;
  for (ExpertChoice& choice : choices) choice.weight /= sum;
  std::sort(choices.begin(), choices.end(),
            [](const ExpertChoice& a, const ExpertChoice& b) { return a.expert < b.expert; });
}

Mlp::Sizes Mlp::sizes_of(const Config& config, std::int64_t max_tokens) {
  const auto has = [&](MlpKind kind) {
    return std::find(config.mlp_kinds.begin(), config.mlp_kinds.end(), kind) !=
           config.mlp_kinds.end();
  };
  std::int64_t widest = has(MlpKind::dense) ? config.dense_intermediate_size : 0;
  Sizes sizes;
  if (has(MlpKind::moe)) {
    MSA_CHECK(
        config.num_experts_per_token >= 1 && config.num_experts_per_token <= config.num_experts,
        "config: num_experts_per_token is ", config.num_experts_per_token,
        ", expected 1 to num_experts, ", config.num_experts);
    widest = std::max({widest, config.expert_intermediate_size, config.shared_intermediate_size});
    sizes.hidden = max_tokens * config.hidden_size;
    sizes.scores = max_tokens * config.num_experts;
    sizes.experts = config.num_experts;
    sizes.choices = max_tokens * config.num_experts_per_token;
  }
  sizes.wide = max_tokens * widest;
  return sizes;
}

WorkingMemory Mlp::memory(const Config& config, std::int64_t max_tokens) {
  const Sizes sizes = sizes_of(config, max_tokens);
  const auto bytes_of = [](auto element, std::int64_t count) {
    return count * static_cast<std::int64_t>(sizeof(element));
  };
  WorkingMemory memory;
  memory.activations = bytes_of(float{}, 2 * sizes.wide + 2 * sizes.hidden + sizes.scores) +
                       bytes_of(ExpertChoice{}, sizes.choices) +
                       bytes_of(std::int64_t{}, sizes.choices);
  memory.tables = bytes_of(float{}, sizes.experts) + bytes_of(std::int64_t{}, sizes.experts);
  return memory;
}

Mlp::Mlp(const Config& config, std::int64_t max_tokens)
    : hidden_size_(config.hidden_size),
      num_chosen_(config.num_experts_per_token),
      alpha_(config.swiglu_alpha),
      limit_(config.swiglu_limit),
      routed_scale_(static_cast<float>(config.routed_scaling_factor)) {
  const Sizes sizes = sizes_of(config, max_tokens);
  gate_.resize(size(sizes.wide));
  up_.resize(size(sizes.wide));
  gathered_.resize(size(sizes.hidden));
  produced_.resize(size(sizes.hidden));
  scores_.resize(size(sizes.scores));
  bias_.resize(size(sizes.experts));
  choices_.resize(size(sizes.choices));
  assigned_.resize(size(sizes.choices));
  expert_begin_.resize(size(sizes.experts));
}

void Mlp::run_dense(const MlpWeights& weights, std::span<const float> x, std::int64_t tokens,
                    std::span<float> out, LinearScratch& scratch) {
  const std::span<float> gate(gate_.data(), size(tokens * weights.gate.shape[0]));
  const std::span<float> up(up_.data(), gate.size());
  const Product products[] = {{weights.gate, gate}, {weights.up, up}};
  linear(products, x, tokens, scratch);
  swiglu_oai(gate, up, alpha_, limit_);
  linear(weights.down, gate, tokens, out, scratch);
}

void Mlp::run_expert(const MlpWeights& weights, std::span<const float> x,
                     std::span<const std::int64_t> slots, std::span<float> out,
                     LinearScratch& scratch) {
  const auto count = static_cast<std::int64_t>(slots.size());
  for_each_piece(count, hidden_size_, kElementsOfAdd, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      std::copy_n(x.data() + slots[size(i)] / num_chosen_ * hidden_size_, hidden_size_,
                  gathered_.data() + i * hidden_size_);
    }
  });
  run_dense(weights, gathered_, count, produced_, scratch);
  // A token chooses an expert once, so no two rows are the same.
  for_each_piece(count, hidden_size_, kElementsOfAdd, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t slot = slots[size(i)];
      const float weight = routed_scale_ * choices_[size(slot)].weight;
      const float* row = produced_.data() + i * hidden_size_;
      float* sum = out.data() + slot / num_chosen_ * hidden_size_;
      for (std::int64_t j = 0; j < hidden_size_; ++j) sum[j] += weight * row[j];
    }
  });
}

void Mlp::run_moe(const MoeWeights& weights, std::span<const float> x, std::int64_t tokens,
                  std::span<float> out, LinearScratch& scratch) {
  const auto num_experts = static_cast<std::int64_t>(bias_.size());
  const std::span<float> scores(scores_.data(), size(tokens * num_experts));
  linear(weights.router, x, tokens, scores, scratch);
  for (float& score : scores) score = 1.0f / (1.0f + std::exp(-score));
  expand_to_f32(static_cast<const std::byte*>(weights.score_correction_bias.data),
                weights.score_correction_bias.dtype, bias_);
  std::fill(expert_begin_.begin(), expert_begin_.end(), 0);
  for (std::int64_t token = 0; token < tokens; ++token) {
    const std::span<ExpertChoice> choices(choices_.data() + token * num_chosen_, size(num_chosen_));
    choose_experts(scores.subspan(size(token * num_experts), size(num_experts)), bias_, choices);
    for (const ExpertChoice& choice : choices) ++expert_begin_[size(choice.expert)];
  }
  // Sorted by expert, and by token within one. Counts become ends, and filling from the back moves
  // each end to its expert's begin.
  std::partial_sum(expert_begin_.begin(), expert_begin_.end(), expert_begin_.begin());
  const std::int64_t num_slots = tokens * num_chosen_;
  for (std::int64_t slot = num_slots - 1; slot >= 0; --slot) {
    assigned_[size(--expert_begin_[size(choices_[size(slot)].expert)])] = slot;
  }

  if (weights.shared.gate.given()) {
    run_dense(weights.shared, x, tokens, out, scratch);
  } else {
    std::fill_n(out.begin(), tokens * hidden_size_, 0.0f);
  }
  // Each token adds its experts in ascending order, whatever else is in the chunk.
  for (std::int64_t expert = 0; expert < num_experts; ++expert) {
    const std::int64_t begin = expert_begin_[size(expert)];
    const std::int64_t end = expert + 1 < num_experts ? expert_begin_[size(expert + 1)] : num_slots;
    if (begin == end) continue;
    run_expert(weights.experts[size(expert)], x,
               std::span(assigned_).subspan(size(begin), size(end - begin)), out, scratch);
  }
}

}  // namespace msa::model
