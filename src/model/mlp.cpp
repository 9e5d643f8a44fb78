// SPDX-License-Identifier: Apache-2.0
#include "model/mlp.hpp"

#include <algorithm>
#include <cmath>

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

Mlp::Mlp(const Config& config, std::int64_t max_tokens)
    : hidden_size_(config.hidden_size),
      num_chosen_(config.num_experts_per_token),
      alpha_(config.swiglu_alpha),
      limit_(config.swiglu_limit),
      routed_scale_(static_cast<float>(config.routed_scaling_factor)) {
  const bool has_moe = std::find(config.mlp_kinds.begin(), config.mlp_kinds.end(), MlpKind::moe) !=
                       config.mlp_kinds.end();
  const bool has_dense = std::find(config.mlp_kinds.begin(), config.mlp_kinds.end(),
                                   MlpKind::dense) != config.mlp_kinds.end();
  std::int64_t widest = has_dense ? config.dense_intermediate_size : 0;
  if (has_moe) {
    MSA_CHECK(num_chosen_ >= 1 && num_chosen_ <= config.num_experts,
              "config: num_experts_per_token is ", num_chosen_, ", expected 1 to num_experts, ",
              config.num_experts);
    widest = std::max({widest, config.expert_intermediate_size, config.shared_intermediate_size});
    gathered_.resize(size(max_tokens * hidden_size_));
    produced_.resize(size(max_tokens * hidden_size_));
    scores_.resize(size(max_tokens * config.num_experts));
    bias_.resize(size(config.num_experts));
    choices_.resize(size(max_tokens * num_chosen_));
    assigned_.resize(size(config.num_experts));
  }
  gate_.resize(size(max_tokens * widest));
  up_.resize(size(max_tokens * widest));
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
  const auto num_experts = static_cast<std::int64_t>(assigned_.size());
  const std::span<float> scores(scores_.data(), size(tokens * num_experts));
  linear(weights.router, x, tokens, scores, scratch);
  for (float& score : scores) score = 1.0f / (1.0f + std::exp(-score));
  expand_to_f32(static_cast<const std::byte*>(weights.score_correction_bias.data),
                weights.score_correction_bias.dtype, bias_);
  for (auto& slots : assigned_) slots.clear();
  for (std::int64_t token = 0; token < tokens; ++token) {
    const std::span<ExpertChoice> choices(choices_.data() + token * num_chosen_, size(num_chosen_));
    choose_experts(scores.subspan(size(token * num_experts), size(num_experts)), bias_, choices);
    for (std::int64_t i = 0; i < num_chosen_; ++i) {
      assigned_[size(choices[size(i)].expert)].push_back(token * num_chosen_ + i);
    }
  }

  if (weights.shared.gate.given()) {
    run_dense(weights.shared, x, tokens, out, scratch);
  } else {
    std::fill_n(out.begin(), tokens * hidden_size_, 0.0f);
  }
  // Each token adds its experts in ascending order, whatever else is in the chunk.
  for (std::int64_t expert = 0; expert < num_experts; ++expert) {
    const auto& slots = assigned_[size(expert)];
    if (!slots.empty()) run_expert(weights.experts[size(expert)], x, slots, out, scratch);
  }
}

}  // namespace msa::model
