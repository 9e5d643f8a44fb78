// SPDX-License-Identifier: Apache-2.0
#include "model/weights.hpp"

#include <array>
#include <optional>
#include <set>
#include <string_view>
#include <utility>

#include "core/check.hpp"
#include "model/safetensors.hpp"

namespace msa::model {
namespace {

using core::concat;
using core::Dim;

void replace(std::string& text, std::string_view from, std::string_view to) {
  const std::size_t at = text.find(from);
  if (at != std::string::npos) text.replace(at, from.size(), to);
}

/// A tensor's name without what differs between the spellings: no model prefix, "mlp" for the MoE
/// block, "self_attn.indexer." for the Index Branch. Empty for what is not of the text model.
std::string plain_name(std::string name) {
  for (const char* other : {"vision_tower.", "multi_modal_projector.", "patch_merge_mlp.", ".mtp.",
                            "visual.", "vision_model."}) {
    if (name.find(other) != std::string::npos ||
        name.starts_with(other + (*other == '.' ? 1 : 0))) {
      return {};
    }
  }
  for (std::string_view prefix :
       {"language_model.model.", "model.language_model.", "language_model.", "model."}) {
    if (name.starts_with(prefix)) {
      name.erase(0, prefix.size());
      break;
    }
  }
  replace(name, ".block_sparse_moe.", ".mlp.");
  replace(name, ".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias");
  for (const char* part : {"q_proj", "k_proj", "q_norm", "k_norm"}) {
    replace(name, concat(".self_attn.index_", part), concat(".self_attn.indexer.", part));
  }
  return name;
}

/// Plain names of one tensor in each spelling; empty: nothing special.
struct Spelled {
  std::string transformers{};
  std::string released{};
};

/// The name in a checkpoint, for messages.
std::string full_name(const std::string& spelled, const std::string& plain,
                      const char* model_prefix) {
  const std::string& name = spelled.empty() ? plain : spelled;
  if (!name.starts_with("lm_head.")) return model_prefix + name;
  return *model_prefix == 'l' ? "language_model." + name : name;
}

/// The tensors of the text model by plain name; remembers which were asked for.
class NamedTensors {
 public:
  explicit NamedTensors(const std::filesystem::path& directory)
      : directory_(directory.string()), files_(directory) {
    for (const auto& [name, tensor] : files_.tensors()) {
      MSA_CHECK(!name.ends_with("weight_scale_inv") && !name.ends_with("weight_scale"), tensor.file,
                ": tensor ", name,
                " belongs to a quantised checkpoint; only bf16, f16 and f32 weights are supported");
      const std::string plain = plain_name(name);
      if (plain.empty()) continue;
      const auto [place, is_new] = names_.emplace(plain, name);
      MSA_CHECK(is_new, tensor.file, ": tensors ", place->second, " and ", name,
                " are the same tensor under two spellings");
      released_ = released_ || name.find(".block_sparse_moe.") != std::string::npos ||
                  name.find(".self_attn.index_") != std::string::npos ||
                  name.starts_with("language_model.");
      transformers_ = transformers_ || name.find(".self_attn.indexer.") != std::string::npos ||
                      name.find("gate_up_proj") != std::string::npos ||
                      name.starts_with("model.language_model.");
    }
  }

  bool has(const std::string& plain) const { return names_.count(plain) != 0; }

  /// The tensor, checked for its shape. `spelled` is how the two spellings name it, or the tensor
  /// that holds it, where they differ from `plain`.
  TensorView get(const std::string& plain, std::initializer_list<Dim> dims,
                 const Spelled& spelled = {}) {
    const auto found = names_.find(plain);
    MSA_CHECK(found != names_.end(), directory_, ": a tensor is missing: neither ",
              full_name(spelled.transformers, plain, "model."), " nor ",
              full_name(spelled.released, plain, "language_model.model."),
              " is there, expected shape ", dims_text(dims));
    const TensorView view = files_.view(found->second);
    bool fits = view.rank == static_cast<int>(dims.size());
    std::size_t axis = 0;
    for (const Dim& dim : dims) {
      fits = fits && view.shape[axis] == dim.size;
      ++axis;
    }
    MSA_CHECK(fits && view.dtype != DType::i32, files_.tensors().at(found->second).file,
              ": tensor ", found->second, " is ", name_of(view.dtype), core::shape_text(view),
              ", expected ", dims_text(dims), " in f32, f16 or bf16");
    if (used_.insert(plain).second) {
      num_parameters_ += view.num_elements();
      num_bytes_ += view.num_elements() * static_cast<std::int64_t>(size_of(view.dtype));
    }
    return view;
  }

  void finish(Weights& weights) const {
    weights.naming = released_ && transformers_ ? "mixed" : released_ ? "released" : "transformers";
    weights.num_parameters = num_parameters_;
    weights.num_bytes = num_bytes_;
    weights.maps = files_.maps();
    for (const auto& [plain, name] : names_) {
      if (used_.count(plain) == 0) weights.unused.push_back(name);
    }
  }

 private:
  static std::string dims_text(std::initializer_list<Dim> dims) {
    std::string text = "[";
    for (const Dim& dim : dims)
      text += concat(text.size() > 1 ? ", " : "", dim.name, "=", dim.size);
    return text + "]";
  }

  std::string directory_;
  TensorFiles files_;
  std::map<std::string, std::string> names_;  // plain name -> name in the file
  std::set<std::string> used_;
  std::int64_t num_parameters_ = 0;
  std::int64_t num_bytes_ = 0;
  bool released_ = false;
  bool transformers_ = false;
};

/// Rows [begin, begin + count) of a matrix.
TensorView rows_of(const TensorView& matrix, std::int64_t begin, std::int64_t count) {
  TensorView part = matrix;
  part.shape[0] = count;
  part.data = static_cast<std::byte*>(matrix.data) +
              begin * matrix.stride[0] * static_cast<std::int64_t>(size_of(matrix.dtype));
  return part;
}

/// Matrix `index` of a stack of them.
TensorView slice_of(const TensorView& stack, std::int64_t index) {
  TensorView matrix = rows_of(stack, index, 1);
  matrix.rank = 2;
  matrix.shape = {stack.shape[1], stack.shape[2]};
  matrix.stride = {stack.stride[1], stack.stride[2]};
  return matrix;
}

/// A gated MLP with matrices of its own, gate and up apart or as one matrix, gate first. `prefix`
/// is plain, `released` its released spelling.
MlpWeights load_mlp(NamedTensors& tensors, const std::string& prefix, const std::string& released,
                    std::int64_t width, std::int64_t hidden) {
  const Dim hidden_dim{"hidden", hidden};
  const std::string packed = prefix + "gate_up_proj.weight";
  MlpWeights mlp;
  if (tensors.has(packed)) {
    const TensorView both = tensors.get(packed, {{"2 * intermediate", 2 * width}, hidden_dim});
    mlp.gate = rows_of(both, 0, width);
    mlp.up = rows_of(both, width, width);
  } else {
    const auto get = [&](const char* name) {
      return tensors.get(prefix + name, {{"intermediate", width}, hidden_dim},
                         {.transformers = packed, .released = released + name});
    };
    mlp.gate = get("gate_proj.weight");
    mlp.up = get("up_proj.weight");
  }
  mlp.down = tensors.get(prefix + "down_proj.weight", {hidden_dim, {"intermediate", width}},
                         {.released = released + "down_proj.weight"});
  return mlp;
}

/// Experts as two stacks, gate and up packed, or as three matrices each.
std::vector<MlpWeights> load_experts(NamedTensors& tensors, const std::string& prefix,
                                     const std::string& released, const Config& config) {
  const Dim hidden{"hidden", config.hidden_size};
  const std::int64_t width = config.expert_intermediate_size;
  const Dim intermediate{"intermediate", width};
  const std::string packed = prefix + "gate_up_proj";
  std::vector<MlpWeights> experts;
  if (tensors.has(packed)) {
    const Dim count{"num_experts", config.num_experts};
    const TensorView both = tensors.get(packed, {count, {"2 * intermediate", 2 * width}, hidden});
    const TensorView down = tensors.get(prefix + "down_proj", {count, hidden, intermediate});
    for (std::int64_t expert = 0; expert < config.num_experts; ++expert) {
      const TensorView gate_up = slice_of(both, expert);
      experts.push_back({.gate = rows_of(gate_up, 0, width),
                         .up = rows_of(gate_up, width, width),
                         .down = slice_of(down, expert)});
    }
    return experts;
  }
  for (std::int64_t expert = 0; expert < config.num_experts; ++expert) {
    const auto get = [&](const char* name, const Dim& rows, const Dim& columns,
                         const std::string& stack) {
      const std::string tail = concat(expert, ".", name, ".weight");
      return tensors.get(prefix + tail, {rows, columns},
                         {.transformers = stack, .released = released + tail});
    };
    experts.push_back({.gate = get("w1", intermediate, hidden, packed),
                       .up = get("w3", intermediate, hidden, packed),
                       .down = get("w2", hidden, intermediate, prefix + "down_proj")});
  }
  return experts;
}

MoeWeights load_moe(NamedTensors& tensors, const std::string& layer, const Config& config) {
  const std::string prefix = layer + "mlp.";
  const std::string released = layer + "block_sparse_moe.";
  const Dim experts{"num_experts", config.num_experts};
  MoeWeights moe;
  moe.router = tensors.get(prefix + "gate.weight", {experts, {"hidden", config.hidden_size}},
                           {.released = released + "gate.weight"});
  moe.score_correction_bias = tensors.get(prefix + "gate.e_score_correction_bias", {experts},
                                          {.released = released + "e_score_correction_bias"});
  moe.experts = load_experts(tensors, prefix + "experts.", released + "experts.", config);
  if (config.shared_intermediate_size > 0) {
    moe.shared = load_mlp(tensors, prefix + "shared_experts.", released + "shared_experts.",
                          config.shared_intermediate_size, config.hidden_size);
  }
  return moe;
}

LayerWeights load_layer(NamedTensors& tensors, const Config& config, std::int64_t index) {
  const Problem& p = config.attention;
  const std::string layer = concat("layers.", index, ".");
  const std::string attention = layer + "self_attn.";
  const Dim hidden{"hidden", config.hidden_size};
  const Dim q_rows{"num_q_heads * head_dim", std::int64_t{p.num_q_heads} * p.head_dim};
  const Dim kv_rows{"num_kv_heads * head_dim", std::int64_t{p.num_kv_heads} * p.head_dim};
  const Dim head_dim{"head_dim", p.head_dim};
  LayerWeights w;
  w.input_norm = tensors.get(layer + "input_layernorm.weight", {hidden});
  w.post_attention_norm = tensors.get(layer + "post_attention_layernorm.weight", {hidden});
  w.q_proj = tensors.get(attention + "q_proj.weight", {q_rows, hidden});
  w.k_proj = tensors.get(attention + "k_proj.weight", {kv_rows, hidden});
  w.v_proj = tensors.get(attention + "v_proj.weight", {kv_rows, hidden});
  w.o_proj = tensors.get(attention + "o_proj.weight", {hidden, q_rows});
  w.q_norm = tensors.get(attention + "q_norm.weight", {head_dim});
  w.k_norm = tensors.get(attention + "k_norm.weight", {head_dim});
  if (config.attention_kinds[static_cast<std::size_t>(index)] == AttentionKind::sparse) {
    const Dim index_dim{"index_dim", p.index_dim};
    const auto get = [&](const char* name, std::initializer_list<Dim> dims) {
      return tensors.get(concat(attention, "indexer.", name, ".weight"), dims,
                         {.released = concat(attention, "index_", name, ".weight")});
    };
    w.index_q_proj =
        get("q_proj",
            {{"num_kv_heads * index_dim", std::int64_t{p.num_kv_heads} * p.index_dim}, hidden});
    w.index_k_proj = get("k_proj", {index_dim, hidden});
    w.index_q_norm = get("q_norm", {index_dim});
    w.index_k_norm = get("k_norm", {index_dim});
  }
  if (config.mlp_kinds[static_cast<std::size_t>(index)] == MlpKind::dense) {
    w.mlp = load_mlp(tensors, layer + "mlp.", layer + "mlp.", config.dense_intermediate_size,
                     config.hidden_size);
  } else {
    w.moe = load_moe(tensors, layer, config);
  }
  return w;
}

}  // namespace

Weights load_weights(const std::filesystem::path& directory, const Config& config) {
  NamedTensors tensors(directory);
  const Dim vocab{"vocab_size", config.vocab_size};
  const Dim hidden{"hidden", config.hidden_size};
  Weights weights;
  weights.embed_tokens = tensors.get("embed_tokens.weight", {vocab, hidden});
  weights.final_norm = tensors.get("norm.weight", {hidden});
  weights.lm_head = config.tie_word_embeddings && !tensors.has("lm_head.weight")
                        ? weights.embed_tokens
                        : tensors.get("lm_head.weight", {vocab, hidden});
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    weights.layers.push_back(load_layer(tensors, config, layer));
  }
  tensors.finish(weights);
  return weights;
}

}  // namespace msa::model
