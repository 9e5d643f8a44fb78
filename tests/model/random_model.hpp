// SPDX-License-Identifier: Apache-2.0
//
// Small models with random weights, made in memory.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "core/scalar.hpp"
#include "core/tensor.hpp"
#include "model/config.hpp"
#include "model/weights.hpp"

namespace msa::test {

/// Uniform numbers in [-1, 1), the same on every machine.
class Uniform {
 public:
  explicit Uniform(std::uint64_t seed) : generator_(seed) {}
  double operator()() { return static_cast<double>(generator_() >> 11) * 0x1p-52 - 1.0; }
  std::uint64_t bits() { return generator_(); }

 private:
  std::mt19937_64 generator_;
};

inline void fill(const core::Tensor& tensor, Uniform& uniform, double scale) {
  const TensorView& view = tensor.view();
  for (std::int64_t i = 0; i < view.num_elements(); ++i) {
    core::store_element(core::address_at(view, i), view.dtype, scale * uniform());
  }
}

inline std::vector<float> random_vector(std::int64_t count, Uniform& uniform, double scale = 1.0) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = static_cast<float>(scale * uniform());
  return values;
}

inline std::vector<std::int32_t> random_tokens(std::int64_t count, std::int64_t vocab_size,
                                               std::uint64_t seed) {
  Uniform uniform(seed);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
  for (auto& token : tokens) {
    token = static_cast<std::int32_t>(uniform.bits() % static_cast<std::uint64_t>(vocab_size));
  }
  return tokens;
}

/// One dense layer with a dense MLP, two sparse ones with experts, blocks of 16 tokens.
inline model::Config small_config() {
  model::Config config;
  config.hidden_size = 48;
  config.num_layers = 3;
  config.vocab_size = 61;
  config.attention = {.num_q_heads = 4,
                      .num_kv_heads = 2,
                      .head_dim = 32,
                      .index_dim = 16,
                      .block_size = 16,
                      .top_k = 3,
                      .num_init_blocks = 0,
                      .num_local_blocks = 1};
  config.rotary_dim = 16;
  config.rope_theta = 10000.0;
  config.rms_norm_eps = 1e-6;
  config.max_position_embeddings = 512;
  config.dense_intermediate_size = 80;
  config.expert_intermediate_size = 32;
  config.shared_intermediate_size = 24;
  config.num_experts = 6;
  config.num_experts_per_token = 2;
  config.routed_scaling_factor = 2.0;
  config.attention_kinds = {model::AttentionKind::dense, model::AttentionKind::sparse,
                            model::AttentionKind::sparse};
  config.mlp_kinds = {model::MlpKind::dense, model::MlpKind::moe, model::MlpKind::moe};
  return config;
}

/// Weights of a model with activations of a sensible size, kept alive by Weights::maps.
inline model::Weights random_weights(const model::Config& c, DType dtype, std::uint64_t seed) {
  Uniform uniform(seed);
  model::Weights weights;
  const auto make = [&](std::initializer_list<std::int64_t> shape, double scale) {
    auto tensor = std::make_shared<core::Tensor>(dtype, shape);
    fill(*tensor, uniform, scale);
    weights.maps.push_back(tensor);
    return tensor->view();
  };
  const auto matrix = [&](std::int64_t out, std::int64_t in) {
    return make({out, in}, 1.7 / std::sqrt(static_cast<double>(in)));
  };
  const auto norm = [&](std::int64_t width) { return make({width}, 0.3); };
  const auto mlp = [&](std::int64_t width) {
    return model::MlpWeights{.gate = matrix(width, c.hidden_size),
                             .up = matrix(width, c.hidden_size),
                             .down = matrix(c.hidden_size, width)};
  };
  const Problem& p = c.attention;
  weights.embed_tokens = make({c.vocab_size, c.hidden_size}, 1.0);
  weights.final_norm = norm(c.hidden_size);
  weights.lm_head = matrix(c.vocab_size, c.hidden_size);
  for (std::size_t layer = 0; layer < static_cast<std::size_t>(c.num_layers); ++layer) {
    model::LayerWeights& w = weights.layers.emplace_back();
    w.input_norm = norm(c.hidden_size);
    w.post_attention_norm = norm(c.hidden_size);
    w.q_proj = matrix(p.num_q_heads * p.head_dim, c.hidden_size);
    w.k_proj = matrix(p.num_kv_heads * p.head_dim, c.hidden_size);
    w.v_proj = matrix(p.num_kv_heads * p.head_dim, c.hidden_size);
    w.o_proj = matrix(c.hidden_size, p.num_q_heads * p.head_dim);
    w.q_norm = norm(p.head_dim);
    w.k_norm = norm(p.head_dim);
    if (c.attention_kinds[layer] == model::AttentionKind::sparse) {
      w.index_q_proj = matrix(p.num_kv_heads * p.index_dim, c.hidden_size);
      w.index_k_proj = matrix(p.index_dim, c.hidden_size);
      w.index_q_norm = norm(p.index_dim);
      w.index_k_norm = norm(p.index_dim);
    }
    if (c.mlp_kinds[layer] == model::MlpKind::dense) {
      w.mlp = mlp(c.dense_intermediate_size);
      continue;
    }
    w.moe.router = matrix(c.num_experts, c.hidden_size);
    w.moe.score_correction_bias = make({c.num_experts}, 0.2);
    for (std::int64_t expert = 0; expert < c.num_experts; ++expert) {
      w.moe.experts.push_back(mlp(c.expert_intermediate_size));
    }
    if (c.shared_intermediate_size > 0) w.moe.shared = mlp(c.shared_intermediate_size);
  }
  return weights;
}

}  // namespace msa::test
