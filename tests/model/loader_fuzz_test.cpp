// SPDX-License-Identifier: Apache-2.0
//
// Checkpoint directories with random changes load or are refused by an Error; run with ASan and
// UBSan to see that nothing else happens on the way. safetensors_test.cpp does the same to files in
// memory.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <random>

#include "model/safetensors.hpp"
#include "model/weights.hpp"
#include "tests/model/checkpoint_files.hpp"
#include "tests/model/random_model.hpp"

namespace msa {
namespace {

using model::Config;
using model::StoredTensor;
using model::TensorFiles;
using model::Weights;
using test::CheckpointTensors;
using test::FileTensor;
using test::safetensors_file;
using test::Spelling;
using test::TempDirectory;

struct Outcomes {
  int num_loaded = 0;
  int num_refused = 0;
};

/// Calls `round` with a generator so many times; anything but an Error(invalid_argument) fails.
Outcomes repeat(int num_rounds, const std::function<void(std::mt19937&)>& round) {
  Outcomes outcomes;
  std::mt19937 random(11);
  for (int i = 0; i < num_rounds; ++i) {
    try {
      round(random);
      ++outcomes.num_loaded;
    } catch (const Error& error) {
      ++outcomes.num_refused;
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument) << error.what();
      EXPECT_STRNE(error.what(), "");
    } catch (const std::exception& error) {
      ADD_FAILURE() << "round " << i << ": not an Error: " << error.what();
    }
  }
  return outcomes;
}

/// What a config promises to those who use it.
void expect_consistent(const Config& config) {
  const Problem& p = config.attention;
  EXPECT_GE(config.num_layers, 1);
  EXPECT_EQ(config.attention_kinds.size(), static_cast<std::size_t>(config.num_layers));
  EXPECT_EQ(config.mlp_kinds.size(), static_cast<std::size_t>(config.num_layers));
  EXPECT_GE(p.num_kv_heads, 1);
  EXPECT_EQ(p.num_q_heads % p.num_kv_heads, 0);
  EXPECT_GE(p.block_size, 16);
  EXPECT_LE(p.num_init_blocks + p.num_local_blocks, p.top_k);
  EXPECT_EQ(config.rotary_dim % 2, 0);
  EXPECT_LE(config.rotary_dim, p.head_dim);
  EXPECT_GT(config.rope_theta, 0.0);
  EXPECT_GT(config.rms_norm_eps, 0.0);
  EXPECT_LE(config.num_experts_per_token, config.num_experts);
}

TEST(LoaderFuzz, Config) {
  const TempDirectory directory;
  const std::string released = R"({"model_type":"minimax_m3_vl","text_config":{"hidden_size":96,)"
                               R"("num_hidden_layers":2,"rotary_dim":64,"rope_theta":5000000,)"
                               R"("partial_rotary_factor":0.5,"moe_layer_freq":[0,1],)"
                               R"("sparse_attention_config":{"sparse_num_index_heads":4,)"
                               R"("sparse_topk_blocks":12,"sparse_block_size":64,)"
                               R"("sparse_init_block":1,"sparse_attention_freq":[0,1]}}})";
  const std::string transformers = R"({"model_type":"minimax_m3_vl_text","num_hidden_layers":2,)"
                                   R"("layer_types":["minimax_m3_sparse","full_attention"],)"
                                   R"("mlp_layer_types":["sparse","dense"],"eos_token_id":[1,2],)"
                                   R"("rope_parameters":{"rope_type":"default","rope_theta":1e4,)"
                                   R"("partial_rotary_factor":0.5},"num_local_experts":8,)"
                                   R"("index_n_heads":4,"index_block_size":32})";
  for (const std::string& text : {released, transformers}) {
    const Outcomes outcomes = repeat(2500, [&](std::mt19937& random) {
      directory.write("config.json", test::changed(text, random));
      expect_consistent(model::load_config(directory.path()));
    });
    EXPECT_GT(outcomes.num_loaded, 100);  // names of fields that nobody reads then
    EXPECT_GT(outcomes.num_refused, 500);
  }
}

TEST(LoaderFuzz, Index) {
  const TempDirectory directory;
  const std::vector<FileTensor> one = {{"a", "F32", {2}, "abcdefgh"}, {"b", "U8", {1}, "x"}};
  const std::vector<FileTensor> two = {{"c", "BF16", {1, 2}, "ABCD"}};
  directory.write("1.safetensors", safetensors_file(one));
  directory.write("2.safetensors", safetensors_file(two));
  const std::string index = R"({"metadata":{"total_size":13},"weight_map":{)"
                            R"("a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}})";
  const Outcomes outcomes = repeat(2500, [&](std::mt19937& random) {
    directory.write("model.safetensors.index.json", test::changed(index, random));
    TensorFiles files(directory.path());
    for (const auto& [name, tensor] : files.tensors()) {
      // Whatever the index says, tensors come from the shards, which are as written.
      EXPECT_TRUE(name == "a" || name == "b" || name == "c") << name;
      if (name != "b") files.view(name);
    }
  });
  EXPECT_GT(outcomes.num_loaded, 100);
  EXPECT_GT(outcomes.num_refused, 500);
}

/// Reads all of it; returns its bytes.
std::size_t touch(const TensorView& view) {
  std::string copy(test::bytes_of(view).size(), '\0');
  if (!copy.empty()) std::memcpy(copy.data(), view.data, copy.size());
  return copy.size();
}

std::size_t touch(const model::MlpWeights& mlp) {
  return touch(mlp.gate) + touch(mlp.up) + touch(mlp.down);
}

std::size_t touch(const Weights& weights) {
  std::size_t bytes = touch(weights.embed_tokens) + touch(weights.final_norm);
  bytes += touch(weights.lm_head);
  for (const model::LayerWeights& w : weights.layers) {
    bytes += touch(w.mlp) + touch(w.moe.shared) + touch(w.moe.router);
    bytes += touch(w.moe.score_correction_bias);
    for (const model::MlpWeights& expert : w.moe.experts) bytes += touch(expert);
    for (const TensorView* view : {&w.input_norm, &w.post_attention_norm, &w.q_proj, &w.k_proj,
                                   &w.v_proj, &w.o_proj, &w.q_norm, &w.k_norm, &w.index_q_proj,
                                   &w.index_k_proj, &w.index_q_norm, &w.index_k_norm}) {
      bytes += touch(*view);
    }
  }
  return bytes;
}

TEST(LoaderFuzz, Weights) {
  const TempDirectory directory;
  const Config config = test::small_config();
  const Weights weights = test::random_weights(config, DType::bf16, 5);
  for (const Spelling spelling : {Spelling::released, Spelling::transformers}) {
    const std::string file =
        safetensors_file(CheckpointTensors(weights, config, spelling).tensors());
    std::uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, file.data(), sizeof(header_bytes));
    const Outcomes outcomes = repeat(400, [&](std::mt19937& random) {
      // Half of the changes go to the header, half nearly always to the data.
      const std::size_t num_bytes =
          random() % 2 == 0 ? sizeof(header_bytes) + header_bytes : file.size();
      directory.write("model.safetensors", test::changed(file, random, num_bytes));
      const Weights loaded = model::load_weights(directory.path(), config);
      // A changed dtype may halve or double a tensor only together with its range: not by chance.
      EXPECT_EQ(touch(loaded), touch(weights));
      EXPECT_EQ(loaded.num_bytes, static_cast<std::int64_t>(touch(weights)));
    });
    EXPECT_GT(outcomes.num_loaded, 50);  // changed or added data
    EXPECT_GT(outcomes.num_refused, 150);
  }
}

}  // namespace
}  // namespace msa
