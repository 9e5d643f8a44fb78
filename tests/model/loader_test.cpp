// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "model/safetensors.hpp"
#include "model/weights.hpp"
#include "tests/model/checkpoint_files.hpp"
#include "tests/model/random_model.hpp"

namespace msa {
namespace {

using model::Config;
using model::load_weights;
using model::Weights;
using test::CheckpointTensors;
using test::error_of;
using test::FileTensor;
using test::safetensors_file;
using test::Spelling;
using test::TempDirectory;

/// Every view of a model, by a name of our own.
std::map<std::string, TensorView> views_of(const Weights& weights) {
  std::map<std::string, TensorView> views = {{"embed_tokens", weights.embed_tokens},
                                             {"final_norm", weights.final_norm},
                                             {"lm_head", weights.lm_head}};
  const auto add_mlp = [&](const std::string& prefix, const model::MlpWeights& mlp) {
    views[prefix + "gate"] = mlp.gate;
    views[prefix + "up"] = mlp.up;
    views[prefix + "down"] = mlp.down;
  };
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    const model::LayerWeights& w = weights.layers[i];
    const std::string layer = core::concat(i, ".");
    views[layer + "input_norm"] = w.input_norm;
    views[layer + "post_attention_norm"] = w.post_attention_norm;
    views[layer + "q_proj"] = w.q_proj;
    views[layer + "k_proj"] = w.k_proj;
    views[layer + "v_proj"] = w.v_proj;
    views[layer + "o_proj"] = w.o_proj;
    views[layer + "q_norm"] = w.q_norm;
    views[layer + "k_norm"] = w.k_norm;
    views[layer + "index_q_proj"] = w.index_q_proj;
    views[layer + "index_k_proj"] = w.index_k_proj;
    views[layer + "index_q_norm"] = w.index_q_norm;
    views[layer + "index_k_norm"] = w.index_k_norm;
    views[layer + "router"] = w.moe.router;
    views[layer + "bias"] = w.moe.score_correction_bias;
    add_mlp(layer + "mlp.", w.mlp);
    add_mlp(layer + "shared.", w.moe.shared);
    for (std::size_t e = 0; e < w.moe.experts.size(); ++e) {
      add_mlp(core::concat(layer, e, "."), w.moe.experts[e]);
    }
  }
  return views;
}

/// Same views given, same dtypes, shapes and bytes.
void expect_same(const Weights& loaded, const Weights& expected) {
  const auto views = views_of(loaded);
  const auto expected_views = views_of(expected);
  ASSERT_EQ(views.size(), expected_views.size());
  for (const auto& [name, wanted] : expected_views) {
    SCOPED_TRACE(name);
    const TensorView& view = views.at(name);
    ASSERT_EQ(view.given(), wanted.given());
    if (!wanted.given()) continue;
    EXPECT_EQ(view.dtype, wanted.dtype);
    ASSERT_EQ(view.rank, wanted.rank);
    EXPECT_EQ(view.shape, wanted.shape);
    EXPECT_EQ(view.stride, wanted.stride);  // both are contiguous
    EXPECT_TRUE(test::bytes_of(view) == test::bytes_of(wanted));
  }
}

/// Elements, counted from the file's tensors.
std::int64_t num_elements(std::span<const FileTensor> tensors) {
  std::int64_t count = 0;
  for (const FileTensor& tensor : tensors) {
    std::int64_t elements = 1;
    for (std::int64_t size : tensor.shape) elements *= size;
    count += elements;
  }
  return count;
}

/// As transformers shards: each tensor in one file, an index that says which.
void write_shards(const TempDirectory& directory, std::span<const FileTensor> tensors,
                  std::size_t num_shards) {
  std::vector<std::vector<FileTensor>> shards(num_shards);
  std::string map;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    shards[i % num_shards].push_back(tensors[i]);
    map += core::concat(map.empty() ? "\"" : ",\"", tensors[i].name, "\":\"part", i % num_shards,
                        ".safetensors\"");
  }
  directory.write("model.safetensors.index.json", "{\"weight_map\":{" + map + "}}");
  for (std::size_t i = 0; i < num_shards; ++i) {
    directory.write(core::concat("part", i, ".safetensors"), safetensors_file(shards[i]));
  }
}

class LoaderTest : public testing::Test {
 protected:
  Weights load(std::span<const FileTensor> tensors) const {
    directory_.write("model.safetensors", safetensors_file(tensors));
    return load_weights(directory_.path(), config_);
  }
  std::string load_error(std::span<const FileTensor> tensors) const {
    return error_of(directory_.path(), [&] { load(tensors); });
  }
  CheckpointTensors checkpoint(Spelling spelling) const { return {weights_, config_, spelling}; }

  TempDirectory directory_;
  Config config_ = test::small_config();
  Weights weights_ = test::random_weights(config_, DType::bf16, 5);
};

TEST_F(LoaderTest, BothSpellingsLoadToTheSameViewsInEveryDtype) {
  for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    SCOPED_TRACE(name_of(dtype));
    weights_ = test::random_weights(config_, dtype, 6);
    for (Spelling spelling : {Spelling::released, Spelling::transformers}) {
      CheckpointTensors tensors = checkpoint(spelling);
      const Weights loaded = load(tensors.tensors());
      expect_same(loaded, weights_);
      EXPECT_EQ(loaded.naming, spelling == Spelling::released ? "released" : "transformers");
      EXPECT_TRUE(loaded.unused.empty());
      EXPECT_EQ(loaded.num_parameters, num_elements(tensors.tensors()));
      EXPECT_EQ(loaded.num_bytes,
                loaded.num_parameters * static_cast<std::int64_t>(size_of(dtype)));
    }
  }
}

TEST_F(LoaderTest, PackedTensorsBecomeHalvesOfOne) {
  const Weights loaded = load(checkpoint(Spelling::transformers).tensors());
  const auto expect_halves = [](const model::MlpWeights& mlp) {
    EXPECT_EQ(test::bytes_of(mlp.gate).data() + test::bytes_of(mlp.gate).size(),
              test::bytes_of(mlp.up).data());
  };
  expect_halves(loaded.layers[0].mlp);
  expect_halves(loaded.layers[1].moe.shared);
  for (const model::MlpWeights& expert : loaded.layers[2].moe.experts) expect_halves(expert);
}

TEST_F(LoaderTest, SpellingsMayBeMixed) {
  // Attention, dense MLP and shared experts as released, routers and experts as transformers.
  std::vector<FileTensor> mixed;
  for (const FileTensor& tensor : checkpoint(Spelling::released).tensors()) {
    const bool of_moe = tensor.name.find("block_sparse_moe.") != std::string::npos &&
                        tensor.name.find("shared_experts") == std::string::npos;
    if (!of_moe) mixed.push_back(tensor);
  }
  for (const FileTensor& tensor : checkpoint(Spelling::transformers).tensors()) {
    if (tensor.name.find(".gate.") != std::string::npos ||
        tensor.name.find(".mlp.experts.") != std::string::npos) {
      mixed.push_back(tensor);
    }
  }
  const Weights loaded = load(mixed);
  expect_same(loaded, weights_);
  EXPECT_EQ(loaded.naming, "mixed");
  EXPECT_TRUE(loaded.unused.empty());
}

TEST_F(LoaderTest, AcceptsOtherPrefixes) {
  // In transformers' memory the multimodal model's text tensors are model.language_model.*.
  std::vector<FileTensor> tensors = checkpoint(Spelling::transformers).tensors();
  for (FileTensor& tensor : tensors) {
    if (tensor.name.starts_with("model.")) tensor.name.insert(6, "language_model.");
  }
  expect_same(load(tensors), weights_);
  for (FileTensor& tensor : tensors) {
    if (tensor.name.starts_with("model.")) tensor.name.erase(0, 21);  // as the bare text model
  }
  expect_same(load(tensors), weights_);
}

TEST_F(LoaderTest, ShardsLoadLikeOneFile) {
  const TempDirectory sharded;
  CheckpointTensors tensors = checkpoint(Spelling::released);
  write_shards(sharded, tensors.tensors(), 5);
  const Weights loaded = load_weights(sharded.path(), config_);
  expect_same(loaded, weights_);
  EXPECT_EQ(loaded.num_bytes, load(tensors.tensors()).num_bytes);
}

TEST_F(LoaderTest, MisalignedDataIsCopied) {
  CheckpointTensors tensors = checkpoint(Spelling::transformers);
  directory_.write("model.safetensors", safetensors_file(tensors.tensors(), 1));
  expect_same(load_weights(directory_.path(), config_), weights_);
}

TEST_F(LoaderTest, ViewsOutliveEverythingElse) {
  Weights loaded = load(checkpoint(Spelling::released).tensors());
  const Weights moved = std::move(loaded);
  std::filesystem::remove(directory_.path() / "model.safetensors");
  expect_same(moved, weights_);
}

TEST_F(LoaderTest, TiedEmbeddingsAreTheHead) {
  config_.tie_word_embeddings = true;
  weights_.lm_head = weights_.embed_tokens;
  const Weights loaded = load(checkpoint(Spelling::transformers).tensors());
  expect_same(loaded, weights_);
  EXPECT_EQ(loaded.lm_head.data, loaded.embed_tokens.data);
}

TEST_F(LoaderTest, ModelsWithoutASharedExpert) {
  config_.shared_intermediate_size = 0;
  weights_ = test::random_weights(config_, DType::bf16, 8);
  expect_same(load(checkpoint(Spelling::released).tensors()), weights_);
}

TEST_F(LoaderTest, IgnoresVisionAndMtpAndListsWhatIsUnused) {
  CheckpointTensors tensors = checkpoint(Spelling::released);
  for (const char* name :
       {"vision_tower.vision_model.pre_layrnorm.weight", "multi_modal_projector.linear_1.bias",
        "patch_merge_mlp.linear_2.weight", "model.mtp.layers.0.enorm.weight",
        "model.vision_tower.layers.0.mlp.fc1.weight"}) {
    tensors.tensors().push_back({name, "F64", {1}, "12345678"});
  }
  const std::string unused = "language_model.model.layers.0.self_attn.index_q_proj.weight";
  tensors.tensors().push_back({unused, "F64", {1}, "12345678"});
  const Weights loaded = load(tensors.tensors());
  expect_same(loaded, weights_);
  EXPECT_EQ(loaded.unused, std::vector<std::string>{unused});
}

TEST_F(LoaderTest, MissingTensorsAreNamedInBothSpellings) {
  const auto missing = [&](Spelling spelling, const char* name) {
    CheckpointTensors tensors = checkpoint(spelling);
    tensors.remove(name);
    return load_error(tensors.tensors());
  };
  EXPECT_EQ(missing(Spelling::transformers, "lm_head.weight"),
            "DIR: a tensor is missing: neither lm_head.weight nor language_model.lm_head.weight is "
            "there, expected shape [vocab_size=61, hidden=48]");
  EXPECT_EQ(missing(Spelling::released, "language_model.model.layers.2.self_attn.q_proj.weight"),
            "DIR: a tensor is missing: neither model.layers.2.self_attn.q_proj.weight nor "
            "language_model.model.layers.2.self_attn.q_proj.weight is there, expected shape "
            "[num_q_heads * head_dim=128, hidden=48]");
  const std::string index_k =
      "DIR: a tensor is missing: neither model.layers.1.self_attn.indexer.k_norm.weight nor "
      "language_model.model.layers.1.self_attn.index_k_norm.weight is there, expected shape "
      "[index_dim=16]";
  EXPECT_EQ(missing(Spelling::transformers, "model.layers.1.self_attn.indexer.k_norm.weight"),
            index_k);
  EXPECT_EQ(
      missing(Spelling::released, "language_model.model.layers.1.self_attn.index_k_norm.weight"),
      index_k);
  EXPECT_EQ(missing(Spelling::released,
                    "language_model.model.layers.1.block_sparse_moe.e_score_correction_bias"),
            "DIR: a tensor is missing: neither model.layers.1.mlp.gate.e_score_correction_bias nor "
            "language_model.model.layers.1.block_sparse_moe.e_score_correction_bias is there, "
            "expected shape [num_experts=6]");
  EXPECT_EQ(missing(Spelling::released,
                    "language_model.model.layers.1.block_sparse_moe.experts.5.w2.weight"),
            "DIR: a tensor is missing: neither model.layers.1.mlp.experts.down_proj nor "
            "language_model.model.layers.1.block_sparse_moe.experts.5.w2.weight is there, expected "
            "shape [hidden=48, intermediate=32]");
  EXPECT_EQ(missing(Spelling::transformers, "model.layers.0.mlp.gate_up_proj.weight"),
            "DIR: a tensor is missing: neither model.layers.0.mlp.gate_up_proj.weight nor "
            "language_model.model.layers.0.mlp.gate_proj.weight is there, expected shape "
            "[intermediate=80, hidden=48]");
  EXPECT_EQ(missing(Spelling::transformers, "model.layers.2.mlp.shared_experts.down_proj.weight"),
            "DIR: a tensor is missing: neither model.layers.2.mlp.shared_experts.down_proj.weight "
            "nor language_model.model.layers.2.block_sparse_moe.shared_experts.down_proj.weight is "
            "there, expected shape [hidden=48, intermediate=24]");
}

TEST_F(LoaderTest, WrongShapesAreNamedWithTheRightOnes) {
  CheckpointTensors packed = checkpoint(Spelling::transformers);
  packed.named("model.layers.1.mlp.experts.gate_up_proj").shape = {6, 48, 64};
  EXPECT_EQ(load_error(packed.tensors()),
            "DIR/model.safetensors: tensor model.layers.1.mlp.experts.gate_up_proj is bf16[6, 48, "
            "64], expected [num_experts=6, 2 * intermediate=64, hidden=48] in f32, f16 or bf16");
  CheckpointTensors flat = checkpoint(Spelling::released);
  flat.named("language_model.model.norm.weight").shape = {48, 1};
  EXPECT_EQ(load_error(flat.tensors()),
            "DIR/model.safetensors: tensor language_model.model.norm.weight is bf16[48, 1], "
            "expected [hidden=48] in f32, f16 or bf16");
}

TEST_F(LoaderTest, UnknownDtypesAndQuantisationAreRefused) {
  CheckpointTensors tensors = checkpoint(Spelling::released);
  const std::string name = "language_model.model.layers.0.self_attn.o_proj.weight";
  FileTensor& o_proj = tensors.named(name);
  o_proj.dtype = "F8_E4M3";
  o_proj.bytes.resize(o_proj.bytes.size() / 2);
  EXPECT_EQ(load_error(tensors.tensors()), "DIR/model.safetensors: tensor " + name +
                                               " has dtype F8_E4M3, expected F32, F16 or BF16");
  tensors.tensors().push_back({name + "_scale_inv", "U8", {1}, "x"});
  EXPECT_EQ(load_error(tensors.tensors()),
            "DIR/model.safetensors: tensor " + name +
                "_scale_inv belongs to a quantised checkpoint; only bf16, f16 and f32 weights are "
                "supported");
  CheckpointTensors integers = checkpoint(Spelling::released);
  integers.named("language_model.model.norm.weight").dtype = "I32";
  integers.named("language_model.model.norm.weight").bytes.resize(48 * 4);
  EXPECT_EQ(load_error(integers.tensors()),
            "DIR/model.safetensors: tensor language_model.model.norm.weight is i32[48], expected "
            "[hidden=48] in f32, f16 or bf16");
}

TEST_F(LoaderTest, OneTensorUnderTwoSpellingsIsRefused) {
  CheckpointTensors tensors = checkpoint(Spelling::released);
  FileTensor again = tensors.named("language_model.model.norm.weight");
  again.name = "model.norm.weight";
  tensors.tensors().push_back(again);
  EXPECT_EQ(load_error(tensors.tensors()),
            "DIR/model.safetensors: tensors language_model.model.norm.weight and model.norm.weight "
            "are the same tensor under two spellings");
}

TEST_F(LoaderTest, TruncatedFilesAreRefused) {
  CheckpointTensors tensors = checkpoint(Spelling::transformers);
  const std::string file = safetensors_file(tensors.tensors());
  directory_.write("model.safetensors", std::string_view(file).substr(0, file.size() - 1));
  const std::string text =
      error_of(directory_.path(), [&] { load_weights(directory_.path(), config_); });
  EXPECT_TRUE(text.starts_with("DIR/model.safetensors: model.layers.2.")) << text;
  EXPECT_TRUE(text.ends_with("bytes of data: the file is truncated or malformed")) << text;
}

/// The checkpoints that transformers and the fixtures' script wrote.
TEST(Fixtures, Load) {
  const std::map<std::string, std::string> naming = {{"group1_all_blocks", "transformers"},
                                                     {"group2_block16", "transformers"},
                                                     {"group4_released", "released"},
                                                     {"group8_block128", "transformers"}};
  for (const auto& [name, spelling] : naming) {
    SCOPED_TRACE(name);
    const std::filesystem::path directory =
        std::filesystem::path(MSA_SOURCE_DIR) / "tests/model/fixtures" / name;
    const Config config = model::load_config(directory);
    const Weights weights = load_weights(directory, config);
    EXPECT_EQ(weights.naming, spelling);
    EXPECT_TRUE(weights.unused.empty());
    EXPECT_EQ(weights.layers.size(), static_cast<std::size_t>(config.num_layers));
    std::int64_t elements = 0;
    model::TensorFiles files(directory);
    for (const auto& [tensor_name, tensor] : files.tensors()) {
      elements += files.view(tensor_name).num_elements();
    }
    EXPECT_EQ(weights.num_parameters, elements);
  }
}

}  // namespace
}  // namespace msa
