// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/config.hpp"
#include "model/linear.hpp"
#include "model/weights.hpp"
#include "model/working_memory.hpp"

namespace msa::model {

/// An expert of one token and its share of the routed sum.
struct ExpertChoice {
  std::int64_t expert = 0;
  float weight = 0.0f;
};

/// The experts with the largest score + bias, ties to the lowest id; their weights are the scores
/// without bias, divided by their sum.
void choose_experts(std::span<const float> scores, std::span<const float> bias,
                    std::span<ExpertChoice> choices);

/// The MLP half of a decoder layer, with the memory for chunks of up to max_tokens tokens.
class Mlp {
 public:
  Mlp(const Config& config, std::int64_t max_tokens);

  /// What the constructor allocates.
  static WorkingMemory memory(const Config& config, std::int64_t max_tokens);

  /// out [tokens, hidden] = down(swiglu_oai(gate(x), up(x))), x [tokens, hidden].
  void run_dense(const MlpWeights& weights, std::span<const float> x, std::int64_t tokens,
                 std::span<float> out, LinearScratch& scratch);

  /// out = routed_scaling_factor * sum of the chosen experts' weighted outputs + shared expert, the
  /// scores being sigmoids of the router's f32 logits. Experts run one after another, each on all
  /// of its tokens at once.
  void run_moe(const MoeWeights& weights, std::span<const float> x, std::int64_t tokens,
               std::span<float> out, LinearScratch& scratch);

 private:
  struct Sizes {              // elements
    std::int64_t wide = 0;    // gate_, up_
    std::int64_t hidden = 0;  // gathered_, produced_
    std::int64_t scores = 0;
    std::int64_t experts = 0;
    std::int64_t choices = 0;
  };
  static Sizes sizes_of(const Config& config, std::int64_t max_tokens);
  void run_expert(const MlpWeights& weights, std::span<const float> x,
                  std::span<const std::int64_t> slots, std::span<float> out,
                  LinearScratch& scratch);

  std::int64_t hidden_size_ = 0;
  std::int64_t num_chosen_ = 0;
  double alpha_ = 0.0;
  double limit_ = 0.0;
  float routed_scale_ = 1.0f;
  std::vector<float> gate_;             // [tokens, widest intermediate]
  std::vector<float> up_;               // [tokens, widest intermediate]
  std::vector<float> gathered_;         // [tokens, hidden]: an expert's inputs
  std::vector<float> produced_;         // [tokens, hidden]: its outputs
  std::vector<float> scores_;           // [tokens, num_experts]: sigmoids of the router's logits
  std::vector<float> bias_;             // [num_experts]
  std::vector<ExpertChoice> choices_;   // [tokens, num_chosen]
  std::vector<std::int64_t> assigned_;  // [tokens * num_chosen]: indices into choices_, by expert
  std::vector<std::int64_t> expert_begin_;  // [num_experts]: where its part of assigned_ begins
};

}  // namespace msa::model
