// SPDX-License-Identifier: Apache-2.0
//
// core/sequences.hpp for device tensors: where each sequence lies in the packed tensors and where
// each KV block lies in memory. Offsets and lengths can't be checked before the launch, so every
// value read here is clamped: a wrong one gives a wrong result, never an access out of bounds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/sequences.hpp"

namespace msa::cuda {

/// A Batch as kernels get it, by value. Strides are in elements.
struct DeviceBatch {
  const std::int32_t* cu_seqlens_q;  ///< [batch_size + 1] or null: equal shares of total_q
  const std::int32_t* cu_seqlens_k;  ///< [batch_size + 1] or null: paged, or one sequence
  const std::int32_t* page_table;    ///< [batch_size][max_pages] or null: ragged
  const std::int32_t* seq_lens_k;    ///< [batch_size] or null
  std::int64_t cu_seqlens_q_stride;
  std::int64_t cu_seqlens_k_stride;
  std::int64_t page_table_stride;        ///< between sequences
  std::int64_t page_table_entry_stride;  ///< between pages of a sequence
  std::int64_t seq_lens_k_stride;
  std::int64_t batch_size;
  std::int64_t total_q;
  std::int64_t equal_q_len;    ///< total_q / batch_size: of each sequence without cu_seqlens_q
  std::int64_t total_k;        ///< ragged: packed keys
  std::int64_t num_pages;      ///< paged: pages there are
  std::int64_t max_seq_len_k;  ///< of any sequence, from shapes and the caller's hint
  int block_size;
};

/// One sequence; as core::Sequence.
struct DeviceSequence {
  std::int64_t batch_idx;
  std::int64_t q_begin;  ///< first packed query
  std::int64_t q_len;    ///< tokens
  std::int64_t k_begin;  ///< first packed key; 0 when paged
  std::int64_t k_len;    ///< tokens, those of this call included

  /// Position of query i of the sequence among its keys; negative: sees nothing.
  __device__ std::int64_t position(std::int64_t i) const { return k_len - q_len + i; }
};

/// SelectTopK has no keys: total_k and num_pages are then unlimited.
template <class Args>
DeviceBatch make_device_batch(const Args& args) {
  const Batch& batch = args.batch;
  const auto ids = [](const TensorView& view) {
    return static_cast<const std::int32_t*>(view.given() ? view.data : nullptr);
  };
  const TensorView keys = core::key_tensor(args);
  const bool paged = batch.page_table.given();
  DeviceBatch device{};
  device.cu_seqlens_q = ids(batch.cu_seqlens_q);
  device.cu_seqlens_k = ids(batch.cu_seqlens_k);
  device.page_table = ids(batch.page_table);
  device.seq_lens_k = ids(batch.seq_lens_k);
  device.cu_seqlens_q_stride = batch.cu_seqlens_q.stride[0];
  device.cu_seqlens_k_stride = batch.cu_seqlens_k.stride[0];
  device.page_table_stride = batch.page_table.stride[0];
  device.page_table_entry_stride = batch.page_table.stride[1];
  device.seq_lens_k_stride = batch.seq_lens_k.stride[0];
  device.batch_size = core::batch_size(batch);
  device.total_q = core::total_q(args);
  device.equal_q_len = device.batch_size == 0 ? 0 : device.total_q / device.batch_size;
  device.max_seq_len_k = core::max_seq_len_k(args);
  device.total_k = keys.given() && !paged ? keys.shape[0] : INT64_MAX;
  device.num_pages = keys.given() && paged ? keys.shape[0] : INT64_MAX;
  device.block_size = args.problem.block_size;
  return device;
}

namespace detail {

__device__ __forceinline__ std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return x < low ? low : x > high ? high : x;
}

/// First packed query of sequence b in [0, batch_size].
__device__ __forceinline__ std::int64_t q_begin(const DeviceBatch& batch, std::int64_t b) {
  if (batch.cu_seqlens_q == nullptr) return batch.equal_q_len * b;
  return clamp(batch.cu_seqlens_q[b * batch.cu_seqlens_q_stride], 0, batch.total_q);
}

}  // namespace detail

/// Sequence b in [0, batch_size).
__device__ __forceinline__ DeviceSequence sequence_at(const DeviceBatch& batch, std::int64_t b) {
  DeviceSequence sequence;
  sequence.batch_idx = b;
  sequence.q_begin = detail::q_begin(batch, b);
  sequence.q_len =
      detail::clamp(detail::q_begin(batch, b + 1) - sequence.q_begin, 0, batch.total_q);
  sequence.k_begin = 0;
  if (batch.seq_lens_k != nullptr) {
    sequence.k_len =
        detail::clamp(batch.seq_lens_k[b * batch.seq_lens_k_stride], 0, batch.max_seq_len_k);
  } else if (batch.cu_seqlens_k != nullptr) {
    const std::int32_t* const at = batch.cu_seqlens_k + b * batch.cu_seqlens_k_stride;
    sequence.k_begin = detail::clamp(at[0], 0, batch.total_k);
    sequence.k_len = detail::clamp(at[batch.cu_seqlens_k_stride] - sequence.k_begin, 0,
                                   batch.total_k - sequence.k_begin);
  } else {
    sequence.k_len = batch.total_k;
  }
  return sequence;
}

/// The sequence that holds packed query `row` in [0, total_q), by bisection.
__device__ __forceinline__ DeviceSequence sequence_of_query(const DeviceBatch& batch,
                                                            std::int64_t row) {
  if (batch.cu_seqlens_q == nullptr) {
    // A division of 64 bits takes a quarter of a microsecond, which is seen in decode.
    const bool narrow = batch.total_q <= INT32_MAX;
    return sequence_at(batch, narrow ? static_cast<std::uint32_t>(row) /
                                           static_cast<std::uint32_t>(batch.equal_q_len)
                                     : row / batch.equal_q_len);
  }
  std::int64_t low = 0;
  std::int64_t high = batch.batch_size;  // q_begin(low) <= row < q_begin(high)
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (detail::q_begin(batch, middle) <= row ? low : high) = middle;
  }
  return sequence_at(batch, low);
}

/// The page of block `block` of sequence b; -1 where its id is out of range.
__device__ __forceinline__ std::int64_t page_of(const DeviceBatch& batch, std::int64_t b,
                                                std::int64_t block) {
  const std::int64_t page =
      batch.page_table[b * batch.page_table_stride + block * batch.page_table_entry_stride];
  return page >= 0 && page < batch.num_pages ? page : -1;
}

}  // namespace msa::cuda
