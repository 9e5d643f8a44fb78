// SPDX-License-Identifier: Apache-2.0
//
// dK and dV. A CTA takes an item, keeps its K and V in shared memory and its sums in registers, and
// lets the queries of the item pass by in tiles of 64 rows (query, head of the group).
//
//   warps 0-7   two warpgroups, 64 keys of the block each: S^T = K Q^T, dP^T = V dO^T,
//               dV += P^T dO, dK += dS^T Q; P^T and dS^T never leave their registers
//   warp 8      producer: items by number, their K and V, tiles of Q and dO (TMA, one box a query)
#pragma once

#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/math.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/wgmma.cuh"
#include "cuda/common/swizzle.cuh"
#include "cuda/sm90/sparse_attention_bwd.cuh"

namespace msa::cuda::sm90::bwd {

inline constexpr int kDkvThreads = 384;
inline constexpr int kDkvConsumers = 256;
inline constexpr int kDkvRows = 64;  ///< of a tile
inline constexpr int kDkvStages = 4;

template <int kDim>
struct DkvSmem {
  static constexpr std::uint32_t kKeyBytes = kBlock * kDim * 2;    // K or V
  static constexpr std::uint32_t kRowBytes = kDkvRows * kDim * 2;  // Q or dO
  static constexpr std::uint32_t kTiles = 2 * kKeyBytes;           // Q and dO of each stage
  static constexpr std::uint32_t kStatistics = kTiles + kDkvStages * 2 * kRowBytes;
  static constexpr std::uint32_t kVisible = kStatistics + kDkvStages * kDkvRows * 8;
  static constexpr std::uint32_t kWhole = kVisible + kDkvStages * kDkvRows * 4;
  static constexpr std::uint32_t kItem = kWhole + kDkvStages * 16;
  static constexpr std::uint32_t kBarriers = kItem + sizeof(Item);
  static constexpr std::uint32_t kFull = kBarriers;
  static constexpr std::uint32_t kEmpty = kFull + kDkvStages * 8;
  static constexpr std::uint32_t kKeysFull = kEmpty + kDkvStages * 8;
  static constexpr std::uint32_t kKeysEmpty = kKeysFull + 8;
  static constexpr std::uint32_t kBytes = kKeysEmpty + 8;
  static_assert(kBytes <= 232448);
};

/// Rows of Q and dO in shared memory: groups of 8, each group kDim / 64 panels of 8 x 128 bytes, so
/// that one box of TMA is one query. The reduction axis is the head's dimension.
template <int kDim>
__device__ __forceinline__ std::uint64_t rows_by_dim_descriptor(std::uint32_t address) {
  const std::uint32_t low = (address & 0x3FFFF) >> 4 | 1u << 16;
  constexpr std::uint32_t kHigh = kDim / 64 * 1024 >> 4 | 1u << 30;
  return std::uint64_t{kHigh} << 32 | low;
}
__host__ __device__ constexpr std::uint32_t rows_by_dim_step(std::uint32_t step) {
  return step / 4 * 1024 + step % 4 * 32;
}
/// The same rows as the reduction axis, the head's dimension as N.
template <int kDim>
__device__ __forceinline__ std::uint64_t dim_by_rows_descriptor(std::uint32_t address) {
  const std::uint32_t low = (address & 0x3FFFF) >> 4 | (1024u >> 4) << 16;
  constexpr std::uint32_t kHigh = kDim / 64 * 1024 >> 4 | 1u << 30;
  return std::uint64_t{kHigh} << 32 | low;
}
template <int kDim>
__host__ __device__ constexpr std::uint32_t dim_by_rows_step(std::uint32_t step) {
  return step * (2 * kDim / 64 * 1024);
}

/// One warp. A query that a tile lacks is read past the tensor's end, which TMA fills with zeros.
template <int kDim>
__device__ __forceinline__ void produce_items(const BackwardParams& g, const CUtensorMap& q_map,
                                              const CUtensorMap& k_map, const CUtensorMap& v_map,
                                              const CUtensorMap& dout_map, std::uint32_t smem,
                                              char* smem_generic) {
  using S = DkvSmem<kDim>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int log2_group = g.log2_group_size;
  const int group = 1 << log2_group;
  const int tile_queries = kDkvRows >> log2_group;
  const int nobody = static_cast<int>(g.g.batch.total_q);
  const int num_items = min(g.work.counters->num_items, g.work.max_items);
  std::uint32_t use = 0;  // tiles so far
  for (std::uint32_t ordinal = 0;; ++ordinal) {
    int number = lane == 0 ? atomicAdd(&g.work.counters->ticket, 1) : 0;
    number = __shfl_sync(~0u, number, 0);
    ptx::mbarrier_wait(smem + S::kKeysEmpty, ordinal % 2 ^ 1);
    Item item{.head = -1};
    if (number < num_items) item = g.work.items[number];
    if (lane == 0) {
      *reinterpret_cast<Item*>(smem_generic + S::kItem) = item;
      const std::uint32_t full = smem + S::kKeysFull;
      if (item.head < 0 || item.count == 0) {
        ptx::mbarrier_arrive(full);
      } else {
        ptx::mbarrier_expect_tx(full, 2 * S::kKeyBytes);
#pragma unroll
        for (int panel = 0; panel < kDim / 64; ++panel) {
          const std::uint32_t to = smem + panel * kBlock * kPanelBytes;
          ptx::tma_load_4d(to, &k_map, panel * 64, item.row, item.head, 0, full);
          ptx::tma_load_4d(to + S::kKeyBytes, &v_map, panel * 64, item.row, item.head, 0, full);
        }
      }
    }
    __syncwarp();
    if (item.head < 0) return;

    const std::int32_t* const rows =
        g.g.lists.rows == nullptr
            ? nullptr
            : g.g.lists.rows + item.head * g.g.lists.rows_per_head + item.begin;
    // The tile's queries, one or two a lane.
    const auto queries_of = [&](int tile, int(&queries)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int in_tile = lane + 32 * i;
        const int at = tile * tile_queries + in_tile;
        queries[i] = in_tile >= tile_queries || at >= item.count ? nobody
                     : rows == nullptr                           ? item.begin + at
                                                                 : rows[at];
      }
    };
    // Of the tile's rows lane and lane + 32.
    const auto statistics_of = [&](const int(&queries)[2], RowStatistics(&statistics)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = lane + 32 * i;
        const int in_tile = row >> log2_group;
        const int first = __shfl_sync(~0u, queries[0], in_tile % 32);
        const int second = __shfl_sync(~0u, queries[1], in_tile % 32);
        const int query = in_tile < 32 ? first : second;
        statistics[i] = {0.0f, 0.0f};
        if (query != nobody) {
          statistics[i] =
              g.g.statistics[g.g.statistic(query, item.head * group + (row & (group - 1)))];
        }
      }
    };
    const int num_tiles = (item.count + tile_queries - 1) / tile_queries;
    int queries[2], next_queries[2];
    RowStatistics statistics[2];
    queries_of(0, queries);
    queries_of(1, next_queries);
    statistics_of(queries, statistics);
    for (int tile = 0; tile < num_tiles; ++tile, ++use) {
      const std::uint32_t stage = use % kDkvStages;
      int later_queries[2];
      RowStatistics next_statistics[2];
      queries_of(tile + 2, later_queries);
      statistics_of(next_queries, next_statistics);
      ptx::mbarrier_wait(smem + S::kEmpty + stage * 8, (use / kDkvStages & 1) ^ 1);
      const std::uint32_t full = smem + S::kFull + stage * 8;
      if (lane == 0) ptx::mbarrier_expect_tx(full, 2 * S::kRowBytes);
      __syncwarp();
      bool whole = true;
      const std::uint32_t to = smem + S::kTiles + stage * 2 * S::kRowBytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int in_tile = lane + 32 * i;
        if (in_tile < tile_queries) {
          const int query = queries[i];
          const int row = in_tile << log2_group;
          const auto load = [&](const CUtensorMap& map, std::uint32_t begin) {
            if (log2_group >= 3) {
              ptx::tma_load_5d(begin + row * (kDim * 2), &map, 0, 0, 0,
                               item.head << (log2_group - 3), query, full);
            } else {
              for (int panel = 0; panel < kDim / 64; ++panel) {
                ptx::tma_load_5d(
                    begin + row / 8 * (kDim * 16) + panel * 1024 + row % 8 * kPanelBytes, &map, 0,
                    item.head << log2_group, panel, 0, query, full);
              }
            }
          };
          load(q_map, to);
          load(dout_map, to + S::kRowBytes);
          const int seen = query == nobody ? 0 : min(query - item.unseen, item.num_tokens);
          whole = whole && seen == kBlock;
          reinterpret_cast<int*>(smem_generic + S::kVisible)[stage * kDkvRows + in_tile] = seen;
        }
        reinterpret_cast<RowStatistics*>(
            smem_generic + S::kStatistics)[stage * kDkvRows + in_tile] = statistics[i];
      }
      whole = __all_sync(~0u, whole);
      if (lane == 0) {
        reinterpret_cast<int4*>(smem_generic + S::kWhole)[stage] = {whole ? 1 : 0, 0, 0, 0};
      }
      ptx::mbarrier_arrive(full);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        queries[i] = next_queries[i];
        next_queries[i] = later_queries[i];
        statistics[i] = next_statistics[i];
      }
    }
  }
}

/// One warpgroup. Thread t holds of every product rows t / 32 * 16 + t % 32 / 4 (h = 0) and 8 below
/// (h = 1): keys.
template <class T, int kDim>
class DkvConsumer {
 public:
  __device__ __forceinline__ DkvConsumer(const BackwardParams& g, std::uint32_t smem,
                                         const char* smem_generic)
      : g_(g),
        smem_(smem),
        smem_generic_(smem_generic),
        wg_(__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0)) {
    const std::uint32_t keys = smem + wg_ * 64 * kPanelBytes;
    k_desc_ = ptx::k_major_descriptor(keys);
    v_desc_ = ptx::k_major_descriptor(keys + S::kKeyBytes);
    rows_desc_ = rows_by_dim_descriptor<kDim>(smem + S::kTiles);
    dims_desc_ = dim_by_rows_descriptor<kDim>(smem + S::kTiles);
  }

  __device__ __forceinline__ void run() {
    for (std::uint32_t ordinal = 0;; ++ordinal) {
      ptx::mbarrier_wait(smem_ + S::kKeysFull, ordinal % 2);
      const Item item = *reinterpret_cast<const Item*>(smem_generic_ + S::kItem);
      if (item.head < 0) return;
#pragma unroll
      for (int i = 0; i < kSums; ++i) dk_[i] = dv_[i] = 0.0f;
      const int tile_queries = kDkvRows >> g_.log2_group_size;
      const int num_tiles = (item.count + tile_queries - 1) / tile_queries;
#pragma unroll 1
      for (int tile = 0; tile < num_tiles; ++tile) add_tile();
      ptx::mbarrier_arrive(smem_ + S::kKeysEmpty);
      finish(item);
    }
  }

 private:
  using S = DkvSmem<kDim>;
  static constexpr int kScores = kDkvRows / 2;
  static constexpr int kSums = kDim / 2;

  /// Of the columns of accumulators i to i + 3: (LSE, delta) of i and i + 2, then of the others.
  __device__ __forceinline__ float4 statistics(int i) const {
    return *reinterpret_cast<const float4*>(smem_generic_ + S::kStatistics +
                                            (stage_row() + ptx::accumulator_column(i)) *
                                                sizeof(RowStatistics));
  }
  __device__ __forceinline__ int stage_row() const { return static_cast<int>(stage_) * kDkvRows; }
  /// Whether the thread's key of accumulator i is visible to that of its column.
  __device__ __forceinline__ bool is_visible(int i) const {
    const int in_tile = ptx::accumulator_column(i) >> g_.log2_group_size;
    const int seen =
        reinterpret_cast<const int*>(smem_generic_ + S::kVisible)[stage_row() + in_tile];
    return wg_ * 64 + ptx::accumulator_row(i) < seen;
  }
  __device__ __forceinline__ void pin_sums() {
    ptx::pin(dk_);
    ptx::pin(dv_);
  }

  __device__ __forceinline__ void add_tile() {
    ptx::mbarrier_wait(smem_ + S::kFull + stage_ * 8, parity_);
    const bool whole = reinterpret_cast<const int4*>(smem_generic_ + S::kWhole)[stage_].x != 0;
    const std::uint32_t q_at = stage_ * 2 * S::kRowBytes;
    const std::uint32_t dout_at = q_at + S::kRowBytes;
    float s[kScores];
    float dp[kScores];
    pin_sums();
    ptx::wgmma_fence();
    multiply(s, k_desc_, ptx::advance(rows_desc_, q_at));
    multiply(dp, v_desc_, ptx::advance(rows_desc_, dout_at));
    ptx::wgmma_wait<1>();
    ptx::pin(s);
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      const float4 rows = statistics(i);
      const float scale = g_.scale_log2;
      s[i] = ptx::ex2(fmaf(s[i], scale, -rows.x));
      s[i + 1] = ptx::ex2(fmaf(s[i + 1], scale, -rows.z));
      s[i + 2] = ptx::ex2(fmaf(s[i + 2], scale, -rows.x));
      s[i + 3] = ptx::ex2(fmaf(s[i + 3], scale, -rows.z));
    }
    if (!whole) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] = is_visible(i) ? s[i] : 0.0f;
    }
    std::uint32_t p[kDkvRows / 16][4];
    pack(s, p);
    ptx::wgmma_fence();
    multiply_add(dv_, p, ptx::advance(dims_desc_, dout_at));
    ptx::wgmma_wait<1>();
    ptx::pin(dp);
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      const float4 rows = statistics(i);
      dp[i] = s[i] * (dp[i] - rows.y);
      dp[i + 1] = s[i + 1] * (dp[i + 1] - rows.w);
      dp[i + 2] = s[i + 2] * (dp[i + 2] - rows.y);
      dp[i + 3] = s[i + 3] * (dp[i + 3] - rows.w);
    }
    if (!whole) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) dp[i] = is_visible(i) ? dp[i] : 0.0f;
    }
    std::uint32_t ds[kDkvRows / 16][4];
    pack(dp, ds);
    ptx::wgmma_fence();
    multiply_add(dk_, ds, ptx::advance(dims_desc_, q_at));
    ptx::wgmma_wait<0>();
    pin_sums();
#pragma unroll
    for (int i = 0; i < kDkvRows / 16; ++i) {
      ptx::pin(p[i]);
      ptx::pin(ds[i]);
    }
    ptx::mbarrier_arrive(smem_ + S::kEmpty + stage_ * 8);
    if (++stage_ == kDkvStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

  /// d = 64 keys times the tile's rows.
  __device__ __forceinline__ void multiply(float (&d)[kScores], std::uint64_t keys,
                                           std::uint64_t rows) {
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      ptx::Wgmma<T, kDkvRows>::template ss<0>(d, ptx::advance(keys, k_major_step(kBlock, i)),
                                              ptx::advance(rows, rows_by_dim_step(i)), i != 0);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void multiply_add(float (&d)[kSums],
                                               const std::uint32_t (&a)[kDkvRows / 16][4],
                                               std::uint64_t rows) {
#pragma unroll
    for (int i = 0; i < kDkvRows / 16; ++i) {
      ptx::Wgmma<T, kDim>::template rs<1>(d, a[i], ptx::advance(rows, dim_by_rows_step<kDim>(i)),
                                          1);
    }
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void pack(const float (&from)[kScores],
                                       std::uint32_t (&to)[kDkvRows / 16][4]) {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) {
      to[i / 4][i % 4] = ptx::pack<T>(from[2 * i], from[2 * i + 1]);
    }
#pragma unroll
    for (int i = 0; i < kDkvRows / 16; ++i) ptx::pin(to[i]);
  }

  __device__ __forceinline__ void finish(const Item& item) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) dk_[i] *= g_.scale;
    if (item.slot >= 0) {
      float* const to =
          g_.work.partials + std::int64_t{item.slot} * (2 * kBlock * kDim) + wg_ * 64 * kDim;
      store_partial(dk_, to);
      store_partial(dv_, to + kBlock * kDim);
      return;
    }
    bool bad = store(dk_, g_.g.dk, item);
    bad |= store(dv_, g_.g.dv, item);
    if (bad) g_.work.redo_kv[item.head * g_.work.num_bins + item.bin] = 1;
  }
  __device__ __forceinline__ void store_partial(const float (&d)[kSums], float* to) {
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      *reinterpret_cast<float2*>(to + ptx::accumulator_row(i) * kDim + ptx::accumulator_column(i)) =
          make_float2(d[i], d[i + 1]);
    }
  }
  /// Whether a number is not finite.
  __device__ __forceinline__ bool store(const float (&d)[kSums], const TokenRows& to,
                                        const Item& item) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {
      const int key = wg_ * 64 + ptx::accumulator_row(i);
      if (key >= item.num_tokens) continue;
      largest = ptx::max_nan(largest, ptx::max_nan(fabsf(d[i]), fabsf(d[i + 1])));
      T* const row = reinterpret_cast<T*>(to.at(item.row + key, item.head));
      *reinterpret_cast<std::uint32_t*>(row + ptx::accumulator_column(i)) =
          ptx::pack<T>(d[i], d[i + 1]);
    }
    return !(largest <= kLargest<T>);
  }

  const BackwardParams& g_;
  std::uint32_t smem_;
  const char* smem_generic_;
  int wg_;
  std::uint64_t k_desc_, v_desc_;        ///< of the warpgroup's 64 keys
  std::uint64_t rows_desc_, dims_desc_;  ///< of stage 0's Q, as B of either kind
  std::uint32_t stage_ = 0;
  std::uint32_t parity_ = 0;
  float dk_[kSums];
  float dv_[kSums];
};

/// Persistent: a CTA takes items by number until none is left.
template <class T, int kDim>
__global__ void __launch_bounds__(kDkvThreads, 1)
    dkv_kernel(const __grid_constant__ BackwardParams g, const __grid_constant__ CUtensorMap q_map,
               const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map,
               const __grid_constant__ CUtensorMap dout_map) {
  using S = DkvSmem<kDim>;
  extern __shared__ __align__(1024) char smem_generic[];
  const std::uint32_t smem = ptx::smem_address(smem_generic);
  if (threadIdx.x == 0) {
    for (std::uint32_t i = 0; i < kDkvStages; ++i) {
      ptx::mbarrier_init(smem + S::kFull + i * 8, 1 + 32);  // expect_tx, and every lane
      ptx::mbarrier_init(smem + S::kEmpty + i * 8, kDkvConsumers);
    }
    ptx::mbarrier_init(smem + S::kKeysFull, 1);
    ptx::mbarrier_init(smem + S::kKeysEmpty, kDkvConsumers);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < kDkvConsumers / 32) {
    ptx::increase_registers<224>();
    DkvConsumer<T, kDim>(g, smem, smem_generic).run();
  } else {
    ptx::decrease_registers<56>();
    if (warp == kDkvConsumers / 32) {
      produce_items<kDim>(g, q_map, k_map, v_map, dout_map, smem, smem_generic);
    }
  }
}

}  // namespace msa::cuda::sm90::bwd
