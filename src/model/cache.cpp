// SPDX-License-Identifier: Apache-2.0
#include "model/cache.hpp"

#include <sys/mman.h>

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
    : dtype_(dtype),
      pages_((max_context + config.attention.block_size - 1) / config.attention.block_size,
             config.attention.block_size),
      sequence_(pages_.create()),
      page_ids_(DType::i32, {pages_.num_pages()}),
      seq_lens_k_(DType::i32, {1}) {
  MSA_CHECK(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16,
            "KV cache: dtype is ", name_of(dtype), ", expected f32, f16 or bf16");
  const Problem& p = config.attention;
  const auto add_pages = [&](std::int64_t heads, std::int64_t dim) {
    TensorView pages =
        TensorView::contiguous(nullptr, dtype, {}, {pages_.num_pages(), heads, p.block_size, dim});
    const std::size_t bytes = size_of(dtype) * static_cast<std::size_t>(pages.num_elements());
    pages.data = memory_.emplace_back(bytes).data();
    page_bytes_ += static_cast<std::int64_t>(size_of(dtype)) * heads * p.block_size * dim;
    return pages;
  };
  for (AttentionKind kind : config.attention_kinds) {
    Layer& layer = layers_.emplace_back();
    layer.k = add_pages(p.num_kv_heads, p.head_dim);
    layer.v = add_pages(p.num_kv_heads, p.head_dim);
    if (with_index && kind == AttentionKind::sparse) layer.index_k = add_pages(1, p.index_dim);
  }
}

std::int64_t KvCache::table_bytes(const Config& config, std::int64_t max_context) {
  const std::int64_t block_size = config.attention.block_size;
  return 20 * ((max_context + block_size - 1) / block_size);
}

void KvCache::set_length(std::int64_t length) {
  if (length < pages_.length(sequence_)) pages_.truncate(sequence_, length);
  pages_.append(sequence_, length - pages_.length(sequence_));
  page_table_ =
      TensorView::contiguous(page_ids_.data<std::int32_t>(), DType::i32, {}, {1, num_blocks()});
  pages_.fill({&sequence_, 1}, page_table_, seq_lens_k_);
}

}  // namespace msa::model
