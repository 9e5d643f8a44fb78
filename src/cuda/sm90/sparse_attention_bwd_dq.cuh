// SPDX-License-Identifier: Apache-2.0
//
// dQ. Built as the union kernel of the forward pass: a CTA owns 128 rows (query, query head) and
// walks the union of their blocks.
//
//   warp 0    producer   K and V of each block of the union (TMA)
//   warp 1    planner    (block, mask of member queries), in order
//   warp 2    row loader Q and dO of the next tile, per warpgroup
//   warps 4-11           two warpgroups: S = Q K^T, dP = dO V^T, dQ += dS K
//
// A block is done in two halves, so that both products of the second half run while the first one's
// scores become dS.
#pragma once

#include "cuda/common/ptx/math.cuh"
#include "cuda/common/ptx/wgmma.cuh"
#include "cuda/sm90/sparse_attention_bwd.cuh"
#include "cuda/sm90/sparse_attention_union.cuh"

namespace msa::cuda::sm90::bwd {

inline constexpr int kHalf = 64;  ///< keys

struct DqParams {
  UnionParams walk;
  BackwardParams backward;
};

/// Warp 1 where every visible block is attended: those of the newest query downwards.
__device__ __forceinline__ void plan_visible_blocks(const UnionParams& g, UnionShared& shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int chunk = 0;
  std::uint32_t parity = 1;
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
    const int last = tile.position + tile.num_tokens - 1;
    int next = last >= 0 ? last / kBlock : -1;
    do {
      ptx::mbarrier_wait(ptx::smem_address(&shared.chunk_empty[chunk]), parity);
      int entries = min(next + 1, kChunkEntries);
      if (lane < entries) {
        const int block = next - lane;
        const int hidden = max(0, block * kBlock - tile.position);  // queries before the block
        const std::uint32_t members = (~0u << hidden) & (~0u >> (32 - tile.num_tokens));
        const std::int64_t row = sequence.k_begin + std::int64_t{block} * kBlock;
        shared.chunk[chunk][lane] = {block, static_cast<int>(row), 0, static_cast<int>(members)};
      }
      next -= entries;
      if (entries == 0) {  // an empty union still ends its tile
        if (lane == 0) shared.chunk[chunk][0] = {0, 0, 0, 0};
        entries = 1;
      }
      publish(entries, next < 0, tile.kv_head);
    } while (next >= 0);
  }
  ptx::mbarrier_wait(ptx::smem_address(&shared.chunk_empty[chunk]), parity);
  publish(-1, true, 0);
}

/// Thread 64. Of Q as load_queries() of the forward pass, and dO behind it.
template <int kDim>
__device__ __forceinline__ void load_rows(const UnionParams& g, UnionShared& shared,
                                          std::uint32_t rows, const CUtensorMap& q_map,
                                          const CUtensorMap& dout_map) {
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
      ptx::mbarrier_expect_tx(full, 2 * kBytes);
      const int head = tile.kv_head * g.tensors.group_size;
      const int query = static_cast<int>(tile.row0) + wg * (64 / g.slot_rows);
#pragma unroll
      for (int panel = 0; panel < kDim / 64; ++panel) {
        const std::uint32_t to = rows + wg * 2 * kBytes + panel * 64 * kPanelBytes;
        ptx::tma_load_3d(to, &q_map, panel * 64, head, query, full);
        ptx::tma_load_3d(to + kBytes, &dout_map, panel * 64, head, query, full);
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

/// One warpgroup; thread t of it holds rows t / 32 * 16 + t % 32 / 4 (h = 0) and 8 below (h = 1).
template <class T, int kDim>
class DqConsumer : UnionWalk {
 public:
  __device__ __forceinline__ DqConsumer(const DqParams& g, UnionShared& shared, std::uint32_t rows,
                                        std::uint32_t stages)
      : UnionWalk(g.walk, shared), d_(g.backward) {
    q_desc_ = ptx::k_major_descriptor(rows + wg_ * 2 * kRowBytes);
    dout_desc_ = ptx::k_major_descriptor(rows + wg_ * 2 * kRowBytes + kRowBytes);
    k_desc_ = ptx::k_major_descriptor(stages);
    v_desc_ = ptx::k_major_descriptor(stages + kTileBytes);
    k_rows_desc_ = ptx::mn_major_descriptor(stages, kBlock);
  }

  __device__ __forceinline__ void run() {
    std::uint32_t q_parity = 0;
    while (true) {
      ptx::mbarrier_wait(ptx::smem_address(&shared_.q_full[wg_]), q_parity);
      q_parity ^= 1;
      const Tile tile = read_tile();
      if (tile.num_tokens < 0) return;
      load_statistics(tile);
      attend(tile);
      finish(tile);
    }
  }

 private:
  static constexpr int kTileBytes = kBlock * kDim * 2;
  static constexpr int kRowBytes = 64 * kDim * 2;
  static constexpr int kScores = kHalf / 2;
  static constexpr int kSums = kDim / 2;

  __device__ __forceinline__ int row_of(int h) const {
    return static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane_ / 4 + 8 * h;
  }
  __device__ __forceinline__ bool is_live(const Tile& tile, int h) const {
    return row_of(h) % g_.slot_rows < d_.g.group_size && token_[h] < tile.num_tokens;
  }
  __device__ __forceinline__ int head_of(const Tile& tile, int h) const {
    return tile.kv_head * d_.g.group_size + row_of(h) % g_.slot_rows;
  }
  __device__ __forceinline__ std::int64_t statistic(const Tile& tile, int h) const {
    return d_.g.statistic(tile.row0 + token_[h], head_of(tile, h));
  }
  __device__ __forceinline__ void load_statistics(const Tile& tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      statistics_[h] = {INFINITY, 0.0f};
      if (is_live(tile, h)) statistics_[h] = d_.g.statistics[statistic(tile, h)];
    }
  }

  /// d = the warpgroup's rows times half `half` of the keys of `keys`.
  __device__ __forceinline__ void multiply(float (&d)[kScores], std::uint64_t rows,
                                           std::uint64_t keys, int half) {
    keys = ptx::advance(keys, stage_ * 2 * kTileBytes + half * kHalf * kPanelBytes);
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      ptx::Wgmma<T, kHalf>::template ss<0>(d, ptx::advance(rows, k_major_step(64, i)),
                                           ptx::advance(keys, k_major_step(kBlock, i)), i != 0);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void multiply_add(const std::uint32_t (&ds)[kHalf / 16][4], int half) {
    const std::uint64_t keys =
        ptx::advance(k_rows_desc_, stage_ * 2 * kTileBytes + half * kHalf * kPanelBytes);
#pragma unroll
    for (int i = 0; i < kHalf / 16; ++i) {
      ptx::Wgmma<T, kDim>::template rs<1>(dq_, ds[i], ptx::advance(keys, mn_major_step(i)), 1);
    }
    ptx::wgmma_commit();
  }

  /// S -> P, in place; 0 for keys that a row does not see.
  __device__ __forceinline__ void probabilities(float (&s)[kScores], const int (&limit)[2],
                                                int half) const {
    const float scale = d_.scale_log2;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      s[i] = ptx::ex2(fmaf(s[i], scale, -statistics_[i / 2 % 2].lse));
    }
    mask(s, limit, half);
  }
  __device__ __forceinline__ void mask(float (&x)[kScores], const int (&limit)[2], int half) const {
    if (__all_sync(~0u, min(limit[0], limit[1]) >= half * kHalf + kHalf - 1)) return;
    const int column = lane_ % 4 * 2 + half * kHalf;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (i / 4 * 8 + i % 2 > limit[i / 2 % 2] - column) x[i] = 0.0f;
    }
  }
  /// dS = P (dP - delta), packed.
  __device__ __forceinline__ void score_gradients(const float (&p)[kScores], float (&dp)[kScores],
                                                  const int (&limit)[2], int half,
                                                  std::uint32_t (&ds)[kHalf / 16][4]) const {
#pragma unroll
    for (int i = 0; i < kScores; ++i) dp[i] = p[i] * (dp[i] - statistics_[i / 2 % 2].delta);
    mask(dp, limit, half);  // 0 times a NaN of V is NaN
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      ds[i / 4][i % 4] = ptx::pack<T>(dp[2 * i], dp[2 * i + 1]);
    }
#pragma unroll
    for (int i = 0; i < kHalf / 16; ++i) ptx::pin(ds[i]);
  }

  __device__ __forceinline__ void attend(const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) dq_[i] = 0.0f;
    ended_ = false;
    while (find(INT32_MAX)) {
      int limit[2];
      limits<kBlock>(limit, tile.position);
      ptx::mbarrier_wait(ptx::smem_address(&shared_.v_full[stage_]), parity_);
      add_block(limit);
      step();
    }
    arrive(shared_.q_empty[wg_]);
  }

  __device__ __forceinline__ void add_block(const int (&limit)[2]) {
    float s[2][kScores];
    float dp[2][kScores];
    std::uint32_t ds[2][kHalf / 16][4];
    ptx::pin(dq_);
    ptx::wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      multiply(s[half], q_desc_, k_desc_, half);
      multiply(dp[half], dout_desc_, v_desc_, half);
    }
    ptx::wgmma_wait<3>();
    ptx::pin(s[0]);
    probabilities(s[0], limit, 0);
    ptx::wgmma_wait<2>();
    ptx::pin(dp[0]);
    score_gradients(s[0], dp[0], limit, 0, ds[0]);
    ptx::wgmma_fence();
    multiply_add(ds[0], 0);
    ptx::wgmma_wait<2>();
    ptx::pin(s[1]);
    probabilities(s[1], limit, 1);
    ptx::wgmma_wait<1>();
    ptx::pin(dp[1]);
    arrive(shared_.v_empty[stage_]);
    score_gradients(s[1], dp[1], limit, 1, ds[1]);
    ptx::wgmma_fence();
    multiply_add(ds[1], 1);
    ptx::wgmma_wait<0>();
    ptx::pin(dq_);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kHalf / 16; ++i) ptx::pin(ds[half][i]);
    }
    arrive(shared_.k_empty[stage_]);
  }

  __device__ __forceinline__ void finish(const Tile& tile) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool live = is_live(tile, h);
      T* const to = reinterpret_cast<T*>(d_.g.dq.at(tile.row0 + token_[h], head_of(tile, h)));
      float largest = 0.0f;
#pragma unroll
      for (int i = 2 * h; i < kSums; i += 4) {
        const float x = dq_[i] * d_.scale;
        const float y = dq_[i + 1] * d_.scale;
        largest = ptx::max_nan(largest, ptx::max_nan(fabsf(x), fabsf(y)));
        if (live) {
          *reinterpret_cast<std::uint32_t*>(to + ptx::accumulator_column(i)) = ptx::pack<T>(x, y);
        }
      }
      largest = ptx::max_nan(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = ptx::max_nan(largest, __shfl_xor_sync(~0u, largest, 2));
      if (live && lane_ % 4 == 0) {
        d_.work.redo_q[statistic(tile, h)] = largest <= kLargest<T> ? 0 : 1;
      }
    }
  }

  const BackwardParams& d_;
  std::uint64_t q_desc_, dout_desc_;  ///< the warpgroup's rows
  std::uint64_t k_desc_, v_desc_;     ///< of stage 0, keys on N
  std::uint64_t k_rows_desc_;         ///< of stage 0, keys as the reduction axis
  RowStatistics statistics_[2];
  float dq_[kSums];
};

template <class T, int kDim>
__global__ void __launch_bounds__(kUnionThreads, 1)
    dq_kernel(const __grid_constant__ DqParams g, const __grid_constant__ CUtensorMap q_map,
              const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
              const __grid_constant__ CUtensorMap dout_map) {
  extern __shared__ __align__(1024) std::uint8_t smem[];
  constexpr int kRowsBytes = 2 * 2 * 64 * kDim * 2;
  const std::uint32_t rows = ptx::smem_address(smem);
  const std::uint32_t stages = rows + kRowsBytes;
  UnionShared& shared =
      *reinterpret_cast<UnionShared*>(smem + kRowsBytes + g.walk.stages * 2 * kBlock * kDim * 2);
  if (threadIdx.x == 0) {
    for (int i = 0; i < g.walk.stages; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&shared.k_full[i]), 1);
      ptx::mbarrier_init(ptx::smem_address(&shared.v_full[i]), 1);
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
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < 4) {
    ptx::decrease_registers<40>();
    if (warp == 0) {
      if (threadIdx.x == 0) load_keys<kDim, kBlock>(g.walk, shared, stages, k_map, v_map);
    } else if (warp == 1) {
      if (g.backward.g.block_ids != nullptr) {
        plan_unions<kBlock>(g.walk, shared);
      } else {
        plan_visible_blocks(g.walk, shared);
      }
    } else if (warp == 2) {
      if (threadIdx.x == 64) load_rows<kDim>(g.walk, shared, rows, q_map, dout_map);
    }
  } else {
    ptx::increase_registers<232>();
    DqConsumer<T, kDim>(g, shared, rows, stages).run();
  }
}

}  // namespace msa::cuda::sm90::bwd
