// SPDX-License-Identifier: Apache-2.0
//
// The safetensors format: 8 bytes of header length (little endian), a JSON header that names each
// tensor's dtype, shape and byte range, then the data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "msa/tensor.hpp"

namespace msa::model {

/// One tensor of a file, checked: its bytes lie inside the file and are as many as dtype and shape
/// say.
struct StoredTensor {
  std::string dtype;  ///< as written: "BF16", "F32", "F8_E4M3", ...
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;
  std::string file;  ///< for messages
};

/// Checks a whole file in memory. Throws Error(invalid_argument) naming file, tensor and numbers
/// for anything malformed, truncated, overlapping or of an unknown dtype.
std::map<std::string, StoredTensor> parse_safetensors(std::span<const std::byte> file,
                                                      const std::string& name);

/// The tensors of a checkpoint directory, in memory-mapped files.
class TensorFiles {
 public:
  /// model.safetensors, or else the shards that model.safetensors.index.json lists.
  explicit TensorFiles(const std::filesystem::path& directory);

  const std::map<std::string, StoredTensor>& tensors() const { return tensors_; }

  /// A contiguous view. Throws Error naming the tensor for a dtype other than f32, f16, bf16 or
  /// i32. Data that is not aligned for its dtype is copied once.
  TensorView view(const std::string& name);

  /// What keeps the views alive.
  const std::vector<std::shared_ptr<const void>>& maps() const { return maps_; }

 private:
  void add_file(const std::filesystem::path& file);

  std::map<std::string, StoredTensor> tensors_;
  std::vector<std::shared_ptr<const void>> maps_;
};

}  // namespace msa::model
