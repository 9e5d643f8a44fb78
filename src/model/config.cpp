// SPDX-License-Identifier: Apache-2.0
//
// Two spellings of config.json exist: the released one (sparse_attention_config, moe_layer_freq)
// and the one that transformers writes (index_*, layer_types, mlp_layer_types). docs/model.md has a
// table. Where a field is absent, the default is that of transformers' configuration class.
#include "model/config.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <initializer_list>
#include <system_error>

#include "core/check.hpp"
#include "model/json_file.hpp"
#include "model/json_node.hpp"

namespace msa::model {
namespace {

/// Far above any model; keeps a malformed file from asking for gigabytes.
constexpr std::int64_t kMostLayers = 4096;

std::int64_t integer(const JsonNode& node) {
  if (!node.value().is_number_integer()) {
    node.fail(core::concat("expected an integer, got ", node.brief()));
  }
  return node.value().get<std::int64_t>();
}

/// An integer of `lowest` to `highest`; `fallback` where absent.
std::int64_t integer(const JsonNode& node, std::int64_t fallback, std::int64_t lowest = 1,
                     std::int64_t highest = INT32_MAX) {
  if (node.is_null()) return fallback;
  const std::int64_t value = integer(node);
  if (value < lowest || value > highest) {
    node.fail(core::concat("is ", node.value().dump(), ", expected ", lowest, " to ", highest));
  }
  return value;
}

double number(const JsonNode& node, double fallback) {
  if (node.is_null()) return fallback;
  if (!node.value().is_number()) {
    node.fail(core::concat("expected a number, got ", node.brief()));
  }
  return node.value().get<double>();
}

double positive(const JsonNode& node, double fallback) {
  const double value = number(node, fallback);
  if (!(value > 0.0)) node.fail(core::concat("is ", value, ", expected > 0"));
  return value;
}

/// `preferred` where it is given, else `other`.
JsonNode either(const JsonNode& preferred, const JsonNode& other) {
  return preferred.is_null() ? other : preferred;
}

/// A number that two fields may state: whichever is given; where both are, they must agree.
JsonNode agreed(const JsonNode& preferred, const JsonNode& other) {
  if (!preferred.is_null() && !other.is_null() && number(preferred, 0.0) != number(other, 0.0)) {
    preferred.fail(
        core::concat("is ", preferred.brief(), ", but ", other.path(), " is ", other.brief()));
  }
  return either(preferred, other);
}

void expect_text(const JsonNode& node, std::initializer_list<const char*> known) {
  if (node.is_null()) return;
  std::string names;
  for (const char* name : known) {
    if (node.text() == name) return;
    names += core::concat(names.empty() ? "'" : ", '", name, "'");
  }
  node.fail(core::concat("is '", node.text(), "', supported: ", names));
}

void expect_flag(const JsonNode& node, bool wanted, const char* why) {
  if (node.boolean(wanted) != wanted) {
    node.fail(core::concat("is ", wanted ? "false" : "true", ", not supported: ", why));
  }
}

void expect_length(const JsonNode& list, std::int64_t num_layers) {
  if (static_cast<std::int64_t>(list.array_size()) != num_layers) {
    list.fail(
        core::concat("has ", list.array_size(), " entries, but num_hidden_layers is ", num_layers));
  }
}

/// Per layer, from a list of names or a list of 0 and 1, whichever the file has.
template <class Kind>
std::vector<Kind> layer_kinds(const JsonNode& names, const char* zero_name, const char* one_name,
                              const JsonNode& flags, Kind zero, Kind one, Kind fallback,
                              std::int64_t num_layers) {
  std::vector<Kind> kinds(static_cast<std::size_t>(num_layers), fallback);
  const JsonNode& list = either(names, flags);
  if (list.is_null()) return kinds;
  expect_length(list, num_layers);
  for (std::size_t layer = 0; layer < kinds.size(); ++layer) {
    const JsonNode entry = list[layer];
    if (names.is_null()) {
      kinds[layer] = integer(entry, 0, 0) != 0 ? one : zero;
    } else {
      expect_text(entry, {zero_name, one_name});
      kinds[layer] = entry.text() == one_name ? one : zero;
    }
  }
  return kinds;
}

std::vector<std::int64_t> eos_ids(const JsonNode& node) {
  if (node.is_null()) return {};
  if (!node.value().is_array()) return {node.id()};
  std::vector<std::int64_t> ids;
  for (std::size_t i = 0; i < node.array_size(); ++i) ids.push_back(node[i].id());
  return ids;
}

/// Null says that there is no such token; a file without the field means the released model's
/// token, which smaller vocabularies don't have.
void read_special_tokens(const JsonNode& text, const JsonNode& root, Config& config) {
  constexpr std::int64_t kReleasedEos = 200020;
  constexpr std::int64_t kReleasedBos = 200034;
  const auto is_absent = [&](const char* field) {
    return !text.object().contains(field) && !root.object().contains(field);
  };
  const auto if_in_vocabulary = [&](std::int64_t id) { return id < config.vocab_size ? id : -1; };
  config.eos_token_ids = eos_ids(either(text["eos_token_id"], root["eos_token_id"]));
  if (is_absent("eos_token_id") && if_in_vocabulary(kReleasedEos) >= 0) {
    config.eos_token_ids = {kReleasedEos};
  }
  const JsonNode bos = either(text["bos_token_id"], root["bos_token_id"]);
  config.bos_token_id = bos.is_null() ? -1 : bos.id();
  if (is_absent("bos_token_id")) config.bos_token_id = if_in_vocabulary(kReleasedBos);
}

void read_attention(const JsonNode& text, Config& config) {
  const JsonNode sparse = text["sparse_attention_config"];
  const auto index_field = [&](const char* flat, const char* released) {
    return sparse.is_null() ? text[flat] : either(sparse[released], text[flat]);
  };
  const auto to_int = [](std::int64_t value) { return static_cast<int>(value); };
  Problem& p = config.attention;
  p.num_q_heads = to_int(integer(text["num_attention_heads"], 64));
  p.num_kv_heads = to_int(integer(text["num_key_value_heads"], 4));
  p.head_dim = to_int(integer(text["head_dim"], 128));
  p.index_dim = to_int(integer(index_field("index_head_dim", "sparse_index_dim"), 128));
  p.block_size = to_int(integer(index_field("index_block_size", "sparse_block_size"), 128));
  p.top_k = to_int(integer(index_field("index_topk_blocks", "sparse_topk_blocks"), 16));
  p.num_local_blocks = to_int(integer(index_field("index_local_blocks", "sparse_local_block"), 1));
  p.num_init_blocks = to_int(integer(index_field("index_init_blocks", "sparse_init_block"), 0, 0));
  if (!std::has_single_bit(static_cast<unsigned>(p.block_size)) || p.block_size < 16) {
    index_field("index_block_size", "sparse_block_size")
        .fail(core::concat("is ", p.block_size, ", expected a power of two from 16 on"));
  }
  if (p.top_k - p.num_init_blocks < p.num_local_blocks) {
    index_field("index_topk_blocks", "sparse_topk_blocks")
        .fail(core::concat("is ", p.top_k, ", too few for ", p.num_init_blocks, " init and ",
                           p.num_local_blocks, " local blocks, which are always selected"));
  }
  if (p.num_q_heads % p.num_kv_heads != 0) {
    text["num_attention_heads"].fail(core::concat(
        "is ", p.num_q_heads, ", no multiple of num_key_value_heads, ", p.num_kv_heads));
  }

  config.attention_kinds =
      layer_kinds(text["layer_types"], "full_attention", "minimax_m3_sparse",
                  sparse.is_null() ? sparse : sparse["sparse_attention_freq"], AttentionKind::dense,
                  AttentionKind::sparse, AttentionKind::dense, config.num_layers);
  if (!sparse.is_null() && !sparse["use_sparse_attention"].boolean(true)) {
    config.attention_kinds.assign(config.attention_kinds.size(), AttentionKind::dense);
  }
  bool any_sparse = false;
  for (AttentionKind kind : config.attention_kinds) any_sparse |= kind == AttentionKind::sparse;
  if (!any_sparse) return;

  const JsonNode heads = index_field("index_n_heads", "sparse_num_index_heads");
  if (integer(heads, 4) != p.num_kv_heads) {
    heads.fail(core::concat("there are ", integer(heads, 4), " index heads and ", p.num_kv_heads,
                            " KV heads, but each index head selects for one KV head"));
  }
  if (!sparse.is_null()) {
    expect_text(sparse["sparse_score_type"], {"max"});
    const JsonNode no_value = sparse["sparse_disable_index_value"];
    for (std::size_t i = 0; !no_value.is_null() && i < no_value.array_size(); ++i) {
      const bool is_sparse =
          i < config.attention_kinds.size() && config.attention_kinds[i] == AttentionKind::sparse;
      if (is_sparse && integer(no_value[i], 1, 0) == 0) {
        no_value[i].fail("is 0: index values are not supported");
      }
    }
  }
}

void read_rope(const JsonNode& text, Config& config) {
  JsonNode theta = text["rope_theta"];
  const JsonNode rotary = text["rotary_dim"];
  JsonNode factor = text["partial_rotary_factor"];
  for (const char* name : {"rope_parameters", "rope_scaling"}) {
    const JsonNode parameters = text[name];
    if (parameters.is_null()) continue;
    expect_text(parameters["rope_type"], {"default"});
    expect_text(parameters["type"], {"default"});
    theta = agreed(parameters["rope_theta"], theta);
    factor = agreed(parameters["partial_rotary_factor"], factor);
  }
  const std::int64_t head_dim = config.attention.head_dim;
  config.rope_theta = positive(theta, 5e6);
  config.rotary_dim = integer(rotary, 64, 0);
  if (!factor.is_null()) {
    const double share = positive(factor, 1.0);
    if (share > 1.0) factor.fail(core::concat("is ", share, ", expected at most 1"));
    const auto by_factor = static_cast<std::int64_t>(share * static_cast<double>(head_dim));
    if (!rotary.is_null() && by_factor != config.rotary_dim) {
      factor.fail(core::concat("times head_dim ", head_dim, " is ", by_factor,
                               ", but rotary_dim is ", config.rotary_dim));
    }
    config.rotary_dim = by_factor;
  } else if (!text["rope_parameters"].is_null() && config.rotary_dim != head_dim) {
    // transformers would rotate all of head_dim here, other engines rotary_dim channels.
    text["rope_parameters"].fail(core::concat(
        "has no partial_rotary_factor, so it is open whether ", config.rotary_dim,
        " channels (rotary_dim) or all ", head_dim, " (head_dim) are rotated; state it"));
  }
  const std::int64_t narrowest = std::min<std::int64_t>(head_dim, config.attention.index_dim);
  if (config.rotary_dim % 2 != 0 || config.rotary_dim > narrowest) {
    rotary.fail(core::concat("is ", config.rotary_dim, ", expected an even number up to ",
                             narrowest, ", the smaller of head_dim and the index dim"));
  }
}

void read_mlp(const JsonNode& text, Config& config) {
  config.dense_intermediate_size = integer(text["dense_intermediate_size"], 12288);
  config.expert_intermediate_size = integer(text["intermediate_size"], 3072);
  config.num_experts = integer(either(text["num_local_experts"], text["num_experts"]), 128);
  config.num_experts_per_token = integer(text["num_experts_per_tok"], 4);
  if (config.num_experts_per_token > config.num_experts) {
    text["num_experts_per_tok"].fail(core::concat(
        "is ", config.num_experts_per_token, ", but there are ", config.num_experts, " experts"));
  }
  config.shared_intermediate_size = integer(text["shared_intermediate_size"], 3072, 0);
  if (integer(text["n_shared_experts"], 1, 0) == 0) config.shared_intermediate_size = 0;
  if (integer(text["n_shared_experts"], 1, 0) > 1) {
    text["n_shared_experts"].fail("more than one shared expert is not supported");
  }
  config.routed_scaling_factor = number(text["routed_scaling_factor"], 2.0);
  config.swiglu_alpha = number(text["swiglu_alpha"], 1.702);
  config.swiglu_limit = positive(text["swiglu_limit"], 7.0);
  config.mlp_kinds = layer_kinds(text["mlp_layer_types"], "dense", "sparse", text["moe_layer_freq"],
                                 MlpKind::dense, MlpKind::moe, MlpKind::moe, config.num_layers);
  // transformers writes "silu" and computes SwiGLU-OAI all the same.
  expect_text(text["hidden_act"], {"swigluoai", "silu"});
  expect_text(text["scoring_func"], {"sigmoid"});
}

}  // namespace

Config load_config(const std::filesystem::path& directory) {
  std::error_code ignored;  // without it, a path that can't be looked up would not be an Error
  MSA_CHECK(std::filesystem::is_directory(directory, ignored), directory.string(),
            ": is no directory");
  const std::filesystem::path path = directory / "config.json";
  const std::string name = path.string();
  const nlohmann::json json = read_json_file(path);
  const JsonNode root(name, json);
  expect_text(root["model_type"], {"minimax_m3_vl", "minimax_m3_vl_text", "minimax_m3"});
  if (root["model_type"].is_null()) root["model_type"].fail("is missing");
  const JsonNode text = either(root["text_config"], root);
  if (!either(text["quantization_config"], root["quantization_config"]).is_null()) {
    root["quantization_config"].fail(
        "quantised checkpoints are not supported; use the bf16 release of the model");
  }

  Config config;
  config.model_type = root["model_type"].text();
  config.note = root["msa_note"].text("");
  config.hidden_size = integer(text["hidden_size"], 6144);
  config.num_layers = integer(text["num_hidden_layers"], 60, 1, kMostLayers);
  config.vocab_size = integer(text["vocab_size"], 200064);
  config.tie_word_embeddings =
      either(text["tie_word_embeddings"], root["tie_word_embeddings"]).boolean(false);
  config.rms_norm_eps = positive(text["rms_norm_eps"], 1e-6);
  config.max_position_embeddings = integer(text["max_position_embeddings"], 524288);
  read_special_tokens(text, root, config);
  expect_flag(text["use_gemma_norm"], true, "norms multiply by 1 + weight");
  expect_flag(text["use_qk_norm"], true, "queries and keys are normalised per head");
  expect_flag(text["attention_output_gate"], false, "there is no output gate");
  read_attention(text, config);
  read_rope(text, config);
  read_mlp(text, config);
  return config;
}

}  // namespace msa::model
