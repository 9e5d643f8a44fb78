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
#include "cuda/sm90/sparse_attention_union.cuh"
#include "cuda/sm90/sparse_attention_widen.cuh"

namespace msa::cuda::sm90 {

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
class UnionConsumer : UnionWalk {
 public:
  __device__ __forceinline__ UnionConsumer(const UnionParams& g, UnionShared& shared,
                                           std::uint32_t queries, std::uint32_t stages)
      : UnionWalk(g, shared) {
    q_desc_ = ptx::k_major_descriptor(queries + wg_ * 64 * kDim * 2);
    k_desc_ = ptx::k_major_descriptor(stages);
    v_desc_ = ptx::mn_major_descriptor(stages + kTileBytes, kBlock);
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
        limits<kBlock>(limit, tile.position);
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
        limits<kBlock>(limit, tile.position);
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

  std::uint64_t q_desc_, k_desc_, v_desc_;
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
