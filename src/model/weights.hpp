// SPDX-License-Identifier: Apache-2.0
//
// The weights of a MiniMax-M3 text model as views into memory-mapped safetensors files. Matrices
// are [out_features, in_features], row major, in the checkpoint's own dtype (bf16, f16 or f32).
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "model/config.hpp"
#include "msa/tensor.hpp"

namespace msa::model {

/// Gated MLP: down(swiglu_oai(gate(x), up(x))). The two spellings of checkpoints differ in whether
/// gate and up are one tensor; here they are always two views (halves of one, then).
struct MlpWeights {
  TensorView gate{};  ///< [intermediate, hidden]
  TensorView up{};    ///< [intermediate, hidden]
  TensorView down{};  ///< [hidden, intermediate]
};

struct MoeWeights {
  TensorView router{};                 ///< [num_experts, hidden]
  TensorView score_correction_bias{};  ///< [num_experts]; added for the choice of experts only
  std::vector<MlpWeights> experts;     ///< [num_experts]
  MlpWeights shared{};                 ///< not given where the config has no shared expert
};

struct LayerWeights {
  TensorView input_norm{};           ///< [hidden]
  TensorView post_attention_norm{};  ///< [hidden]
  TensorView q_proj{};               ///< [num_q_heads * head_dim, hidden]
  TensorView k_proj{};               ///< [num_kv_heads * head_dim, hidden]
  TensorView v_proj{};               ///< [num_kv_heads * head_dim, hidden]
  TensorView o_proj{};               ///< [hidden, num_q_heads * head_dim]
  TensorView q_norm{};               ///< [head_dim]
  TensorView k_norm{};               ///< [head_dim]
  TensorView index_q_proj{};         ///< [num_kv_heads * index_dim, hidden]; sparse layers only
  TensorView index_k_proj{};         ///< [index_dim, hidden]; sparse layers only
  TensorView index_q_norm{};         ///< [index_dim]; sparse layers only
  TensorView index_k_norm{};         ///< [index_dim]; sparse layers only
  MlpWeights mlp{};                  ///< dense layers
  MoeWeights moe{};                  ///< MoE layers
};

struct Weights {
  TensorView embed_tokens{};  ///< [vocab, hidden]
  TensorView final_norm{};    ///< [hidden]
  TensorView lm_head{};       ///< [vocab, hidden]; the embedding where tied
  std::vector<LayerWeights> layers;
  std::string naming;  ///< which spelling was found: "released", "transformers" or "mixed"
  std::vector<std::string> unused;  ///< tensors of the text model that the config has no place for
  std::int64_t num_parameters = 0;
  std::int64_t num_bytes = 0;                     ///< of the tensors in use
  std::vector<std::shared_ptr<const void>> maps;  ///< keeps the mapped files alive
};

/// Maps `directory`/model.safetensors, or the shards of model.safetensors.index.json, and finds
/// every tensor of the text model under either spelling (docs/model.md lists both). Vision and MTP
/// tensors are ignored. Throws Error naming the tensor and both shapes (or the file, offset and
/// size) for a missing tensor, wrong shape, unknown dtype, or truncated or malformed file.
Weights load_weights(const std::filesystem::path& directory, const Config& config);

}  // namespace msa::model
