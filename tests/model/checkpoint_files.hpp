// SPDX-License-Identifier: Apache-2.0
//
// Checkpoint directories made by tests, well-formed or not.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "core/check.hpp"
#include "model/config.hpp"
#include "model/weights.hpp"
#include "msa/error.hpp"

namespace msa::test {

/// A new directory, removed with the object.
class TempDirectory {
 public:
  TempDirectory() : path_(testing::TempDir() + "msa_loader_XXXXXX") {
    if (mkdtemp(path_.data()) == nullptr) throw std::runtime_error("mkdtemp: " + path_);
  }
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;
  ~TempDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::filesystem::path path() const { return path_; }
  std::filesystem::path write(const std::string& name, std::string_view text) const {
    std::ofstream(path() / name, std::ios::binary) << text;
    return path() / name;
  }

 private:
  std::string path_;
};

/// The message of the Error that `action` throws, with `directory` written as DIR; fails the test
/// where there is none.
template <class Action>
std::string error_of(const std::filesystem::path& directory, Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    std::string text = error.what();
    const std::string path = directory.string();
    for (std::size_t at = text.find(path); !path.empty() && at != std::string::npos;
         at = text.find(path)) {
      text.replace(at, path.size(), "DIR");
    }
    return text;
  }
  ADD_FAILURE() << "no error";
  return {};
}

/// A tensor of a safetensors file.
struct FileTensor {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::string bytes;
};

/// 8 bytes of length, little endian, then `header`, then `data`.
inline std::string safetensors_file(std::string_view header, std::string_view data = "") {
  std::string file;
  for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> (8 * i) & 0xff);
  file += header;
  file += data;
  return file;
}

/// A well-formed file; spaces pad its header until the data begins at a multiple of 8 plus
/// `data_shift` bytes.
inline std::string safetensors_file(std::span<const FileTensor> tensors,
                                    std::size_t data_shift = 0) {
  std::string header = R"({"__metadata__":{"format":"pt"})";
  std::string data;
  for (const FileTensor& tensor : tensors) {
    std::string shape;
    for (std::int64_t size : tensor.shape) {
      shape += core::concat(shape.empty() ? "" : ",", size);
    }
    header += core::concat(",\"", tensor.name, R"(":{"dtype":")", tensor.dtype, R"(","shape":[)",
                           shape, R"(],"data_offsets":[)", data.size(), ",",
                           data.size() + tensor.bytes.size(), "]}");
    data += tensor.bytes;
  }
  header += "}";
  while (header.size() % 8 != data_shift) header += " ";
  return safetensors_file(header, data);
}

/// `text` with one to three of its first `num_bytes` bytes replaced, inserted before or erased,
/// mostly with characters that mean something in JSON.
inline std::string changed(std::string text, std::mt19937& random,
                           std::size_t num_bytes = std::string::npos) {
  constexpr std::string_view kLikely = "0123456789-,:\"[]{}eE.\\ \xff";
  for (auto changes = 1 + random() % 3; changes > 0 && !text.empty(); --changes) {
    const std::size_t at = random() % std::min(num_bytes, text.size());
    const char byte =
        random() % 4 == 0 ? static_cast<char>(random() & 0xff) : kLikely[random() % kLikely.size()];
    switch (random() % 3) {
      case 0:
        text[at] = byte;
        break;
      case 1:
        text.insert(at, 1, byte);
        break;
      default:
        text.erase(at, 1);
    }
  }
  return text;
}

inline std::string_view bytes_of(const TensorView& contiguous) {
  return {static_cast<const char*>(contiguous.data),
          static_cast<std::size_t>(contiguous.num_elements()) * size_of(contiguous.dtype)};
}

inline FileTensor file_tensor(const std::string& name, const TensorView& view) {
  FileTensor tensor{.name = name,
                    .dtype = view.dtype == DType::f32   ? "F32"
                             : view.dtype == DType::f16 ? "F16"
                                                        : "BF16",
                    .shape = {},
                    .bytes = std::string(bytes_of(view))};
  for (int axis = 0; axis < view.rank; ++axis) {
    tensor.shape.push_back(view.shape[static_cast<std::size_t>(axis)]);
  }
  return tensor;
}

/// Several tensors of one shape as one: along a new first axis, or along the first axis.
inline FileTensor joined(const std::string& name, std::span<const FileTensor> parts, bool stack) {
  FileTensor whole = parts[0];
  whole.name = name;
  for (const FileTensor& part : parts.subspan(1)) whole.bytes += part.bytes;
  const auto count = static_cast<std::int64_t>(parts.size());
  if (stack) {
    whole.shape.insert(whole.shape.begin(), count);
  } else {
    whole.shape[0] *= count;
  }
  return whole;
}

enum class Spelling : std::uint8_t { released, transformers };

/// The tensors of a model as a checkpoint of the given spelling names and packs them.
class CheckpointTensors {
 public:
  CheckpointTensors(const model::Weights& weights, const model::Config& config, Spelling spelling)
      : is_released_(spelling == Spelling::released) {
    const std::string top = is_released_ ? "language_model." : "";
    const std::string model = top + "model.";
    add(model + "embed_tokens.weight", weights.embed_tokens);
    add(model + "norm.weight", weights.final_norm);
    if (!config.tie_word_embeddings) add(top + "lm_head.weight", weights.lm_head);
    for (std::size_t i = 0; i < weights.layers.size(); ++i) {
      add_layer(core::concat(model, "layers.", i, "."), weights.layers[i]);
    }
  }

  std::vector<FileTensor>& tensors() & { return tensors_; }
  std::vector<FileTensor> tensors() && { return std::move(tensors_); }
  FileTensor& named(std::string_view name) {
    for (FileTensor& tensor : tensors_) {
      if (tensor.name == name) return tensor;
    }
    throw std::out_of_range("no tensor " + std::string(name));
  }
  void remove(std::string_view name) {
    std::erase_if(tensors_, [&](const FileTensor& tensor) { return tensor.name == name; });
  }

 private:
  void add(const std::string& name, const TensorView& view) {
    tensors_.push_back(file_tensor(name, view));
  }

  void add_mlp(const std::string& prefix, const model::MlpWeights& mlp) {
    if (is_released_) {
      add(prefix + "gate_proj.weight", mlp.gate);
      add(prefix + "up_proj.weight", mlp.up);
    } else {
      const std::array parts = {file_tensor("", mlp.gate), file_tensor("", mlp.up)};
      tensors_.push_back(joined(prefix + "gate_up_proj.weight", parts, false));
    }
    add(prefix + "down_proj.weight", mlp.down);
  }

  void add_experts(const std::string& prefix, const std::vector<model::MlpWeights>& experts) {
    std::vector<FileTensor> gate_up;
    std::vector<FileTensor> down;
    for (std::size_t i = 0; i < experts.size(); ++i) {
      const std::string expert = core::concat(prefix, i, ".");
      if (is_released_) {
        add(expert + "w1.weight", experts[i].gate);
        add(expert + "w3.weight", experts[i].up);
        add(expert + "w2.weight", experts[i].down);
      } else {
        const std::array parts = {file_tensor("", experts[i].gate), file_tensor("", experts[i].up)};
        gate_up.push_back(joined("", parts, false));
        down.push_back(file_tensor("", experts[i].down));
      }
    }
    if (is_released_) return;
    tensors_.push_back(joined(prefix + "gate_up_proj", gate_up, true));
    tensors_.push_back(joined(prefix + "down_proj", down, true));
  }

  void add_layer(const std::string& layer, const model::LayerWeights& w) {
    add(layer + "input_layernorm.weight", w.input_norm);
    add(layer + "post_attention_layernorm.weight", w.post_attention_norm);
    const std::string attention = layer + "self_attn.";
    add(attention + "q_proj.weight", w.q_proj);
    add(attention + "k_proj.weight", w.k_proj);
    add(attention + "v_proj.weight", w.v_proj);
    add(attention + "o_proj.weight", w.o_proj);
    add(attention + "q_norm.weight", w.q_norm);
    add(attention + "k_norm.weight", w.k_norm);
    if (w.index_q_proj.given()) {
      const std::string index = attention + (is_released_ ? "index_" : "indexer.");
      add(index + "q_proj.weight", w.index_q_proj);
      add(index + "k_proj.weight", w.index_k_proj);
      add(index + "q_norm.weight", w.index_q_norm);
      add(index + "k_norm.weight", w.index_k_norm);
    }
    if (!w.moe.router.given()) return add_mlp(layer + "mlp.", w.mlp);
    const std::string moe = layer + (is_released_ ? "block_sparse_moe." : "mlp.");
    add(moe + "gate.weight", w.moe.router);
    add(moe + (is_released_ ? "" : "gate.") + "e_score_correction_bias",
        w.moe.score_correction_bias);
    add_experts(moe + "experts.", w.moe.experts);
    if (w.moe.shared.gate.given()) add_mlp(moe + "shared_experts.", w.moe.shared);
  }

  bool is_released_;
  std::vector<FileTensor> tensors_;
};

}  // namespace msa::test
