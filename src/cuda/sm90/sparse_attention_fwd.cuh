// SPDX-License-Identifier: Apache-2.0
//
// SparseAttentionForward, the union kernel. A CTA owns a tile: consecutive tokens of one sequence
// for one KV head, 128 rows (token, query head) in two warpgroups of 64. It walks the union of its
// tokens' blocks once, newest first, so neighbouring CTAs find each other's K and V in L2.
//
//   warp 0    producer   K and V of each block of the union into a ring of stages (TMA)
//   warp 1    planner    merges the tokens' block lists: (block, mask of member tokens)
//   warp 2    Q loader   rows of the next tile, per warpgroup, as soon as it lets go of its own
//   warps 4-11           two warpgroups: S = Q K^T, softmax, O += P V; a warpgroup passes over a
//                        block none of its tokens has, a warp with no member row skips the softmax
//   warps 12-15          with e4m3 K and V only: widen what the producer loads
//
// docs/kernels/sm90_attention.md has the picture and the cycle budget.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/batch.cuh"
#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/math.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/wgmma.cuh"
#include "cuda/common/swizzle.cuh"
#include "cuda/sm90/attention_row.cuh"
#include "cuda/sm90/sparse_attention_fwd.hpp"
#include "cuda/sm90/sparse_attention_widen.cuh"

namespace msa::cuda::sm90 {

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

/// Thread 64. Rows of heads and tokens that the tile does not have are read where they exist and
/// never written back.
template <int kDim>
__device__ __forceinline__ void load_queries(const UnionParams& g, UnionShared& shared,
                                             std::uint32_t queries, const CUtensorMap& q_map) {
  constexpr std::uint32_t kBytes = 64 * kDim * 2;
  std::uint32_t parity = 1;
  const auto send = [&](const Tile& tile) {
    for (int wg = 0; wg < 2; ++wg) {
      const std::uint32_t full = ptx::smem_address(&shared.q_full[wg]);
      ptx::mbarrier_wait(ptx::smem_address(&shared.q_empty[wg]), parity);
      shared.tile[wg] = tile;
      if (tile.num_tokens < 0) {
        ptx::mbarrier_arrive(full);
        continue;
      }
      ptx::mbarrier_expect_tx(full, kBytes);
#pragma unroll
      for (int panel = 0; panel < kDim / 64; ++panel) {
        ptx::tma_load_3d(queries + wg * kBytes + panel * 64 * kPanelBytes, &q_map, panel * 64,
                         tile.kv_head * g.tensors.group_size,
                         static_cast<int>(tile.row0) + wg * (64 / g.slot_rows), full);
      }
    }
    parity ^= 1;
  };
  for (std::int64_t item = blockIdx.x; item < num_items(g); item += gridDim.x) {
    DeviceSequence sequence;
    const Tile tile = tile_at(g, item, sequence);
    if (tile.num_tokens == 0) continue;
    send(tile);
  }
  send({.row0 = 0, .num_tokens = -1, .position = 0, .kv_head = 0, .cold = 0});
}

/// One warpgroup; thread t of it holds rows t / 32 * 16 + t % 32 / 4 (h = 0) and 8 below (h = 1) of
/// S and O as wgmma lays them out.
template <class T, int kDim, int kBlock, bool kWiden>
class UnionConsumer {
 public:
  __device__ __forceinline__ UnionConsumer(const UnionParams& g, UnionShared& shared,
                                           std::uint32_t queries, std::uint32_t stages)
      : g_(g),
        shared_(shared),
        wg_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0) - 1),
        lane_(static_cast<int>(threadIdx.x) % 32) {
    q_desc_ = ptx::k_major_descriptor(queries + wg_ * 64 * kDim * 2);
    k_desc_ = ptx::k_major_descriptor(stages);
    v_desc_ = ptx::mn_major_descriptor(stages + kTileBytes, kBlock);
    const int warp_row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane_ / 4;
    for (int h = 0; h < 2; ++h) token_[h] = (wg_ * 64 + warp_row + 8 * h) / g.slot_rows;
    const int tokens = 64 / g.slot_rows;
    wg_members_ = (tokens == 16 ? 0xffffu : (1u << tokens) - 1) << (wg_ * tokens);
  }

  __device__ __forceinline__ void run() {
    std::uint32_t q_parity = 0;
    while (true) {
      ptx::mbarrier_wait(ptx::smem_address(&shared_.q_full[wg_]), q_parity);
      q_parity ^= 1;
      const Tile tile = read_tile();
      if (tile.num_tokens < 0) return;
      if constexpr (kWiden) scale_ = g_.tensors.score_scale(tile.kv_head);
      attend(tile);
      finish(tile);
    }
  }

 private:
  static constexpr int kTileBytes = kBlock * kDim * 2;
  static constexpr int kS = kBlock / 2;
  static constexpr int kO = kDim / 2;

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

  __device__ __forceinline__ void multiply_qk(float (&s)[kS], int stage) {
    const std::uint64_t k_desc = ptx::advance(k_desc_, stage * 2 * kTileBytes);
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      ptx::Wgmma<T, kBlock>::template ss<0>(s, ptx::advance(q_desc_, k_major_step(64, i)),
                                            ptx::advance(k_desc, k_major_step(kBlock, i)), i != 0);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void multiply_pv(int stage) {
    const std::uint64_t v_desc = ptx::advance(v_desc_, stage * 2 * kTileBytes);
#pragma unroll
    for (int i = 0; i < kBlock / 16; ++i) {
      ptx::Wgmma<T, kDim>::template rs<1>(o_, p_[i], ptx::advance(v_desc, mn_major_step(i)), 1);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void pin_op() {
    ptx::pin(o_);
#pragma unroll
    for (int i = 0; i < kBlock / 16; ++i) ptx::pin(p_[i]);
  }

  /// S -> P, unpacked and in place. Whether O must be multiplied by alpha_ (uniform over the warp):
  /// the reference m_ moves only when a maximum has passed it by more than 2^8.
  __device__ __forceinline__ bool softmax(float (&s)[kS], const int (&limit)[2]) {
    idle_ = !__any_sync(~0u, max(limit[0], limit[1]) >= 0);
    if (idle_) return false;
    if (!__all_sync(~0u, min(limit[0], limit[1]) >= kBlock - 1)) {
      const int column = lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < kS; ++i) {
        if (i / 4 * 8 + i % 2 > limit[i / 2 % 2] - column) s[i] = -INFINITY;
      }
    }
    const float scale = kWiden ? scale_ : g_.tensors.scale_log2;
    float top[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float chain[4];
#pragma unroll
      for (int i = 0; i < kS / 2; ++i) {
        const float x = s[i / 2 * 4 + h * 2 + i % 2];
        chain[i % 4] = i < 4 ? x : fmaxf(chain[i % 4], x);
      }
      top[h] = fmaxf(fmaxf(chain[0], chain[1]), fmaxf(chain[2], chain[3]));
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
      top[h] = scale * fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
    }
    const bool rescale = __any_sync(~0u, top[0] > m_[0] + 8.0f || top[1] > m_[1] + 8.0f);
    if (rescale) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float now = fmaxf(m_[h], top[h]);
        alpha_[h] = m_[h] == now ? 1.0f : ptx::ex2(m_[h] - now);
        m_[h] = now;
        l_[h] *= alpha_[h];
      }
    }
    const float reference[2] = {m_[0] == -INFINITY ? 0.0f : m_[0],
                                m_[1] == -INFINITY ? 0.0f : m_[1]};
    float part[2][2] = {};
#pragma unroll
    for (int i = 0; i < kS; ++i) {
      s[i] = ptx::ex2(fmaf(s[i], scale, -reference[i / 2 % 2]));
      part[i / 2 % 2][i % 2] += s[i];
    }
    l_[0] += part[0][0] + part[0][1];
    l_[1] += part[1][0] + part[1][1];
    return rescale;
  }
  __device__ __forceinline__ void rescale_o() {
#pragma unroll
    for (int i = 0; i < kO; ++i) o_[i] *= alpha_[i / 2 % 2];
  }
  __device__ __forceinline__ void pack_p(const float (&s)[kS]) {
    if (idle_) {
#pragma unroll
      for (int i = 0; i < kS / 2; ++i) p_[i / 4][i % 4] = 0;
      return;
    }
#pragma unroll
    for (int i = 0; i < kS / 2; ++i) p_[i / 4][i % 4] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
  }
  /// Last key of the block that each of the thread's rows attends, -1: none.
  __device__ __forceinline__ void limits(int (&limit)[2], int position) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      limit[h] = (members_ >> token_[h] & 1) != 0 ? position + token_[h] - block_ * kBlock : -1;
    }
  }

  __device__ __forceinline__ void attend(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kO; ++i) o_[i] = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      m_[h] = -INFINITY;
      l_[h] = 0.0f;
    }
    ended_ = false;
    while (find(INT32_MAX)) {
      int current = stage_;  // its P is in p_, its V not used yet
      {
        int limit[2];
        limits(limit, tile.position);
        float s[kS];
        ptx::wgmma_fence();
        multiply_qk(s, current);
        ptx::wgmma_wait<0>();
        ptx::pin(s);
        arrive(shared_.k_empty[current]);
        if (softmax(s, limit)) rescale_o();
        pack_p(s);
        pin_op();  // P in place before the loop goes round, else ptxas serialises every wgmma
      }
      std::uint32_t parity = parity_;
      step();
      // Looking further would wait for a stage that only this warpgroup's V can free.
      while (find(g_.stages - 1)) {
        int limit[2];
        limits(limit, tile.position);
        float s[kS];
        ptx::mbarrier_wait(ptx::smem_address(&shared_.v_full[current]), parity);
        pin_op();
        ptx::wgmma_fence();
        multiply_qk(s, stage_);
        multiply_pv(current);
        ptx::wgmma_wait<1>();
        ptx::pin(s);
        arrive(shared_.k_empty[stage_]);
        const bool rescale = softmax(s, limit);
        ptx::wgmma_wait<0>();
        pin_op();
        arrive(shared_.v_empty[current]);
        if (rescale) rescale_o();
        pack_p(s);
        pin_op();  // P in place before the loop goes round, else ptxas serialises every wgmma
        current = stage_;
        parity = parity_;
        step();
      }
      if (ended_) arrive(shared_.q_empty[wg_]);
      ptx::mbarrier_wait(ptx::smem_address(&shared_.v_full[current]), parity);
      pin_op();
      ptx::wgmma_fence();
      multiply_pv(current);
      ptx::wgmma_wait<0>();
      pin_op();
      arrive(shared_.v_empty[current]);
      released_ = ended_;
    }
    if (!released_) arrive(shared_.q_empty[wg_]);
    released_ = false;
  }

  __device__ __forceinline__ void finish(const Tile& tile) {
    const AttentionTensors& tensors = g_.tensors;
    bool live[2];
    bool bad[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      l_[h] += __shfl_xor_sync(~0u, l_[h], 1);
      l_[h] += __shfl_xor_sync(~0u, l_[h], 2);
      const int row = static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane_ / 4 + 8 * h;
      const int in_group = row % g_.slot_rows;
      live[h] = in_group < tensors.group_size && token_[h] < tile.num_tokens &&
                (tile.cold >> token_[h] & 1) == 0;
      float inverse = l_[h] == 0.0f ? 0.0f : 1.0f / l_[h];
      if constexpr (kWiden) inverse *= tensors.value_scale(tile.kv_head);
      float top = fabsf(l_[h]) <= 0x1p126f ? 0.0f : INFINITY;  // of |out|, or NaN
#pragma unroll
      for (int i = 0; i < kO / 4; ++i) {
        const float x = o_[4 * i + 2 * h] * inverse;
        const float y = o_[4 * i + 2 * h + 1] * inverse;
        top = ptx::max_nan(top, ptx::max_nan(fabsf(x), fabsf(y)));
        o_[4 * i + 2 * h] = __uint_as_float(ptx::pack<T>(x, y));
      }
      const bool huge = m_[h] != -INFINITY && !(fabsf(m_[h]) <= kHugeScore);
      bad[h] = live[h] && (huge || !(top <= kLargest<T>));
      const std::int64_t token = tile.row0 + token_[h];
      const int head = tile.kv_head * tensors.group_size + in_group;
      T* const out = static_cast<T*>(tensors.out) + token * tensors.out_token_stride +
                     head * tensors.out_head_stride;
      // A 4 x 4 transposition in each quad: lane c ends with columns 8 c to 8 c + 7 of every 32.
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        std::uint32_t w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = __float_as_uint(o_[16 * i + 4 * j + 2 * h]);
        const bool odd = (lane_ & 1) != 0;
        const bool upper = (lane_ & 2) != 0;
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          const std::uint32_t got = __shfl_xor_sync(~0u, odd ? w[j] : w[j + 1], 1);
          if (odd) {
            w[j] = got;
          } else {
            w[j + 1] = got;
          }
        }
        const std::uint32_t got0 = __shfl_xor_sync(~0u, upper ? w[0] : w[2], 2);
        const std::uint32_t got1 = __shfl_xor_sync(~0u, upper ? w[1] : w[3], 2);
        const uint4 eight = upper ? uint4{got0, got1, w[2], w[3]} : uint4{w[0], w[1], got0, got1};
        if (live[h]) *reinterpret_cast<uint4*>(out + 32 * i + 8 * (lane_ % 4)) = eight;
      }
      if (live[h] && tensors.lse != nullptr && lane_ % 4 == 0) {
        constexpr float kLn2 = 0.693147180559945309f;
        tensors.lse[token * tensors.lse_token_stride + head * tensors.lse_head_stride] =
            l_[h] == 0.0f ? -INFINITY : (m_[h] + log2f(l_[h])) * kLn2;
      }
    }
    // NaN and infinities of keys that a row does not attend reach it as 0 * V: do such rows again,
    // and those of huge scores, and those whose sums have overflowed.
#pragma unroll 1
    for (int h = 0; h < 2; ++h) {
      std::uint32_t rows = __ballot_sync(~0u, h == 0 ? bad[0] : bad[1]);
      rows |= rows >> 1;
      rows = (rows | rows >> 2) & 0x11111111u;
      while (rows != 0) {
        const int row =
            static_cast<int>(threadIdx.x) % 128 / 32 * 16 + (__ffs(rows) - 1) / 4 + 8 * h;
        rows &= rows - 1;
        __syncwarp();
        attend_row<T, std::conditional_t<kWiden, __nv_fp8_e4m3, T>>(
            tensors, tile.row0 + (wg_ * 64 + row) / g_.slot_rows, tile.kv_head, row % g_.slot_rows);
      }
    }
  }

  const UnionParams& g_;
  UnionShared& shared_;
  int wg_;
  int lane_;
  int token_[2];              ///< of the tile, by row
  std::uint32_t wg_members_;  ///< the warpgroup's tokens
  std::uint64_t q_desc_, k_desc_, v_desc_;

  int stage_ = 0;  ///< the next entry of the union
  std::uint32_t parity_ = 0;
  int block_ = 0;  ///< of the entry found last
  std::uint32_t members_ = 0;
  bool ended_ = false;
  bool released_ = false;

  float o_[kO];
  std::uint32_t p_[kBlock / 16][4];
  float m_[2];  ///< reference of the exponentials, log2 domain
  float l_[2];  ///< this thread's share of the sum
  float alpha_[2];
  float scale_ = 0.0f;  ///< of the tile's head, with kWiden
  bool idle_ = false;   ///< none of the warp's rows attends the block: P is 0
};

template <class T, int kDim, int kBlock, bool kWiden>
__global__ void __launch_bounds__(kUnionThreads + (kWiden ? kWidenThreads : 0), 1)
    union_kernel(const __grid_constant__ UnionParams g, const __grid_constant__ CUtensorMap q_map,
                 const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ __align__(1024) std::uint8_t smem[];
  constexpr int kQBytes = 2 * 64 * kDim * 2;
  const std::uint32_t queries = ptx::smem_address(smem);
  const std::uint32_t stages = queries + kQBytes;
  std::uint8_t* rest = smem + kQBytes + g.stages * 2 * kBlock * kDim * 2;
  [[maybe_unused]] std::uint8_t* const raw_tiles = rest;
  if constexpr (kWiden) rest += kRawSlots * kRawTileBytes<kBlock>;
  [[maybe_unused]] WidenShared& raw = *reinterpret_cast<WidenShared*>(rest);
  if constexpr (kWiden) rest += sizeof(WidenShared);
  UnionShared& shared = *reinterpret_cast<UnionShared*>(rest);
  if (threadIdx.x == 0) {
    for (int i = 0; i < g.stages; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&shared.k_full[i]), kWiden ? kWidenThreads : 1);
      ptx::mbarrier_init(ptx::smem_address(&shared.v_full[i]), kWiden ? kWidenThreads : 1);
      ptx::mbarrier_init(ptx::smem_address(&shared.k_empty[i]), 8);
      ptx::mbarrier_init(ptx::smem_address(&shared.v_empty[i]), 8);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&shared.q_full[i]), 1);
      ptx::mbarrier_init(ptx::smem_address(&shared.q_empty[i]), 4);
    }
    for (int i = 0; i < kChunks; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&shared.chunk_full[i]), 32);
      ptx::mbarrier_init(ptx::smem_address(&shared.chunk_empty[i]), 1);
    }
    if constexpr (kWiden) init_raw_barriers(raw);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < 4) {
    ptx::decrease_registers<48>();
    if (warp == 0) {
      if (threadIdx.x == 0) {
        if constexpr (kWiden) {
          load_raw_keys<kBlock>(shared, raw, ptx::smem_address(raw_tiles), k_map, v_map);
        } else {
          load_keys<kDim, kBlock>(g, shared, stages, k_map, v_map);
        }
      }
    } else if (warp == 1) {
      plan_unions<kBlock>(g, shared);
    } else if (warp == 2) {
      if (threadIdx.x == 64) load_queries<kDim>(g, shared, queries, q_map);
    }
  } else if (warp < 12) {
    ptx::increase_registers<kWiden ? 208 : 224>();
    UnionConsumer<T, kDim, kBlock, kWiden>(g, shared, queries, stages).run();
  } else if constexpr (kWiden) {
    ptx::decrease_registers<48>();
    widen_keys<T, kDim, kBlock>(g.stages, shared, raw, raw_tiles, smem + kQBytes);
  }
}

}  // namespace msa::cuda::sm90
