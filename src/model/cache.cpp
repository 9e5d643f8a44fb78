// SPDX-License-Identifier: Apache-2.0
#include "model/cache.hpp"

#include <sys/mman.h>

#include <numeric>
#include <utility>

#include "core/check.hpp"

namespace msa::model {

ReservedMemory::ReservedMemory(std::size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) {
    throw Error(ErrorCode::out_of_memory,
                core::concat("KV cache: the system refuses ", bytes,
                             " bytes of address space; ask for a shorter max_context"));
  }
  data_ = static_cast<std::byte*>(data);
}

ReservedMemory::~ReservedMemory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

ReservedMemory::ReservedMemory(ReservedMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

KvCache::KvCache(const Config& config, std::int64_t max_context, DType dtype, bool with_index)
    : block_size_(config.attention.block_size), max_context_(max_context), dtype_(dtype) {
  MSA_CHECK(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16,
            "KV cache: dtype is ", name_of(dtype), ", expected f32, f16 or bf16");
  const Problem& p = config.attention;
  const std::int64_t num_pages = (max_context + block_size_ - 1) / block_size_;
  page_ids_.resize(static_cast<std::size_t>(num_pages));
  std::iota(page_ids_.begin(), page_ids_.end(), 0);
  const auto add_pages = [&](std::int64_t heads, std::int64_t dim) {
    TensorView pages =
        TensorView::contiguous(nullptr, dtype, {}, {num_pages, heads, block_size_, dim});
    const std::size_t bytes = size_of(dtype) * static_cast<std::size_t>(pages.num_elements());
    pages.data = memory_.emplace_back(bytes).data();
    page_bytes_ += static_cast<std::int64_t>(size_of(dtype)) * heads * block_size_ * dim;
    return pages;
  };
  for (AttentionKind kind : config.attention_kinds) {
    Layer& layer = layers_.emplace_back();
    layer.k = add_pages(p.num_kv_heads, p.head_dim);
    layer.v = add_pages(p.num_kv_heads, p.head_dim);
    if (with_index && kind == AttentionKind::sparse) layer.index_k = add_pages(1, p.index_dim);
  }
}

void KvCache::set_length(std::int64_t length) {
  MSA_CHECK(length >= 0 && length <= max_context_, "KV cache: ", length,
            " tokens do not fit into max_context, ", max_context_);
  length_ = length;
  seq_len_ = static_cast<std::int32_t>(length);
}

TensorView KvCache::page_table() {
  return TensorView::contiguous(page_ids_.data(), DType::i32, {}, {1, num_blocks()});
}

TensorView KvCache::seq_lens_k() { return TensorView::contiguous(&seq_len_, DType::i32, {}, {1}); }

}  // namespace msa::model
