// SPDX-License-Identifier: Apache-2.0
#include "model/config.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/model/checkpoint_files.hpp"

namespace msa {
namespace {

using model::AttentionKind;
using model::Config;
using model::MlpKind;
using nlohmann::json;
using test::error_of;
using test::TempDirectory;

/// As the released checkpoint writes it, with two layers.
json released_form() {
  return json::parse(R"({
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "model_type": "minimax_m3_vl",
    "eos_token_id": [200020, 200021],
    "text_config": {
      "hidden_size": 6144, "num_hidden_layers": 2, "vocab_size": 200064,
      "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
      "rotary_dim": 64, "partial_rotary_factor": 0.5, "rope_theta": 5000000,
      "max_position_embeddings": 1048576, "rms_norm_eps": 1e-06,
      "use_gemma_norm": true, "use_qk_norm": true, "attention_output_gate": false,
      "hidden_act": "swigluoai", "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
      "dense_intermediate_size": 12288, "intermediate_size": 3072,
      "num_local_experts": 128, "num_experts_per_tok": 4, "n_shared_experts": 1,
      "shared_intermediate_size": 3072, "scoring_func": "sigmoid",
      "routed_scaling_factor": 2.0, "moe_layer_freq": [0, 1],
      "bos_token_id": 200019,
      "sparse_attention_config": {
        "use_sparse_attention": true, "sparse_index_dim": 64, "sparse_num_index_heads": 4,
        "sparse_topk_blocks": 12, "sparse_block_size": 64, "sparse_score_type": "max",
        "sparse_init_block": 1, "sparse_local_block": 2, "sparse_attention_freq": [0, 1],
        "sparse_disable_index_value": [0, 1]
      }
    },
    "vision_config": {"hidden_size": 1280, "num_hidden_layers": 32}
  })");
}

/// As transformers writes the text model.
json text_form() {
  return json::parse(R"({
    "architectures": ["MiniMaxM3VLForCausalLM"],
    "model_type": "minimax_m3_vl_text",
    "hidden_size": 96, "num_hidden_layers": 3, "vocab_size": 500,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "rotary_dim": 32,
    "rope_parameters":
      {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "hidden_act": "silu",
    "dense_intermediate_size": 160, "intermediate_size": 80, "shared_intermediate_size": 40,
    "num_local_experts": 8, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5,
    "swiglu_alpha": 1.5, "swiglu_limit": 6.0, "tie_word_embeddings": true,
    "layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"],
    "mlp_layer_types": ["sparse", "sparse", "dense"],
    "index_n_heads": 2, "index_head_dim": 48, "index_block_size": 32, "index_topk_blocks": 5,
    "index_local_blocks": 3, "eos_token_id": 7, "bos_token_id": null
  })");
}

class ConfigTest : public testing::Test {
 protected:
  Config load(const json& form) const {
    directory_.write("config.json", form.dump());
    return model::load_config(directory_.path());
  }
  std::string error(const json& form) const {
    return error_of(directory_.path(), [&] { load(form); });
  }
  /// What is wrong with a text form with one field changed, the file's name left out.
  std::string error_with(const char* field, const json& value, json form = text_form()) const {
    json& object = form.contains("text_config") ? form["text_config"] : form;
    object[json::json_pointer(std::string("/") + field)] = value;
    const std::string text = error(form);
    constexpr std::string_view kFile = "DIR/config.json: ";
    EXPECT_TRUE(text.starts_with(kFile)) << text;
    return text.substr(std::min(text.size(), kFile.size()));
  }
  std::string released_error(const char* field, const json& value) const {
    return error_with(field, value, released_form());
  }

  TempDirectory directory_;
};

TEST_F(ConfigTest, ReadsTheReleasedForm) {
  const Config c = load(released_form());
  EXPECT_EQ(c.model_type, "minimax_m3_vl");
  EXPECT_EQ(c.hidden_size, 6144);
  EXPECT_EQ(c.num_layers, 2);
  EXPECT_EQ(c.vocab_size, 200064);
  EXPECT_FALSE(c.tie_word_embeddings);
  EXPECT_EQ(c.attention.num_q_heads, 64);
  EXPECT_EQ(c.attention.num_kv_heads, 4);
  EXPECT_EQ(c.attention.head_dim, 128);
  EXPECT_EQ(c.attention.index_dim, 64);
  EXPECT_EQ(c.attention.block_size, 64);
  EXPECT_EQ(c.attention.top_k, 12);
  EXPECT_EQ(c.attention.num_init_blocks, 1);
  EXPECT_EQ(c.attention.num_local_blocks, 2);
  EXPECT_EQ(c.rotary_dim, 64);
  EXPECT_EQ(c.rope_theta, 5e6);
  EXPECT_EQ(c.rms_norm_eps, 1e-6);
  EXPECT_EQ(c.max_position_embeddings, 1048576);
  EXPECT_EQ(c.dense_intermediate_size, 12288);
  EXPECT_EQ(c.expert_intermediate_size, 3072);
  EXPECT_EQ(c.shared_intermediate_size, 3072);
  EXPECT_EQ(c.num_experts, 128);
  EXPECT_EQ(c.num_experts_per_token, 4);
  EXPECT_EQ(c.routed_scaling_factor, 2.0);
  EXPECT_EQ(c.swiglu_alpha, 1.702);
  EXPECT_EQ(c.swiglu_limit, 7.0);
  EXPECT_EQ(c.attention_kinds, (std::vector{AttentionKind::dense, AttentionKind::sparse}));
  EXPECT_EQ(c.mlp_kinds, (std::vector{MlpKind::dense, MlpKind::moe}));
  EXPECT_EQ(c.eos_token_ids, (std::vector<std::int64_t>{200020, 200021}));
  EXPECT_EQ(c.bos_token_id, 200019);
}

TEST_F(ConfigTest, ReadsTheFormThatTransformersWrites) {
  const Config c = load(text_form());
  EXPECT_EQ(c.model_type, "minimax_m3_vl_text");
  EXPECT_EQ(c.hidden_size, 96);
  EXPECT_EQ(c.num_layers, 3);
  EXPECT_EQ(c.vocab_size, 500);
  EXPECT_TRUE(c.tie_word_embeddings);
  EXPECT_EQ(c.attention.num_q_heads, 6);
  EXPECT_EQ(c.attention.num_kv_heads, 2);
  EXPECT_EQ(c.attention.head_dim, 64);
  EXPECT_EQ(c.attention.index_dim, 48);
  EXPECT_EQ(c.attention.block_size, 32);
  EXPECT_EQ(c.attention.top_k, 5);
  EXPECT_EQ(c.attention.num_init_blocks, 0);
  EXPECT_EQ(c.attention.num_local_blocks, 3);
  EXPECT_EQ(c.rotary_dim, 32);
  EXPECT_EQ(c.rope_theta, 1e4);
  EXPECT_EQ(c.rms_norm_eps, 1e-5);
  EXPECT_EQ(c.max_position_embeddings, 4096);
  EXPECT_EQ(c.dense_intermediate_size, 160);
  EXPECT_EQ(c.expert_intermediate_size, 80);
  EXPECT_EQ(c.shared_intermediate_size, 40);
  EXPECT_EQ(c.num_experts, 8);
  EXPECT_EQ(c.num_experts_per_token, 3);
  EXPECT_EQ(c.routed_scaling_factor, 1.5);
  EXPECT_EQ(c.swiglu_alpha, 1.5);
  EXPECT_EQ(c.swiglu_limit, 6.0);
  EXPECT_EQ(c.attention_kinds,
            (std::vector{AttentionKind::sparse, AttentionKind::dense, AttentionKind::sparse}));
  EXPECT_EQ(c.mlp_kinds, (std::vector{MlpKind::moe, MlpKind::moe, MlpKind::dense}));
  EXPECT_EQ(c.eos_token_ids, (std::vector<std::int64_t>{7}));
  EXPECT_EQ(c.bos_token_id, -1);
}

TEST_F(ConfigTest, AbsentFieldsAreThoseOfTransformers) {
  const Config c = load({{"model_type", "minimax_m3_vl_text"}});
  EXPECT_EQ(c.hidden_size, 6144);
  EXPECT_EQ(c.num_layers, 60);
  EXPECT_EQ(c.vocab_size, 200064);
  EXPECT_FALSE(c.tie_word_embeddings);
  EXPECT_EQ(c.attention.group_size(), 16);
  EXPECT_EQ(c.attention.head_dim, 128);
  EXPECT_EQ(c.attention.index_dim, 128);
  EXPECT_EQ(c.attention.block_size, 128);
  EXPECT_EQ(c.attention.top_k, 16);
  EXPECT_EQ(c.attention.num_local_blocks, 1);
  EXPECT_EQ(c.rotary_dim, 64);
  EXPECT_EQ(c.rope_theta, 5e6);
  EXPECT_EQ(c.max_position_embeddings, 524288);
  EXPECT_EQ(c.attention_kinds, std::vector(60, AttentionKind::dense));
  EXPECT_EQ(c.mlp_kinds, std::vector(60, MlpKind::moe));
  EXPECT_EQ(c.eos_token_ids, (std::vector<std::int64_t>{200020}));
  EXPECT_EQ(c.bos_token_id, 200034);
  // The released special tokens mean nothing in a smaller vocabulary; null says that there is none.
  const Config small = load({{"model_type", "minimax_m3"}, {"vocab_size", 1000}});
  EXPECT_TRUE(small.eos_token_ids.empty());
  EXPECT_EQ(small.bos_token_id, -1);
  json without = {{"model_type", "minimax_m3"}, {"eos_token_id", nullptr}};
  EXPECT_TRUE(load(without).eos_token_ids.empty());
}

TEST_F(ConfigTest, SomeFieldsOverrideOthers) {
  json form = released_form();
  json& text = form["text_config"];
  json& sparse = text["sparse_attention_config"];
  text["layer_types"] = {"minimax_m3_sparse", "full_attention"};
  sparse["sparse_disable_index_value"] = {1, 0};
  text["n_shared_experts"] = 0;
  text.erase("rotary_dim");
  text["partial_rotary_factor"] = 0.25;
  Config c = load(form);
  EXPECT_EQ(c.attention_kinds, (std::vector{AttentionKind::sparse, AttentionKind::dense}));
  EXPECT_EQ(c.shared_intermediate_size, 0);
  EXPECT_EQ(c.rotary_dim, 32);
  sparse["use_sparse_attention"] = false;
  sparse["sparse_num_index_heads"] = 1;  // nobody reads it then
  c = load(form);
  EXPECT_EQ(c.attention_kinds, std::vector(2, AttentionKind::dense));
}

TEST_F(ConfigTest, RefusesBrokenFiles) {
  const auto load_from = [&](const std::filesystem::path& path) {
    return error_of(directory_.path(), [&] { model::load_config(path); });
  };
  EXPECT_EQ(load_from(directory_.path() / "none"), "DIR/none: is no directory");
  EXPECT_EQ(load_from(std::string(5000, 'x')), std::string(5000, 'x') + ": is no directory");
  EXPECT_EQ(load_from(directory_.path()), "DIR/config.json: can't open");
  std::filesystem::create_directory(directory_.path() / "config.json");
  EXPECT_TRUE(load_from(directory_.path()).starts_with("DIR/config.json: can't read: "));
  std::filesystem::remove(directory_.path() / "config.json");
  directory_.write("config.json", "{\"model_type\": ");
  EXPECT_TRUE(load_from(directory_.path()).starts_with("DIR/config.json: ")) << "names the file";
  directory_.write("config.json", R"({"model_type":"minimax_m3","rms_norm_eps":1e999})");
  EXPECT_TRUE(load_from(directory_.path()).starts_with("DIR/config.json: ")) << "out of range";
  // So deep that whatever calls itself once per level runs out of stack.
  const std::string deep = std::string(1000000, '[') + std::string(1000000, ']');
  for (const std::string field : {"hidden_size", "rms_norm_eps", "rope_theta"}) {
    directory_.write("config.json",
                     core::concat(R"({"model_type":"minimax_m3",")", field, "\":", deep, "}"));
    const std::string text = load_from(directory_.path());
    EXPECT_TRUE(text.starts_with("DIR/config.json: " + field + ": expected a")) << text;
    EXPECT_TRUE(text.ends_with(", got array")) << text;
  }
  directory_.write("config.json", "[]");
  EXPECT_EQ(load_from(directory_.path()),
            "DIR/config.json: top level: expected an object, got array");
  EXPECT_EQ(error({{"hidden_size", 64}}), "DIR/config.json: model_type: is missing");
  EXPECT_EQ(error({{"model_type", "llama"}}),
            "DIR/config.json: model_type: is 'llama', supported: 'minimax_m3_vl', "
            "'minimax_m3_vl_text', 'minimax_m3'");
  EXPECT_EQ(error({{"model_type", "minimax_m3_vl"}, {"text_config", 1}}),
            "DIR/config.json: text_config: expected an object, got 1");
}

TEST_F(ConfigTest, RefusesNumbersThatCannotBe) {
  EXPECT_EQ(error_with("hidden_size", "wide"), "hidden_size: expected an integer, got \"wide\"");
  EXPECT_EQ(error_with("hidden_size", 96.0), "hidden_size: expected an integer, got 96.0");
  EXPECT_EQ(error_with("hidden_size", 0), "hidden_size: is 0, expected 1 to 2147483647");
  EXPECT_EQ(error_with("vocab_size", 18446744073709551615ull),
            "vocab_size: is 18446744073709551615, expected 1 to 2147483647");
  EXPECT_EQ(error_with("num_hidden_layers", 2000000000),
            "num_hidden_layers: is 2000000000, expected 1 to 4096");
  EXPECT_EQ(error_with("rms_norm_eps", 0), "rms_norm_eps: is 0, expected > 0");
  EXPECT_EQ(error_with("rms_norm_eps", "small"), "rms_norm_eps: expected a number, got \"small\"");
  EXPECT_EQ(error_with("swiglu_limit", -1.5), "swiglu_limit: is -1.5, expected > 0");
  EXPECT_EQ(error_with("tie_word_embeddings", 1), "tie_word_embeddings: expected a boolean, got 1");
  EXPECT_EQ(error_with("eos_token_id", json::array({3, -1})),
            "eos_token_id[1]: expected a token id, got -1");
  EXPECT_EQ(error_with("bos_token_id", "<s>"), "bos_token_id: expected a token id, got \"<s>\"");
}

TEST_F(ConfigTest, RefusesContradictions) {
  EXPECT_EQ(error_with("num_attention_heads", 5),
            "num_attention_heads: is 5, no multiple of num_key_value_heads, 2");
  EXPECT_EQ(
      error_with("index_n_heads", 4),
      "index_n_heads: there are 4 index heads and 2 KV heads, but each index head selects for "
      "one KV head");
  EXPECT_EQ(released_error("sparse_attention_config/sparse_num_index_heads", 1),
            "text_config.sparse_attention_config.sparse_num_index_heads: there are 1 index heads "
            "and 4 KV heads, but each index head selects for one KV head");
  EXPECT_EQ(error_with("layer_types", json::array({"full_attention"})),
            "layer_types: has 1 entries, but num_hidden_layers is 3");
  EXPECT_EQ(error_with("mlp_layer_types", json::array()),
            "mlp_layer_types: has 0 entries, but num_hidden_layers is 3");
  EXPECT_EQ(released_error("moe_layer_freq", json::array({0, 1, 1})),
            "text_config.moe_layer_freq: has 3 entries, but num_hidden_layers is 2");
  EXPECT_EQ(released_error("sparse_attention_config/sparse_attention_freq", json::array({1})),
            "text_config.sparse_attention_config.sparse_attention_freq: has 1 entries, but "
            "num_hidden_layers is 2");
  EXPECT_EQ(error_with("num_experts_per_tok", 9),
            "num_experts_per_tok: is 9, but there are 8 experts");
  EXPECT_EQ(error_with("index_topk_blocks", 2),
            "index_topk_blocks: is 2, too few for 0 init and 3 local blocks, which are always "
            "selected");
  EXPECT_EQ(error_with("index_block_size", 48),
            "index_block_size: is 48, expected a power of two from 16 on");
  EXPECT_EQ(error_with("index_block_size", 8),
            "index_block_size: is 8, expected a power of two from 16 on");
}

TEST_F(ConfigTest, RefusesRotationsThatDoNotFit) {
  const auto rotary_error = [&](const json& factor, const json& rotary_dim) {
    json form = text_form();
    form["partial_rotary_factor"] = factor;
    form["rope_parameters"].erase("partial_rotary_factor");
    return error_with("rotary_dim", rotary_dim, form);
  };
  const std::string range =
      ", expected an even number up to 48, the smaller of head_dim and the "
      "index dim";
  EXPECT_EQ(rotary_error(1.0, 64), "rotary_dim: is 64" + range);
  EXPECT_EQ(rotary_error(0.11, 7), "rotary_dim: is 7" + range);
  EXPECT_EQ(rotary_error(0.25, 32),
            "partial_rotary_factor: times head_dim 64 is 16, but rotary_dim is 32");
  EXPECT_EQ(rotary_error(1e300, 32), "partial_rotary_factor: is 1e+300, expected at most 1");
  EXPECT_EQ(rotary_error(-0.5, 32), "partial_rotary_factor: is -0.5, expected > 0");
  EXPECT_EQ(rotary_error(nullptr, 32),
            "rope_parameters: has no partial_rotary_factor, so it is open whether 32 channels "
            "(rotary_dim) or all 64 (head_dim) are rotated; state it");
  EXPECT_EQ(error_with("partial_rotary_factor", 0.25),
            "rope_parameters.partial_rotary_factor: is 0.5, but partial_rotary_factor is 0.25");
  EXPECT_EQ(error_with("rope_theta", 5000000),
            "rope_parameters.rope_theta: is 10000.0, but rope_theta is 5000000");
  EXPECT_EQ(error_with("rope_scaling", {{"rope_type", "yarn"}}),
            "rope_scaling.rope_type: is 'yarn', supported: 'default'");
  EXPECT_EQ(error_with("rope_parameters/rope_type", "yarn"),
            "rope_parameters.rope_type: is 'yarn', supported: 'default'");
  EXPECT_EQ(released_error("rope_scaling", {{"type", "linear"}}),
            "text_config.rope_scaling.type: is 'linear', supported: 'default'");
}

TEST_F(ConfigTest, RefusesWhatTheRuntimeDoesNotDo) {
  EXPECT_EQ(error_with("hidden_act", "gelu"),
            "hidden_act: is 'gelu', supported: 'swigluoai', 'silu'");
  EXPECT_EQ(error_with("scoring_func", "softmax"),
            "scoring_func: is 'softmax', supported: 'sigmoid'");
  EXPECT_EQ(error_with("layer_types/1", "sliding_attention"),
            "layer_types[1]: is 'sliding_attention', supported: 'full_attention', "
            "'minimax_m3_sparse'");
  EXPECT_EQ(released_error("sparse_attention_config/sparse_score_type", "mean"),
            "text_config.sparse_attention_config.sparse_score_type: is 'mean', supported: 'max'");
  EXPECT_EQ(released_error("sparse_attention_config/sparse_disable_index_value", json({1, 0})),
            "text_config.sparse_attention_config.sparse_disable_index_value[1]: is 0: index values "
            "are not supported");
  EXPECT_EQ(released_error("attention_output_gate", true),
            "text_config.attention_output_gate: is true, not supported: there is no output gate");
  EXPECT_EQ(released_error("use_gemma_norm", false),
            "text_config.use_gemma_norm: is false, not supported: norms multiply by 1 + weight");
  EXPECT_EQ(released_error("use_qk_norm", false),
            "text_config.use_qk_norm: is false, not supported: queries and keys are normalised per "
            "head");
  EXPECT_EQ(released_error("n_shared_experts", 2),
            "text_config.n_shared_experts: more than one shared expert is not supported");
  json quantised = released_form();
  quantised["quantization_config"] = {{"quant_method", "fp8"}};
  EXPECT_EQ(
      error(quantised),
      "DIR/config.json: quantization_config: quantised checkpoints are not supported; use the "
      "bf16 release of the model");
}

/// Every field of both forms replaced by a value of every JSON type is read or refused by an Error.
TEST_F(ConfigTest, SurvivesAnyValueInAnyField) {
  const json values = {nullptr,         true,          -1, 0, 3, 1e300, "text", json::array(),
                       json({-1, "x"}), json::object()};
  int num_refused = 0;
  for (const json& form : {released_form(), text_form()}) {
    const json fields = form.flatten();
    for (const auto& field : fields.items()) {
      for (const json& value : values) {
        json changed = form;
        changed[json::json_pointer(field.key())] = value;
        try {
          load(changed);
        } catch (const Error& error) {
          ++num_refused;
          EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
        }
      }
    }
  }
  EXPECT_GT(num_refused, 100);
}

}  // namespace
}  // namespace msa
