// SPDX-License-Identifier: Apache-2.0
#include "core/sequences.hpp"

#include "core/check.hpp"

namespace msa::core {
namespace {

void check_offsets(const char* operation, const char* name, const TensorView& offsets,
                   std::int64_t total) {
  std::int64_t previous = 0;
  for (std::int64_t i = 0; i < offsets.shape[0]; ++i) {
    const std::int64_t value = load_i32(offsets, i);
    MSA_CHECK(i != 0 || value == 0, operation, ": ", name, "[0] is ", value, ", expected 0");
    MSA_CHECK(value >= previous, operation, ": ", name, "[", i, "] is ", value,
              ", smaller than the ", previous, " before it");
    previous = value;
  }
  MSA_CHECK(previous == total, operation, ": ", name, " ends with ", previous,
            " but the packed tensor has ", total, " tokens");
}

}  // namespace

Sequences::Sequences(const char* operation, const Batch& batch, std::int64_t total_q,
                     std::int64_t total_k, std::int64_t max_seq_len_k)
    : batch_(batch), size_(batch_size(batch)), total_q_(total_q), total_k_(total_k) {
  if (batch.cu_seqlens_q.given()) {
    check_offsets(operation, "cu_seqlens_q", batch.cu_seqlens_q, total_q);
  }
  if (batch.cu_seqlens_k.given()) {
    // SelectTopK reads no keys, so its offsets need not end anywhere in particular.
    const std::int64_t end = total_k != 0 ? total_k : load_i32(batch.cu_seqlens_k, size_);
    check_offsets(operation, "cu_seqlens_k", batch.cu_seqlens_k, end);
  }
  for (std::int64_t b = 0; b < size_; ++b) {
    const Sequence sequence = (*this)[b];
    MSA_CHECK(sequence.k_len >= 0 && sequence.k_len <= max_seq_len_k, operation, ": sequence ", b,
              " has ", sequence.k_len, " keys, expected 0 to ", max_seq_len_k,
              " (page_table columns or max_seq_len_k)");
  }
}

std::int64_t Sequences::q_begin(std::int64_t b) const {
  if (batch_.cu_seqlens_q.given()) return load_i32(batch_.cu_seqlens_q, b);
  return b * (total_q_ / std::max<std::int64_t>(size_, 1));
}

Sequence Sequences::operator[](std::int64_t b) const {
  Sequence sequence{.batch_idx = b, .q_begin = q_begin(b)};
  sequence.q_len = q_begin(b + 1) - sequence.q_begin;
  if (batch_.seq_lens_k.given()) {
    sequence.k_len = load_i32(batch_.seq_lens_k, b);
  } else if (batch_.cu_seqlens_k.given()) {
    sequence.k_begin = load_i32(batch_.cu_seqlens_k, b);
    sequence.k_len = load_i32(batch_.cu_seqlens_k, b + 1) - sequence.k_begin;
  } else {
    sequence.k_len = total_k_;
  }
  return sequence;
}

Sequence Sequences::of_query(std::int64_t row) const {
  std::int64_t low = 0;
  std::int64_t high = size_;
  while (high - low > 1) {  // q_begin(low) <= row; the last such sequence is the non-empty one
    const std::int64_t middle = (low + high) / 2;
    (q_begin(middle) <= row ? low : high) = middle;
  }
  return (*this)[low];
}

}  // namespace msa::core
