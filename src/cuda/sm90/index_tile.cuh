// SPDX-License-Identifier: Apache-2.0
//
// S = Q K^T of 256 (or 128) rows (tokens x index heads, which share their keys) against all visible
// keys, 128 at a time, reduced to the maximum of each block while the tensor cores go on with the
// next tiles. docs/kernels/sm90_indexer.md has the picture and the cycle budget.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/batch.cuh"
#include "cuda/common/launch.hpp"
#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/wgmma.cuh"
#include "cuda/common/swizzle.cuh"
#include "cuda/sm90/index_plan.hpp"

namespace msa::cuda::sm90 {

/// Threads of a CTA: consumer warpgroups of 64 rows each, and one producer warpgroup.
template <int kConsumers>
inline constexpr int kIndexThreads = (kConsumers + 1) * 128;

/// Shared memory of a CTA, in bytes from a multiple of 1024.
template <class Element, int kConsumers>
struct IndexSmem {
  static constexpr int kRows = kConsumers * 64;
  static constexpr int kStages = 8 / sizeof(Element);
  static constexpr int kPanels = kIndexDim * sizeof(Element) / kPanelBytes;
  static constexpr int kPanelDim = kPanelBytes / sizeof(Element);
  static constexpr std::uint32_t kQBytes = kRows * kIndexDim * sizeof(Element);
  static constexpr std::uint32_t kStageBytes = kIndexTileKeys * kIndexDim * sizeof(Element);
  static constexpr std::uint32_t kQ = 0;
  static constexpr std::uint32_t kK = kQ + kQBytes;
  static constexpr std::uint32_t kFull = kK + kStages * kStageBytes;  // mbarriers
  static constexpr std::uint32_t kEmpty = kFull + kStages * 8;
  static constexpr std::uint32_t kQFull = kEmpty + kStages * 8;
  static constexpr std::uint32_t kMissing = kQFull + 8;  // per stage: bit b, block b has no page
  static constexpr std::uint32_t kBytes = kMissing + kStages * 4;
  static constexpr std::uint32_t kAllocated = kBytes + 1024;  // so that the start can be aligned
};

struct IndexTileParams {
  DeviceBatch batch;
  float scale;
  int num_heads;
  int log2_heads;   ///< of the rows of a token: heads up to the next power of two
  int chunk_tiles;  ///< key tiles that one CTA scores at most; CTA (., y) starts at y times that
};

/// The rows of a CTA.
struct IndexTile {
  DeviceSequence sequence;
  std::int64_t first_query;  ///< of the sequence
  int num_queries;           ///< 0: nothing to do
  int begin;                 ///< key tiles [begin, end)
  int end;
};

/// The row whose maxima a lane gets.
struct IndexRow {
  bool live;
  int head;
  int position;
  std::int64_t query;  ///< packed
};

/// Sequence b takes the row tiles from q_begin / tokens + b on: enough for its own, and known
/// without a scan over all lengths.
template <int kRows>
__device__ __forceinline__ IndexTile find_index_tile(const IndexTileParams& params,
                                                     std::int64_t t) {
  const DeviceBatch& batch = params.batch;
  const int log2_tokens = 31 - __clz(kRows) - params.log2_heads;
  std::int64_t low = 0;
  std::int64_t high = batch.batch_size;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    const std::int64_t first = (detail::q_begin(batch, middle) >> log2_tokens) + middle;
    (first <= t ? low : high) = middle;
  }
  IndexTile tile;
  tile.sequence = sequence_at(batch, low);
  tile.first_query = (t - (tile.sequence.q_begin >> log2_tokens) - low) << log2_tokens;
  const std::int64_t left = tile.sequence.q_len - tile.first_query;
  const std::int64_t tokens = std::int64_t{1} << log2_tokens;
  tile.num_queries = tile.first_query < 0 || left <= 0 ? 0 : static_cast<int>(min(left, tokens));
  const std::int64_t last = tile.sequence.position(tile.first_query + tile.num_queries - 1);
  const std::int64_t num_tiles = last < 0 ? 0 : last / kIndexTileKeys + 1;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * params.chunk_tiles;
  tile.begin = static_cast<int>(begin);
  tile.end = static_cast<int>(max(begin, min(begin + params.chunk_tiles, num_tiles)));
  return tile;
}

/// Loads the key tiles end - 1 .. begin into the ring. One warp. `shared`: each CTA of the cluster
/// loads half of each tile for both.
template <class Element, int kBlockSize, int kConsumers>
__device__ __forceinline__ void load_index_keys(const DeviceBatch& batch, const IndexTile& tile,
                                                const CUtensorMap& k_map, std::uint32_t smem,
                                                bool shared) {
  using Smem = IndexSmem<Element, kConsumers>;
  constexpr int kBlocks = kIndexTileKeys / kBlockSize;  // in a tile
  constexpr int kBoxes = kIndexTileKeys / kIndexBoxKeys;
  constexpr std::uint32_t kBoxBytes = kIndexBoxKeys * kPanelBytes;
  static_assert(kBoxes == kIndexCluster && kBlockSize % kIndexBoxKeys == 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = static_cast<int>(ptx::cluster_cta_rank());
  const bool paged = batch.page_table != nullptr;
  int pages[kBlocks] = {};  // of the tile `lane` before the first of each 32
  int stage = 0;
  std::uint32_t parity = 1;
  for (int t = tile.end - 1; t >= tile.begin; --t) {
    const int nth = (tile.end - 1 - t) % 32;
    if (paged && nth == 0) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const std::int64_t block = std::int64_t{t - lane} * kBlocks + b;
        const bool exists = t - lane >= 0 && block * kBlockSize < tile.sequence.k_len;
        pages[b] = exists ? static_cast<int>(page_of(batch, tile.sequence.batch_idx, block)) : -1;
      }
    }
    int page[kBlocks];
    std::uint32_t missing = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      page[b] = paged ? __shfl_sync(~0u, pages[b], nth) : 0;
      missing |= page[b] < 0 ? 1u << b : 0u;
    }
    ptx::mbarrier_wait(smem + Smem::kEmpty + stage * 8, parity);
    if (lane == 0) {
      const std::uint32_t full = smem + Smem::kFull + stage * 8;
      const std::uint32_t to = smem + Smem::kK + stage * Smem::kStageBytes;
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(smem + Smem::kMissing + stage * 4), "r"(missing)
                   : "memory");
      ptx::mbarrier_expect_tx(full, (kBlocks - __popc(missing)) * (Smem::kStageBytes / kBlocks));
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        const int first_key = box * kIndexBoxKeys;
        const int z = page[first_key / kBlockSize];
        if (z < 0 || (shared && box != rank)) continue;
        const int y =
            paged ? first_key % kBlockSize
                  : static_cast<int>(tile.sequence.k_begin) + t * kIndexTileKeys + first_key;
#pragma unroll
        for (int panel = 0; panel < Smem::kPanels; ++panel) {
          const std::uint32_t box_to = to + panel * kIndexTileKeys * kPanelBytes + box * kBoxBytes;
          const int x = panel * Smem::kPanelDim;
          if (shared) {
            ptx::tma_load_3d_multicast(box_to, &k_map, x, y, z, full, (1 << kIndexCluster) - 1);
          } else {
            ptx::tma_load_3d(box_to, &k_map, x, y, z, full);
          }
        }
      }
    }
    if (++stage == Smem::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
}

/// Neither CTA of a cluster may write to the other one before it has started or after it has ended.
__device__ __forceinline__ void cluster_sync() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

/// This thread's maxima of rows lane / 4 and lane / 4 + 8 over accumulators [kBegin, kBegin +
/// kCount), by three-way maxima of integers: non-negative floats are ordered as their bits are,
/// above negative ones. Half the instructions of fmaxf, and less power, which is what limits a long
/// prompt. Where bits say nothing (a negative maximum, or a NaN, which wins by its bits), fmaxf
/// does it again; NaN loses there.
template <int kBegin, int kCount>
__device__ __forceinline__ void thread_max(float (&m)[2], const float (&s)[64]) {
  constexpr int kOwn = kCount / 2;
  static_assert(kOwn % 4 == 0);
  unsigned bits[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto at = [&](int j) { return __float_as_int(s[kBegin + j / 2 * 4 + h * 2 + j % 2]); };
    int x = at(0);
    int y = at(1);
#pragma unroll
    for (int j = 2; j + 3 < kOwn; j += 4) {
      x = __vimax3_s32(x, at(j), at(j + 1));
      y = __vimax3_s32(y, at(j + 2), at(j + 3));
    }
    bits[h] = static_cast<unsigned>(max(__vimax3_s32(x, at(kOwn - 2), at(kOwn - 1)), y));
    m[h] = __uint_as_float(bits[h]);
  }
  constexpr unsigned kInfinityBits = 0x7f800000;
  if (max(bits[0], bits[1]) <= kInfinityBits) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float chain[4];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const float x = s[kBegin + j / 2 * 4 + h * 2 + j % 2];
      chain[j % 4] = j < 4 ? x : fmaxf(chain[j % 4], x);
    }
    m[h] = fmaxf(fmaxf(chain[0], chain[1]), fmaxf(chain[2], chain[3]));
  }
}

/// Joins the maxima of a quad's threads: even lanes get row lane / 4, odd ones row lane / 4 + 8.
/// Each lane gives away the row that its neighbour keeps.
__device__ __forceinline__ float quad_max(const float (&m)[2]) {
  const bool odd = threadIdx.x % 2 != 0;
  float keep = odd ? m[1] : m[0];
  keep = fmaxf(keep, __shfl_xor_sync(~0u, odd ? m[0] : m[1], 1));
  return fmaxf(keep, __shfl_xor_sync(~0u, keep, 2));
}

/// Scores the CTA's rows. Sink(params, tile, row) stands for this lane's row; take(block, score) is
/// called by whole warps for each block, newest first, then finish(); where the chunk has no keys
/// for this CTA, finish() is called only if finishes_without_keys() says so.
template <class Element, int kBlockSize, int kConsumers, class Sink>
__device__ __forceinline__ void score_index_tile(const IndexTileParams& params,
                                                 const CUtensorMap& q_map, const CUtensorMap& k_map,
                                                 const typename Sink::Params& sink_params) {
  static_assert(kConsumers == 2 || kConsumers == 4);
  using Smem = IndexSmem<Element, kConsumers>;
  extern __shared__ std::uint8_t raw[];
  const std::uint32_t smem = (ptx::smem_address(raw) + 1023) & ~1023u;
  const std::int64_t t_own = gridDim.x - 1 - blockIdx.x;  // longest first
  IndexTile tile = find_index_tile<Smem::kRows>(params, t_own);
  // Neighbouring rows of one sequence walk the same keys: the cluster loads them once.
  IndexTile peer{};
  if (ptx::cluster_size() > 1) peer = find_index_tile<Smem::kRows>(params, t_own ^ 1);
  const bool shared = tile.num_queries != 0 && peer.num_queries != 0 &&
                      tile.sequence.batch_idx == peer.sequence.batch_idx;
  if (tile.num_queries == 0) return;
  if (tile.begin >= max(tile.end, shared ? peer.end : 0) &&
      !Sink::finishes_without_keys(sink_params))
    return;
  if (shared) tile.end = max(tile.end, peer.end);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int live_rows = tile.num_queries << params.log2_heads;

  if (threadIdx.x == 0) {
    const int peer_rows = shared ? peer.num_queries << params.log2_heads : 0;
    const int active_warps = ((live_rows + 63) / 64 + (peer_rows + 63) / 64) * 4;
    for (int stage = 0; stage < Smem::kStages; ++stage) {
      ptx::mbarrier_init(smem + Smem::kFull + stage * 8, 1);
      ptx::mbarrier_init(smem + Smem::kEmpty + stage * 8, active_warps);
    }
    ptx::mbarrier_init(smem + Smem::kQFull, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (shared) cluster_sync();

  if (warpgroup == kConsumers) {
    ptx::decrease_registers<24>();
    if (threadIdx.x >= kConsumers * 128 + 32) return;
    if (lane == 0 && tile.begin < tile.end) {
      ptx::mbarrier_expect_tx(smem + Smem::kQFull, Smem::kQBytes);
#pragma unroll
      for (int panel = 0; panel < Smem::kPanels; ++panel) {
        ptx::tma_load_3d(
            smem + Smem::kQ + panel * Smem::kRows * kPanelBytes, &q_map, panel * Smem::kPanelDim, 0,
            static_cast<int>(tile.sequence.q_begin + tile.first_query), smem + Smem::kQFull);
      }
    }
    __syncwarp();
    load_index_keys<Element, kBlockSize, kConsumers>(params.batch, tile, k_map, smem, shared);
    __syncwarp();
    if (shared) cluster_sync();
    return;
  }

  // What the producer gives away: (kConsumers + 1) * 128 threads start with 96 or 168 each.
  ptx::increase_registers<kConsumers == 4 ? 112 : 240>();
  if (warpgroup * 64 >= live_rows) return;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const auto position_of = [&](int row) {
    const std::int64_t i = tile.first_query + (row >> params.log2_heads);
    return static_cast<int>(max(tile.sequence.position(i), std::int64_t{-1}));
  };
  const int own_row = warp_row + lane / 4 + lane % 2 * 8;
  const int head = own_row & ((1 << params.log2_heads) - 1);
  const IndexRow row{
      .live = own_row < live_rows && head < params.num_heads,
      .head = head,
      .position = position_of(own_row),
      .query = tile.sequence.q_begin + tile.first_query + (own_row >> params.log2_heads)};
  Sink sink(sink_params, tile, row);

  const int first_position = position_of(warp_row);
  const int limit0 = position_of(warp_row + lane / 4) - lane % 4 * 2;
  const int limit8 = position_of(warp_row + lane / 4 + 8) - lane % 4 * 2;
  const std::uint32_t peer_rank = ptx::cluster_cta_rank() ^ 1;
  const bool paged = params.batch.page_table != nullptr;
  const float scale = params.scale;
  const std::uint64_t q_desc =
      ptx::k_major_descriptor(smem + Smem::kQ + warpgroup * 64 * kPanelBytes);
  const std::uint64_t k_desc = ptx::k_major_descriptor(smem + Smem::kK);
  constexpr int kBlocks = kIndexTileKeys / kBlockSize;  // in a tile
  float m[kBlocks][2];
  const auto finish_tile = [&](int t) {
#pragma unroll
    for (int b = kBlocks - 1; b >= 0; --b) {
      // The maximum is scaled, not the scores: rounding is monotonic. NaN becomes -inf.
      sink.take(t * kBlocks + b, fmaxf(quad_max(m[b]) * scale, -INFINITY));
    }
  };

  if (tile.begin < tile.end) ptx::mbarrier_wait(smem + Smem::kQFull, 0);
  int stage = 0;
  std::uint32_t parity = 0;
#pragma unroll 1
  for (int t = tile.end - 1; t >= tile.begin; --t) {
    float s[64];
    ptx::mbarrier_wait(smem + Smem::kFull + stage * 8, parity);
    std::uint32_t missing = 0;
    if (paged && lane == 0) {  // the lane that hands the stage back, so that its read comes before
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(missing)
                   : "r"(smem + Smem::kMissing + stage * 4)
                   : "memory");
    }
    ptx::wgmma_fence();
#pragma unroll
    for (std::uint32_t step = 0; step < kIndexDim * sizeof(Element) / 32; ++step) {
      const std::uint64_t a = ptx::advance(q_desc, k_major_step(Smem::kRows, step));
      const std::uint64_t b =
          ptx::advance(k_desc, stage * Smem::kStageBytes + k_major_step(kIndexTileKeys, step));
      if constexpr (sizeof(Element) == 1) {
        ptx::Wgmma<Element, 128>::ss(s, a, b, step != 0);
      } else {
        ptx::Wgmma<Element, 128>::template ss<0>(s, a, b, step != 0);
      }
    }
    ptx::wgmma_commit();
    if (paged) missing = __shfl_sync(~0u, missing, 0);
    // The tensor cores have work; the rest of the previous tile is done meanwhile.
    if (t + 1 < tile.end) finish_tile(t + 1);
    ptx::wgmma_wait<0>();
    ptx::pin(s);
    if (lane == 0) ptx::mbarrier_arrive(smem + Smem::kEmpty + stage * 8);
    if (shared && lane == 1)
      ptx::mbarrier_arrive_remote(smem + Smem::kEmpty + stage * 8, peer_rank);
    if (++stage == Smem::kStages) {
      stage = 0;
      parity ^= 1;
    }

    const int first_key = t * kIndexTileKeys;
    if (first_key + kIndexTileKeys - 1 > first_position) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int limit = (i / 2 % 2 == 0 ? limit0 : limit8) - first_key;
        if (i / 4 * 8 + i % 2 > limit) s[i] = -INFINITY;
      }
    }
    constexpr int kCount = 64 / kBlocks;
    thread_max<0, kCount>(m[0], s);
    if constexpr (kBlocks == 2) thread_max<kCount, kCount>(m[1], s);
    if (missing != 0) {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if ((missing >> b & 1) != 0) m[b][0] = m[b][1] = -INFINITY;
      }
    }
  }
  if (tile.begin < tile.end) finish_tile(tile.begin);
  sink.finish();
  if (shared) cluster_sync();
}

template <class Args>
IndexTileParams make_index_params(const Args& args, float scale, const IndexGrid& grid) {
  return {.batch = make_device_batch(args),
          .scale = static_cast<float>(scale_or_default(scale, args.problem.index_dim)),
          .num_heads = args.problem.num_kv_heads,
          .log2_heads = log2_index_heads(args.problem),
          .chunk_tiles = grid.chunk_tiles};
}

template <class Element, int kConsumers>
LaunchConfig index_launch(const IndexGrid& grid) {
  return {.grid = dim3(static_cast<unsigned>(grid.row_tiles), static_cast<unsigned>(grid.chunks)),
          .threads = kIndexThreads<kConsumers>,
          .smem_bytes = IndexSmem<Element, kConsumers>::kAllocated,
          .cluster = grid.share_keys ? kIndexCluster : 1};
}

}  // namespace msa::cuda::sm90
