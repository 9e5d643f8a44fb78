// SPDX-License-Identifier: Apache-2.0
//
// Where each sequence of a batch lies in the packed tensors, and where each KV block lies in
// memory. For host tensors.
#pragma once

#include <algorithm>

#include "core/operation.hpp"
#include "core/scalar.hpp"

namespace msa::core {

struct Sequence {
  std::int64_t batch_idx = 0;
  std::int64_t q_begin = 0;  ///< first packed query
  std::int64_t q_len = 0;    ///< tokens
  std::int64_t k_begin = 0;  ///< first packed key; 0 when paged
  std::int64_t k_len = 0;    ///< tokens, those of this call included

  /// Position of query i among the keys; negative: sees nothing.
  std::int64_t position(std::int64_t i) const { return k_len - q_len + i; }
};

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr bool is_paged(const Batch& batch) { return batch.page_table.given(); }

/// From shapes alone.
constexpr std::int64_t batch_size(const Batch& batch) {
  if (batch.seq_lens_k.given()) return batch.seq_lens_k.shape[0];
  if (batch.cu_seqlens_k.given()) return batch.cu_seqlens_k.shape[0] - 1;
  return 1;
}

/// An upper bound of any sequence's key count, from shapes and the caller's hint; SelectTopK has no
/// keys and gets what its score columns can hold.
template <class Args>
std::int64_t max_seq_len_k(const Args& args) {
  std::int64_t bound = 0;
  const auto tokens_of = [&](std::int64_t num_blocks) {  // lengths are i32, ids of blocks too
    return std::min<std::int64_t>(num_blocks, INT32_MAX) * args.problem.block_size;
  };
  if constexpr (requires {
                  args.block_scores;
                  args.block_ids;
                }) {
    bound = tokens_of(args.block_scores.shape[2]);
  } else {
    bound = is_paged(args.batch) ? tokens_of(args.batch.page_table.shape[1])
                                 : key_tensor(args).shape[0];
  }
  return args.batch.max_seq_len_k > 0 ? std::min(bound, args.batch.max_seq_len_k) : bound;
}

/// The sequences of a validated request on host tensors. Construction reads and checks the offsets
/// and lengths (Error(invalid_argument) with their values), so that no kernel has to.
class Sequences {
 public:
  template <class Args>
  explicit Sequences(const Args& args)
      : Sequences(operation_name(args), args.batch, total_q(args), key_tensor(args).shape[0],
                  max_seq_len_k(args)) {}

  std::int64_t size() const { return size_; }
  Sequence operator[](std::int64_t b) const;
  /// The sequence that holds packed query `row`, by bisection.
  Sequence of_query(std::int64_t row) const;

 private:
  Sequences(const char* operation, const Batch& batch, std::int64_t total_q, std::int64_t total_k,
            std::int64_t max_seq_len_k);
  std::int64_t q_begin(std::int64_t b) const;

  Batch batch_;
  std::int64_t size_ = 0;
  std::int64_t total_q_ = 0;
  std::int64_t total_k_ = 0;
};

/// The rows of one KV block for one head. A block never straddles pages, so its tokens are
/// equidistant whether the cache is ragged or paged.
struct BlockRows {
  std::int64_t offset = 0;        ///< elements from view.data to the first token of the block
  std::int64_t token_stride = 0;  ///< elements
  std::int64_t num_tokens = 0;    ///< existing tokens, before causality; 0: page id out of range
};

/// The stride of an axis of one element is never taken and may be any number (tensors from outside
/// hold such), so kernels that ask for rows ahead get 0 instead.
inline std::int64_t taken_stride(const TensorView& view, std::size_t axis) {
  return view.shape[axis] > 1 ? view.stride[axis] : 0;
}

/// `keys` is [total_k, heads, dim] or [num_pages, heads, block_size, dim]; `block` is
/// sequence-relative and must lie below ceil(k_len / block_size).
inline BlockRows block_rows(const TensorView& keys, const Batch& batch, std::int64_t block_size,
                            const Sequence& sequence, std::int64_t head, std::int64_t block) {
  const std::int64_t num_tokens = std::min(block_size, sequence.k_len - block * block_size);
  if (!is_paged(batch)) {
    return {.offset = offset_of(keys, sequence.k_begin + block * block_size, head),
            .token_stride = taken_stride(keys, 0),
            .num_tokens = num_tokens};
  }
  const std::int64_t page = load_i32(batch.page_table, sequence.batch_idx, block);
  if (page < 0 || page >= keys.shape[0]) return {};
  return {.offset = offset_of(keys, page, head),
          .token_stride = taken_stride(keys, 2),
          .num_tokens = num_tokens};
}

}  // namespace msa::core
