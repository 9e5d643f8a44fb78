// SPDX-License-Identifier: Apache-2.0
//
// Where keys and values lie, ragged or paged.
#pragma once

#include <cuda_runtime_api.h>

#include <bit>
#include <cstddef>
#include <cstdint>

#include "cuda/common/batch.cuh"
#include "cuda/common/tile.cuh"

namespace msa::cuda {

/// Keys, values or index keys as kernels get them. Strides are in bytes.
struct KeyRows {
  const std::byte* data;
  std::int64_t page_stride;  ///< 0: ragged
  std::int64_t head_stride;
  std::int64_t token_stride;
  int block_shift;  ///< log2 of block_size
  Load load;
};

inline KeyRows make_key_rows(const TensorView& keys, const Batch& batch, int block_size) {
  const auto size = static_cast<std::int64_t>(size_of(keys.dtype));
  const bool paged = core::is_paged(batch);
  return {.data = static_cast<const std::byte*>(keys.data),
          .page_stride = paged ? keys.stride[0] * size : 0,
          .head_stride = keys.stride[1] * size,
          .token_stride = (paged ? keys.stride[2] : keys.stride[0]) * size,
          .block_shift = std::countr_zero(static_cast<unsigned>(block_size)),
          .load = load_of(keys)};
}

/// Whether block `block` of a sequence is anywhere: its page id may be out of range.
__device__ __forceinline__ bool exists(const DeviceBatch& batch, const DeviceSequence& sequence,
                                       std::int64_t block) {
  return batch.page_table == nullptr || page_of(batch, sequence.batch_idx, block) >= 0;
}

/// Token `token` of a sequence, null where its page does not exist.
__device__ __forceinline__ const std::byte* token_address(const DeviceBatch& batch,
                                                          const DeviceSequence& sequence,
                                                          const KeyRows& keys, int head,
                                                          std::int64_t token) {
  const std::byte* const rows = keys.data + head * keys.head_stride;
  if (batch.page_table == nullptr) return rows + (sequence.k_begin + token) * keys.token_stride;
  const std::int64_t page = page_of(batch, sequence.batch_idx, token >> keys.block_shift);
  if (page < 0) return nullptr;
  return rows + page * keys.page_stride + (token & (batch.block_size - 1)) * keys.token_stride;
}

/// The keys that query `row` (packed) of a sequence sees: 0 to the result - 1.
__device__ __forceinline__ std::int64_t num_visible_keys(const DeviceSequence& sequence,
                                                         std::int64_t row) {
  return msa::cuda::detail::clamp(sequence.position(row - sequence.q_begin) + 1, 0, sequence.k_len);
}

/// Calls visit(sequence, begin, end) for the packed queries [begin, end) that each sequence has of
/// [first, last). The same for all threads of a CTA.
template <class Visit>
__device__ __forceinline__ void for_each_sequence(const DeviceBatch& batch, std::int64_t first,
                                                  std::int64_t last, Visit visit) {
  while (first < last) {
    const DeviceSequence sequence = sequence_of_query(batch, first);
    const std::int64_t end = min(last, sequence.q_begin + sequence.q_len);
    if (end <= first) return;  // offsets that are no offsets
    visit(sequence, first, end);
    first = end;
  }
}

/// Queries that share a tile of kRows rows with `heads` heads each: as many as fit, but not more
/// than a sequence has on average, or a tile of decode would walk many sequences one by one.
inline int tokens_per_tile(int rows, int heads, std::int64_t total_q, std::int64_t batch_size) {
  std::int64_t tokens = rows / heads;
  const std::int64_t average = batch_size == 0 ? 1 : (total_q + batch_size - 1) / batch_size;
  if (average < tokens) tokens = average;
  return static_cast<int>(tokens > 0 ? tokens : 1);
}

}  // namespace msa::cuda
