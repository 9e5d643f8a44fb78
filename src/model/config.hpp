// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "msa/ops.hpp"

namespace msa::model {

enum class AttentionKind : std::uint8_t { dense, sparse };
enum class MlpKind : std::uint8_t { dense, moe };

/// The MiniMax-M3 text architecture, as read from config.json. Field comments give the released
/// model's value.
struct Config {
  std::int64_t hidden_size = 0;  ///< 6144
  std::int64_t num_layers = 0;   ///< 60
  std::int64_t vocab_size = 0;   ///< 200064
  bool tie_word_embeddings = false;

  Problem attention{};          ///< heads 64 / 4, head_dim 128, index_dim 128, block 128, top 16
  std::int64_t rotary_dim = 0;  ///< 64: the first rotary_dim of head_dim are rotated (NeoX halves)
  double rope_theta = 0.0;      ///< 5e6
  double rms_norm_eps = 0.0;    ///< 1e-6; every norm is x / rms(x) * (1 + weight)
  std::int64_t max_position_embeddings = 0;  ///< 1048576: the longest context, in tokens

  std::int64_t dense_intermediate_size = 0;   ///< 12288
  std::int64_t expert_intermediate_size = 0;  ///< 3072
  std::int64_t shared_intermediate_size = 0;  ///< 3072; 0: no shared expert
  std::int64_t num_experts = 0;               ///< 128
  std::int64_t num_experts_per_token = 0;     ///< 4
  double routed_scaling_factor = 1.0;         ///< 2.0
  double swiglu_alpha = 1.702;
  double swiglu_limit = 7.0;

  std::vector<AttentionKind> attention_kinds;  ///< per layer: 3 dense, 57 sparse
  std::vector<MlpKind> mlp_kinds;              ///< per layer: 3 dense, 57 MoE

  std::vector<std::int64_t> eos_token_ids;
  std::int64_t bos_token_id = -1;  ///< -1: none
  std::string model_type;          ///< as written: "minimax_m3_vl", "minimax_m3_vl_text", ...
  std::string
      note;  ///< "msa_note" of config.json: what `msa run` tells the user first; often empty
};

/// Reads `directory`/config.json: the multimodal form with a nested text_config or the plain text
/// form. Throws Error(invalid_argument) naming file, field and value for anything missing,
/// contradictory or not supported.
Config load_config(const std::filesystem::path& directory);

}  // namespace msa::model
