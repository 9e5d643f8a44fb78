// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/tensor.hpp"
#include "model/config.hpp"
#include "msa/kv_cache.hpp"
#include "msa/tensor.hpp"

namespace msa::model {

/// Zeroed address space whose memory the system provides as it is first written.
class ReservedMemory {
 public:
  explicit ReservedMemory(std::size_t bytes);
  ~ReservedMemory();
  ReservedMemory(ReservedMemory&& other) noexcept;
  ReservedMemory& operator=(ReservedMemory&&) = delete;

  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Pages of K, V and index K of every layer for one sequence. A page holds one block, and a block
/// has the same page id in every layer. Address space is reserved for the whole context; memory is
/// used page by page.
class KvCache {
 public:
  /// `with_index`: sparse layers store index keys (not needed where every layer runs dense).
  KvCache(const Config& config, std::int64_t max_context, DType dtype, bool with_index);

  /// Memory of its bookkeeping, beside the pages: 4 bytes per page of page_ids_ and up to 16 in
  /// PagedKvCache, whose list of the sequence's pages grows by doubling.
  static std::int64_t table_bytes(const Config& config, std::int64_t max_context);

  /// Makes the sequence `length` tokens long; its new positions hold anything until appended to.
  void set_length(std::int64_t length);

  std::int64_t length() const { return pages_.length(sequence_); }
  DType dtype() const { return dtype_; }
  std::int64_t num_blocks() const {
    return static_cast<std::int64_t>(pages_.pages(sequence_).size());
  }
  /// Bytes of the pages in use.
  std::int64_t bytes_in_use() const { return num_blocks() * page_bytes_; }

  const TensorView& k_pages(std::int64_t layer) const { return at(layer).k; }
  const TensorView& v_pages(std::int64_t layer) const { return at(layer).v; }
  const TensorView& index_k_pages(std::int64_t layer) const { return at(layer).index_k; }
  /// i32 [1, num_blocks()]
  TensorView page_table() const { return page_table_; }
  /// i32 [1]
  TensorView seq_lens_k() const { return seq_lens_k_.view(); }

 private:
  struct Layer {
    TensorView k{};        // [num_pages, num_kv_heads, block_size, head_dim]
    TensorView v{};        // like k
    TensorView index_k{};  // [num_pages, 1, block_size, index_dim]; sparse layers only
  };
  const Layer& at(std::int64_t layer) const { return layers_[static_cast<std::size_t>(layer)]; }

  DType dtype_ = DType::f32;
  std::int64_t page_bytes_ = 0;  // one page of everything
  PagedKvCache pages_;
  std::int64_t sequence_ = 0;
  core::Tensor page_ids_;    // i32 [max pages]
  core::Tensor seq_lens_k_;  // i32 [1]
  TensorView page_table_{};  // the pages in use
  std::vector<ReservedMemory> memory_;
  std::vector<Layer> layers_;
};

}  // namespace msa::model
