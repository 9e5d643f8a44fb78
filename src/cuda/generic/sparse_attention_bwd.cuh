// SPDX-License-Identifier: Apache-2.0
//
// What the two kinds of generic backward kernels share: tensor cores for 16-bit tensors, FMA for
// f32. See docs/kernels/backward.md.
#pragma once

#include "cuda/common/attention_gradients.cuh"
#include "cuda/common/launch.hpp"

namespace msa::cuda::generic {

/// Both kernels: dq, then dk and dv. Statistics and lists are complete.
void launch_gradients_f32(const AttentionGradients& g, int num_kv_heads, cudaStream_t stream);
void launch_gradients_f16(const AttentionGradients& g, int num_kv_heads, cudaStream_t stream);
void launch_gradients_bf16(const AttentionGradients& g, int num_kv_heads, cudaStream_t stream);

/// Neighbouring keys that a query sees.
struct KeyChunk {
  std::int64_t first;  ///< packed
  int num_keys;        ///< 1 .. kKeysPerChunk
};
inline constexpr int kKeysPerChunk = 16;  // no block is smaller

/// Chunks `first`, `first` + `step`, ... of the blocks that a query attends; ids that are no
/// visible block are skipped.
class ChunkWalk {
 public:
  __device__ __forceinline__ ChunkWalk(const AttentionGradients& g, std::int64_t row, int kv_head,
                                       int first, int step)
      : block_size_(g.batch.block_size), step_(step), next_(first) {
    const DeviceSequence sequence = sequence_of_query(g.batch, row);
    k_begin_ = sequence.k_begin;
    visible_ = num_visible_keys(sequence, row);
    ids_ = g.block_ids == nullptr
               ? nullptr
               : g.block_ids + kv_head * g.ids_head_stride + row * g.ids_token_stride;
    num_slots_ = ids_ == nullptr ? (visible_ + block_size_ - 1) / block_size_ : g.top_k;
  }

  __device__ __forceinline__ bool next(KeyChunk& chunk) {
    while (next_ >= num_chunks_) {
      if (slot_ >= num_slots_) return false;
      next_ -= num_chunks_;
      num_chunks_ = 0;
      const std::int64_t block = ids_ == nullptr ? slot_ : ids_[slot_];
      ++slot_;
      first_ = block * block_size_;
      if (first_ < 0 || first_ >= visible_) continue;
      num_keys_ = static_cast<int>(min(std::int64_t{block_size_}, visible_ - first_));
      num_chunks_ = (num_keys_ + kKeysPerChunk - 1) / kKeysPerChunk;
    }
    const int first = next_ * kKeysPerChunk;
    chunk = {k_begin_ + first_ + first, min(kKeysPerChunk, num_keys_ - first)};
    next_ += step_;
    return true;
  }

 private:
  const std::int32_t* ids_;  ///< or null: every block
  std::int64_t num_slots_;
  std::int64_t k_begin_;
  std::int64_t visible_;    ///< keys that the query sees
  std::int64_t first_ = 0;  ///< of the block of slot_ - 1
  std::int64_t slot_ = 0;
  int block_size_;
  int num_keys_ = 0;
  int num_chunks_ = 0;
  int step_;
  int next_;  ///< chunk of that block
};

/// The keys of a CTA of a dk, dv kernel: kKeys of one KV block, or the rest of it.
struct KeyTile {
  KeyBlock key_block;
  std::int64_t bin;
  int first;     ///< token of the block
  int num_keys;  ///< 0: nothing to do
  QueryList list;

  /// Keys of the tile that query `row` sees.
  __device__ __forceinline__ int limit(int block_size, std::int64_t row) const {
    const int seen = key_block.limit(block_size, row) - first;
    return seen < 0 ? 0 : min(seen, num_keys);
  }
};

inline std::int64_t tiles_per_block(int block_size, int keys) {
  return block_size <= keys ? 1 : block_size / keys;
}

template <int kKeys>
__device__ __forceinline__ KeyTile key_tile_of(const AttentionGradients& g, std::int64_t index,
                                               int kv_head) {
  const int block_size = g.batch.block_size;
  const int tiles = block_size <= kKeys ? 1 : block_size / kKeys;
  KeyTile tile{};
  tile.bin = index / tiles;
  tile.key_block = key_block_of_bin(g.batch, tile.bin);
  if (!tile.key_block.exists) return tile;
  tile.first = static_cast<int>(index % tiles) * kKeys;
  tile.num_keys = max(0, min(kKeys, tile.key_block.num_tokens(block_size) - tile.first));
  tile.list = queries(g.batch, g.lists, kv_head, tile.bin, tile.key_block);
  return tile;
}

}  // namespace msa::cuda::generic
