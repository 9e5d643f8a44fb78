// SPDX-License-Identifier: Apache-2.0
//
// The union of the blocks of a tile of queries: planned by one warp, loaded by one thread, walked
// by two warpgroups. The union kernel of the forward pass and dQ of the backward pass are made of
// it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/batch.cuh"
#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/swizzle.cuh"
#include "cuda/sm90/attention_row.cuh"

namespace msa::cuda::sm90 {

inline constexpr int kColdTile = 8;  ///< tokens; of a tile too where any can be cold
inline constexpr int kUnionThreads = 384;
inline constexpr int kTileRows = 128;
inline constexpr int kMaxStages = 6;
inline constexpr int kChunks = 4;  ///< of the ring from planner to producer
inline constexpr int kChunkEntries = 8;

/// A tile as its consumers see it.
struct Tile {
  std::int64_t row0;  ///< packed index of its first token
  int num_tokens;     ///< 0: nothing to do; negative: no tile is left
  int position;       ///< of the first token among the keys; may be negative
  int kv_head;
  std::uint32_t cold;  ///< bit t: token t belongs to the KV-outer kernel
};

/// What lies behind the tiles in shared memory.
struct UnionShared {
  std::uint64_t k_full[kMaxStages], k_empty[kMaxStages], v_full[kMaxStages], v_empty[kMaxStages];
  std::uint64_t q_full[2], q_empty[2];
  std::uint64_t chunk_full[kChunks], chunk_empty[kChunks];
  int4 chunk[kChunks][kChunkEntries];  ///< block, row of its page, page, member tokens
  int4 chunk_info[kChunks];  ///< entries (negative: no tile is left), 1: ends a tile, KV head
  int4 stage[kMaxStages];    ///< block, member tokens, 1: ends a tile
  Tile tile[2];
  int ids[];  ///< planner: [ids per lane][32]
};

struct UnionParams {
  AttentionTensors tensors;
  std::int64_t num_tiles;  ///< per KV head, an upper bound
  int slot_rows;           ///< rows per token: the group size, at least 4
  /// [num_kv_heads][num_cold_tiles], tiles of kColdTile packed tokens, or null: none is cold
  const std::uint8_t* tile_is_cold;
  const int* any_cold;  ///< with tile_is_cold; 0: none is cold
  std::int64_t num_cold_tiles;
  int stages;
  int ids_per_lane;
};

/// Tiles of sequence b start at index q_begin(b) / tile_tokens + b: never too few, no prefix sums.
__device__ __forceinline__ Tile tile_at(const UnionParams& g, std::int64_t item,
                                        DeviceSequence& sequence) {
  const DeviceBatch& batch = g.tensors.batch;
  const int tile_tokens = kTileRows / g.slot_rows;
  const std::int64_t t = g.num_tiles - 1 - item % g.num_tiles;  // the short first tiles come last
  std::int64_t low = 0;
  std::int64_t high = batch.batch_size;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (detail::q_begin(batch, middle) / tile_tokens + middle <= t ? low : high) = middle;
  }
  sequence = sequence_at(batch, low);
  const std::int64_t first = (t - sequence.q_begin / tile_tokens - low) * tile_tokens;
  const std::int64_t left = sequence.q_len - first;
  Tile tile;
  tile.row0 = sequence.q_begin + first;
  tile.num_tokens = static_cast<int>(left < 0 ? 0 : left > tile_tokens ? tile_tokens : left);
  tile.position = static_cast<int>(sequence.position(first));
  tile.kv_head = static_cast<int>(item / g.num_tiles);
  tile.cold = 0;
  if (g.tile_is_cold != nullptr && tile.num_tokens > 0 &&
      *g.any_cold != 0) {  // it lies in one cold tile or in two
    const std::uint8_t* const flags = g.tile_is_cold + tile.kv_head * g.num_cold_tiles;
    const int in_first = kColdTile - static_cast<int>(tile.row0 % kColdTile);
    const std::uint32_t first_bits = (1u << in_first) - 1;
    const std::uint32_t live_bits = (1u << tile.num_tokens) - 1;
    if (flags[tile.row0 / kColdTile] != 0) tile.cold |= first_bits;
    if (flags[(tile.row0 + tile.num_tokens - 1) / kColdTile] != 0) tile.cold |= ~first_bits;
    tile.cold &= live_bits;
    if (tile.cold == live_bits) tile.num_tokens = 0;
  }
  return tile;
}

__device__ __forceinline__ std::int64_t num_items(const UnionParams& g) {
  return g.num_tiles * g.tensors.num_kv_heads;
}

/// The largest of the lane's ids below `bound`, -1 where there is none.
__device__ __forceinline__ int next_below(const int* ids, int count, int bound) {
  int best = -1;
  for (int i = 0; i < count; ++i) {
    const int id = ids[i * 32 + static_cast<int>(threadIdx.x) % 32];
    if (id < bound) best = max(best, id);
  }
  return best;
}

/// Warp 1. Lane l holds a share of the ids of token l mod tile_tokens; the next block of the union
/// is the largest head of all lanes, its members are the lanes whose head it is.
template <int kBlock>
__device__ __forceinline__ void plan_unions(const UnionParams& g, UnionShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int tile_tokens = kTileRows / g.slot_rows;
  const int token = lane % tile_tokens;
  int chunk = 0;
  std::uint32_t parity = 1;
  const auto wait_for_chunk = [&] {
    ptx::mbarrier_wait(ptx::smem_address(&shared.chunk_empty[chunk]), parity);
  };
  const auto publish = [&](int entries, bool ends_tile, int kv_head) {
    if (lane == 0) shared.chunk_info[chunk] = {entries, ends_tile ? 1 : 0, kv_head, 0};
    ptx::mbarrier_arrive(ptx::smem_address(&shared.chunk_full[chunk]));
    if (++chunk == kChunks) {
      chunk = 0;
      parity ^= 1;
    }
  };
  for (std::int64_t item = blockIdx.x; item < num_items(g); item += gridDim.x) {
    DeviceSequence sequence;
    const Tile tile = tile_at(g, item, sequence);
    if (tile.num_tokens == 0) continue;
    const int position = tile.position + token;
    const bool here = token < tile.num_tokens && (tile.cold >> token & 1) == 0;
    const int local = here && position >= 0 ? position / kBlock : -1;
    const std::int32_t* const ids = g.tensors.ids_of(tile.kv_head, tile.row0 + token);
    int head = -1;
    for (int i = 0; i < g.ids_per_lane; ++i) {
      const int slot = i * (32 / tile_tokens) + lane / tile_tokens;
      int id = local >= 0 && slot < g.tensors.top_k ? ids[slot] : -1;
      if (id > local) id = -1;
      shared.ids[i * 32 + lane] = id;
      head = max(head, id);
    }
    int next = __reduce_max_sync(~0u, head);
    do {
      wait_for_chunk();
      int entries = 0;
      int my_block = 0;
      std::uint32_t my_members = 0;
      for (; entries < kChunkEntries && next >= 0; ++entries) {
        std::uint32_t members = __ballot_sync(~0u, head == next);
        for (int shift = 16; shift >= tile_tokens; shift /= 2) members |= members >> shift;
        if (tile_tokens < 32) members &= (1u << tile_tokens) - 1;
        if (lane == entries) {
          my_block = next;
          my_members = members;
        }
        if (head == next) head = next_below(shared.ids, g.ids_per_lane, next);
        next = __reduce_max_sync(~0u, head);
      }
      if (lane < entries) {
        std::int64_t row = sequence.k_begin + std::int64_t{my_block} * kBlock;
        std::int64_t page = 0;
        if (g.tensors.batch.page_table != nullptr) {
          row = 0;
          page = page_of(g.tensors.batch, sequence.batch_idx, my_block);
          if (page < 0) my_members = 0;
        }
        shared.chunk[chunk][lane] = {my_block, static_cast<int>(row), static_cast<int>(page),
                                     static_cast<int>(my_members)};
      }
      if (entries == 0) {  // an empty union still ends its tile
        if (lane == 0) shared.chunk[chunk][0] = {0, 0, 0, 0};
        entries = 1;
      }
      publish(entries, next < 0, tile.kv_head);
    } while (next >= 0);
  }
  wait_for_chunk();
  publish(-1, true, 0);
}

/// Thread 0. An entry without members takes its stage, but loads nothing.
template <int kDim, int kBlock>
__device__ __forceinline__ void load_keys(const UnionParams& g, UnionShared& shared,
                                          std::uint32_t stages, const CUtensorMap& k_map,
                                          const CUtensorMap& v_map) {
  constexpr std::uint32_t kTileBytes = kBlock * kDim * 2;
  int stage = 0;
  std::uint32_t parity = 1;
  std::uint32_t chunk_parity = 0;
  for (int chunk = 0;;) {
    ptx::mbarrier_wait(ptx::smem_address(&shared.chunk_full[chunk]), chunk_parity);
    const int4 info = shared.chunk_info[chunk];
    if (info.x < 0) break;
    for (int i = 0; i < info.x; ++i) {
      const int4 entry = shared.chunk[chunk][i];
      const auto load = [&](std::uint32_t full, std::uint32_t to, const CUtensorMap& map) {
        if (entry.w == 0) {
          ptx::mbarrier_arrive(full);
          return;
        }
        ptx::mbarrier_expect_tx(full, kTileBytes);
#pragma unroll
        for (int panel = 0; panel < kDim / 64; ++panel) {
          ptx::tma_load_4d(to + panel * kBlock * kPanelBytes, &map, panel * 64, entry.y, info.z,
                           entry.z, full);
        }
      };
      const std::uint32_t to = stages + stage * 2 * kTileBytes;
      ptx::mbarrier_wait(ptx::smem_address(&shared.k_empty[stage]), parity);
      shared.stage[stage] = {entry.x, entry.w, i + 1 == info.x ? info.y : 0, 0};
      load(ptx::smem_address(&shared.k_full[stage]), to, k_map);
      ptx::mbarrier_wait(ptx::smem_address(&shared.v_empty[stage]), parity);
      load(ptx::smem_address(&shared.v_full[stage]), to + kTileBytes, v_map);
      if (++stage == g.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    ptx::mbarrier_arrive(ptx::smem_address(&shared.chunk_empty[chunk]));
    if (++chunk == kChunks) {
      chunk = 0;
      chunk_parity ^= 1;
    }
  }
}

/// Where one warpgroup stands in the unions of its tiles.
class UnionWalk {
 protected:
  __device__ __forceinline__ UnionWalk(const UnionParams& g, UnionShared& shared)
      : g_(g),
        shared_(shared),
        wg_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0) - 1),
        lane_(static_cast<int>(threadIdx.x) % 32) {
    const int warp_row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane_ / 4;
    for (int h = 0; h < 2; ++h) token_[h] = (wg_ * 64 + warp_row + 8 * h) / g.slot_rows;
    const int tokens = 64 / g.slot_rows;
    wg_members_ = (tokens == 16 ? 0xffffu : (1u << tokens) - 1) << (wg_ * tokens);
  }

  __device__ __forceinline__ void arrive(std::uint64_t& barrier) {
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(ptx::smem_address(&barrier));
  }

  // Lane 0 tells the producers that a slot was read, so lane 0 alone reads it.

  __device__ __forceinline__ Tile read_tile() const {
    Tile tile{};
    if (lane_ == 0) tile = shared_.tile[wg_];
    tile.row0 = __shfl_sync(~0u, tile.row0, 0);
    tile.num_tokens = __shfl_sync(~0u, tile.num_tokens, 0);
    tile.position = __shfl_sync(~0u, tile.position, 0);
    tile.kv_head = __shfl_sync(~0u, tile.kv_head, 0);
    tile.cold = __shfl_sync(~0u, tile.cold, 0);
    return tile;
  }
  __device__ __forceinline__ void read_entry() {
    int4 entry{};
    if (lane_ == 0) entry = shared_.stage[stage_];
    block_ = __shfl_sync(~0u, entry.x, 0);
    members_ = static_cast<std::uint32_t>(__shfl_sync(~0u, entry.y, 0));
    ended_ = __shfl_sync(~0u, entry.z, 0) != 0;
  }

  /// Passes over at most `limit` blocks that this warpgroup has no part in; whether it stands on
  /// one that it has. Sets ended_ at the end of the tile.
  __device__ __forceinline__ bool find(int limit) {
    while (!ended_ && limit-- > 0) {
      ptx::mbarrier_wait(ptx::smem_address(&shared_.k_full[stage_]), parity_);
      read_entry();
      if ((members_ & wg_members_) != 0) return true;
      arrive(shared_.k_empty[stage_]);
      ptx::mbarrier_wait(ptx::smem_address(&shared_.v_full[stage_]), parity_);
      arrive(shared_.v_empty[stage_]);
      step();
    }
    return false;
  }
  __device__ __forceinline__ void step() {
    if (++stage_ == g_.stages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

  /// Last key of the block that each of the thread's rows attends, -1: none.
  template <int kBlock>
  __device__ __forceinline__ void limits(int (&limit)[2], int position) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      limit[h] = (members_ >> token_[h] & 1) != 0 ? position + token_[h] - block_ * kBlock : -1;
    }
  }

  const UnionParams& g_;
  UnionShared& shared_;
  int wg_;
  int lane_;
  int token_[2];              ///< of the tile, by row
  std::uint32_t wg_members_;  ///< the warpgroup's tokens

  int stage_ = 0;  ///< the next entry of the union
  std::uint32_t parity_ = 0;
  int block_ = 0;  ///< of the entry found last
  std::uint32_t members_ = 0;
  bool ended_ = false;
};

}  // namespace msa::cuda::sm90
