// SPDX-License-Identifier: Apache-2.0
//
// Which queries attend which KV block, on the device: block_ids give the blocks of a query, the
// backward operations also need the queries of a block. Ragged keys only.
//
// Blocks are numbered by bins: those of a sequence are neighbours, and its first one follows from
// its own offset alone, so no sums over sequences are needed. Bins between two sequences are empty.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "core/check.hpp"
#include "core/workspace.hpp"
#include "cuda/common/batch.cuh"
#include "cuda/common/keys.cuh"
#include "cuda/common/support.hpp"

namespace msa::cuda {

__device__ __forceinline__ std::int64_t first_bin(const DeviceBatch& batch,
                                                  const DeviceSequence& sequence) {
  return sequence.k_begin / batch.block_size + sequence.batch_idx;
}

/// A KV block of a sequence.
struct KeyBlock {
  DeviceSequence sequence;
  std::int64_t block;
  bool exists;  ///< the bin has a block, which has at least one token

  /// The packed key that is its first token.
  __device__ __forceinline__ std::int64_t first_key(int block_size) const {
    return sequence.k_begin + block * block_size;
  }
  /// Of an existing block, 1 .. block_size.
  __device__ __forceinline__ int num_tokens(int block_size) const {
    return static_cast<int>(min(std::int64_t{block_size}, sequence.k_len - block * block_size));
  }
  /// Tokens of an existing block that packed query `row` sees, 0 .. num_tokens.
  __device__ __forceinline__ int limit(int block_size, std::int64_t row) const {
    const std::int64_t position = sequence.position(row - sequence.q_begin);
    return static_cast<int>(
        detail::clamp(position + 1 - block * block_size, 0, num_tokens(block_size)));
  }
};

__device__ __forceinline__ KeyBlock key_block_of_bin(const DeviceBatch& batch, std::int64_t bin) {
  std::int64_t low = 0;  // the last sequence whose first bin is not behind
  std::int64_t high = batch.batch_size;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (first_bin(batch, sequence_at(batch, middle)) <= bin ? low : high) = middle;
  }
  KeyBlock key_block{};
  if (batch.batch_size == 0) return key_block;
  key_block.sequence = sequence_at(batch, low);
  key_block.block = bin - first_bin(batch, key_block.sequence);
  key_block.exists =
      key_block.block >= 0 && key_block.block * batch.block_size < key_block.sequence.k_len;
  return key_block;
}

/// The queries of every (KV head, bin), as kernels get them, by value.
struct QueryLists {
  const std::int32_t* rows;    ///< [num_kv_heads][rows_per_head] packed queries, or null: dense
                               ///< support, every query that sees any token of the block
  const std::int32_t* begins;  ///< [num_kv_heads][num_bins + 1], into a head's rows; null: dense
  std::int64_t rows_per_head;
  std::int64_t num_bins;
};

/// Packed queries, ascending.
struct QueryList {
  const std::int32_t* rows;  ///< or null: first, first + 1, ...
  std::int64_t first;
  std::int64_t count;

  __device__ __forceinline__ std::int64_t operator[](std::int64_t i) const {
    return rows != nullptr ? rows[i] : first + i;
  }
};

/// Each query once, and only those that see a token of the block.
__device__ __forceinline__ QueryList queries(const DeviceBatch& batch, const QueryLists& lists,
                                             int head, std::int64_t bin,
                                             const KeyBlock& key_block) {
  if (lists.rows != nullptr) {
    const std::int32_t* const begins = lists.begins + head * (lists.num_bins + 1) + bin;
    return {lists.rows + head * lists.rows_per_head + begins[0], 0, begins[1] - begins[0]};
  }
  if (!key_block.exists) return {nullptr, 0, 0};
  const DeviceSequence& sequence = key_block.sequence;
  const std::int64_t hidden =
      detail::clamp(key_block.block * batch.block_size - sequence.position(0), 0, sequence.q_len);
  return {nullptr, sequence.q_begin + hidden, sequence.q_len - hidden};
}

/// What build_query_lists() reads and writes.
struct QueryListBuild {
  DeviceBatch batch;
  const std::int32_t* block_ids;  ///< [num_kv_heads][total_q][top_k]
  std::int64_t head_stride, token_stride;
  std::int32_t* rows;  ///< as in QueryLists; null: nothing to build
  std::int32_t* begins;
  std::int32_t* counts;  ///< [num_kv_heads][num_chunks][num_bins]
  std::int64_t num_bins;
  std::int64_t num_chunks;
  int chunk;  ///< queries
  int top_k;
  int num_kv_heads;

  QueryLists lists() const { return {rows, begins, batch.total_q * top_k, num_bins}; }
};

inline constexpr int kShortestListChunk = 512;
inline constexpr int kLongestListChunk = 8192;

/// Why the lists can't be built: offsets in them have 32 bits.
template <class Args>
std::optional<std::string> declines_query_lists(const Args& args) {
  const std::int64_t entries = args.q.shape[0] * args.problem.top_k;
  const std::int64_t bins =
      args.k.shape[0] / args.problem.block_size + core::batch_size(args.batch);
  if (entries > INT32_MAX || args.q.shape[0] > INT32_MAX) {
    return core::concat("total_q * top_k is ", entries, ", above ", INT32_MAX);
  }
  if (bins >= INT32_MAX) return core::concat("there are ", bins, " blocks, above ", INT32_MAX);
  return std::nullopt;
}

/// Memory comes from `layout`, which may count only. Nothing is taken without block_ids.
template <class Args>
QueryListBuild lay_out_query_lists(const Args& args, core::WorkspaceLayout& layout) {
  const Problem& p = args.problem;
  QueryListBuild build{};
  build.batch = make_device_batch(args);
  build.num_bins = args.k.shape[0] / p.block_size + build.batch.batch_size;
  build.top_k = p.top_k;
  build.num_kv_heads = p.num_kv_heads;
  if (!args.block_ids.given()) return build;
  build.block_ids = static_cast<const std::int32_t*>(args.block_ids.data);
  build.head_stride = args.block_ids.stride[0];
  build.token_stride = args.block_ids.stride[1];
  const std::int64_t total_q = build.batch.total_q;
  const std::int64_t entries = total_q * p.top_k;
  // Longer chunks cost passes, shorter ones counters: at most a quarter of the entries, or few.
  constexpr std::int64_t kFew = 1 << 18;
  build.chunk = kShortestListChunk;
  while (build.chunk < kLongestListChunk &&
         build.num_bins * ceil_div(total_q, build.chunk) > std::max(entries / 4, kFew)) {
    build.chunk *= 2;
  }
  build.num_chunks = ceil_div(total_q, build.chunk);
  build.rows = layout.take<std::int32_t>(p.num_kv_heads * entries);
  build.begins = layout.take<std::int32_t>(p.num_kv_heads * (build.num_bins + 1));
  build.counts = layout.take<std::int32_t>(p.num_kv_heads * build.num_chunks * build.num_bins);
  return build;
}

/// Launches the kernels that fill build.lists(); none without block_ids.
void build_query_lists(const QueryListBuild& build, cudaStream_t stream);

}  // namespace msa::cuda
