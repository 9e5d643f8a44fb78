// SPDX-License-Identifier: Apache-2.0
//
// Partial results of each (query, block).
//
// Partials of a row (one query head of one token and slot) are kDim f16 numbers, the normalised
// output times 2^exponent, its largest one in [2^14, 2^15): 11 bits wherever V's magnitude lies,
// down to 2^-29 of the row's largest. A row lies in the order of the accumulators: chunk c of 64
// bytes holds for each lane q of a quad the column pairs 8 (4 c + i) + 2 q, i = 0 .. 3. Chunk c of
// up to 8 rows of a (token, slot) follow each other, so that a warp writes 512 bytes at once.
#pragma once

#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/math.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/wgmma.cuh"
#include "cuda/common/swizzle.cuh"
#include "cuda/sm90/attention_row.cuh"
#include "cuda/sm90/sparse_attention_kv_outer.cuh"

namespace msa::cuda::sm90::kv_outer {

inline constexpr int kWarpgroups = 3;  // of consumers
inline constexpr int kThreads = (kWarpgroups + 1) * 128;
inline constexpr int kTileRows = 64;  // of a warpgroup: 64 / group_size tokens
inline constexpr int kQStages = 2;    // of each warpgroup
inline constexpr int kKvStages = 2;
inline constexpr int kOrders = 4;         // items on their way from the scheduler to the producers
inline constexpr int kMaxSegments = 256;  // of a launch
inline constexpr std::int8_t kRecompute = -128;  // exponent of a row for the merge to compute

/// Elements between the 64-byte chunks of a row of partials.
__device__ __forceinline__ int partial_chunk_stride(int log2_group_size) {
  return 32 << (log2_group_size < 3 ? log2_group_size : 3);
}
/// Elements from row 0 of a (token, slot) to the first chunk of row `row`.
template <int kDim>
__device__ __forceinline__ int partial_offset(int log2_group_size, int row) {
  return log2_group_size < 3 ? row * 32 : row / 8 * 8 * kDim + row % 8 * 32;
}

/// Partials of the tokens [first_token, first_token + tokens): row
/// ((token * num_kv_heads + kv head) * top_k + slot) * group_size + head in the group.
struct Partials {
  std::uint16_t* out;      ///< f16 [rows][kDim]
  float* lse;              ///< [rows], base 2
  std::int8_t* exponents;  ///< [rows]
  std::int64_t first_token;
};

struct AttendParams {
  Lists lists;
  Partials partials;
  const int* any_cold;  ///< or null; 0: nothing to do, and no lists
  std::int64_t first_segment;
  int num_segments;
  int ticket;  ///< index in lists.tickets
  int num_kv_heads;
  int log2_group_size;
  int top_k;
  float scale_log2;
};

template <int kDim, int kBlock>
struct Smem {
  static constexpr int kPanels = kDim / 64;
  static constexpr std::uint32_t kKvBytes = kBlock * kDim * 2;  // K or V
  static constexpr std::uint32_t kQBytes = kTileRows * kDim * 2;
  static constexpr int kTiles = kWarpgroups * kQStages;
  static constexpr std::uint32_t kQ = kKvStages * 2 * kKvBytes;
  static constexpr std::uint32_t kInfos = kQ + kTiles * kQBytes;      // int4 [kTiles]
  static constexpr std::uint32_t kOrderSlots = kInfos + kTiles * 16;  // int4 [kOrders][2]
  static constexpr std::uint32_t kBarriers = kOrderSlots + kOrders * 32;
  static constexpr std::uint32_t kQFull = kBarriers;
  static constexpr std::uint32_t kQEmpty = kQFull + kTiles * 8;
  static constexpr std::uint32_t kKvFull = kQEmpty + kTiles * 8;
  static constexpr std::uint32_t kKvEmpty = kKvFull + kKvStages * 8;
  static constexpr std::uint32_t kOrderFull = kKvEmpty + kKvStages * 8;
  static constexpr std::uint32_t kOrderEmpty = kOrderFull + kOrders * 8;
  static constexpr std::uint32_t kFirstItems = kOrderEmpty + kOrders * 8;  // int [kMaxSegments + 1]
  static constexpr std::uint32_t kBytes = kFirstItems + (kMaxSegments + 1) * 4;
  static_assert(kBytes <= 232448);
};

/// Slots of shared memory that lane 0 writes or releases for its warp, lane 0 reads too.
__device__ __forceinline__ int4 load_by_lane_0(const int4* from) {
  int4 value{};
  if (threadIdx.x % 32 == 0) value = *from;
  return {__shfl_sync(~0u, value.x, 0), __shfl_sync(~0u, value.y, 0), __shfl_sync(~0u, value.z, 0),
          __shfl_sync(~0u, value.w, 0)};
}

/// What the producer tells a warpgroup about a tile: flags and how many entries it has; the first
/// of them among those of the launch (who needs entries reads them from the lists); slot 0 of the
/// window's first token among the launch's (token, KV head, slot).
struct TileInfo {
  static constexpr int kStage = 1;   // of K and V
  static constexpr int kParity = 2;  // to wait for
  static constexpr int kLast = 4;    // the warpgroup's last tile of the item
  static constexpr int kStop = 8;    // no tile: the end
  static constexpr int kCountShift = 4;
};

/// Entries of a launch's first segment; the launch has fewer than 2^31.
__device__ __forceinline__ const std::uint32_t* entries_of_launch(const AttendParams& params) {
  return params.lists.entries + params.first_segment * params.lists.window * params.top_k;
}

/// Q in shared memory: rows in groups of 8, each group kPanels panels of 8 x 128 bytes, so that
/// one box of TMA is one token. Rows of a group are 128 bytes apart, groups kPanels * 1024.
template <int kDim>
__device__ __forceinline__ std::uint64_t q_descriptor(std::uint32_t address, int step) {
  const std::uint32_t from = address + static_cast<std::uint32_t>(step / 4 * 1024 + step % 4 * 32);
  const std::uint32_t low = (from & 0x3FFFF) >> 4 | 1u << 16;
  constexpr std::uint32_t kHigh = kDim / 64 * 1024 >> 4 | 1u << 30;
  return std::uint64_t{kHigh} << 32 | low;
}

static_assert(kWarpgroups == 3);  // a producer each, and the scheduler, are one warpgroup

/// What the scheduler tells the producers: an item, the segment it is of, and which warpgroup gets
/// its first tile; the others follow in turn. No entries: the end.
struct Order {
  Item item;
  int segment;
  int turn;
  int ordinal;
  int unused;
};

/// One warp: takes items, loads their K and V, passes them on.
template <int kDim, int kBlock>
__device__ __forceinline__ void schedule(const CUtensorMap& k_map, const CUtensorMap& v_map,
                                         const AttendParams& params, std::uint32_t smem,
                                         char* smem_generic) {
  using S = Smem<kDim, kBlock>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int tile_tokens = kTileRows >> params.log2_group_size;
  const int* const first_items = reinterpret_cast<const int*>(smem_generic + S::kFirstItems);
  const int total_items = first_items[params.num_segments];
  int* const tickets = params.lists.tickets + params.ticket;
  int turn = 0;
  int ticket = lane == 0 ? atomicAdd(tickets, 1) : 0;
  for (int ordinal = 0;; ++ordinal) {
    const int number = __shfl_sync(~0u, ticket, 0);
    if (number < total_items && lane == 0) ticket = atomicAdd(tickets, 1);
    Order order{{0, 0, 0, 0}, 0, turn, ordinal, 0};
    if (number < total_items) {
      int low = 0;
      int high = params.num_segments;
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (first_items[middle] <= number ? low : high) = middle;
      }
      order.segment = static_cast<int>(params.first_segment) + low;
      const int4 raw = *reinterpret_cast<const int4*>(
          params.lists.items + std::int64_t{order.segment} * params.lists.max_items +
          (number - first_items[low]));
      order.item = Item{raw.x, raw.y, raw.z, raw.w};
      const std::uint32_t stage = static_cast<std::uint32_t>(ordinal) % kKvStages;
      const std::uint32_t empty = smem + S::kKvEmpty + stage * 8;
      ptx::mbarrier_wait(empty, (static_cast<std::uint32_t>(ordinal) / kKvStages & 1) ^ 1);
      if (lane == 0) {
        const std::uint32_t full = smem + S::kKvFull + stage * 8;
        const std::uint32_t to = smem + stage * 2 * S::kKvBytes;
        const int head = order.segment % params.num_kv_heads;
        ptx::mbarrier_expect_tx(full, 2 * S::kKvBytes);
        ptx::tma_load_5d(to, &k_map, 0, order.item.row, 0, head, order.item.page, full);
        ptx::tma_load_5d(to + S::kKvBytes, &v_map, 0, order.item.row, 0, head, order.item.page,
                         full);
      }
      const int num_tiles = (order.item.count + tile_tokens - 1) / tile_tokens;
      if (num_tiles < kWarpgroups && lane < 4 * (kWarpgroups - num_tiles)) {
        ptx::mbarrier_arrive(empty);  // for the warps that get no tile of this item
      }
      turn = (turn + num_tiles) % kWarpgroups;
    }
    const std::uint32_t slot = static_cast<std::uint32_t>(ordinal) % kOrders;
    ptx::mbarrier_wait(smem + S::kOrderEmpty + slot * 8,
                       (static_cast<std::uint32_t>(ordinal) / kOrders & 1) ^ 1);
    if (lane == 0) {
      auto* const to = reinterpret_cast<int4*>(smem_generic + S::kOrderSlots) + slot * 2;
      to[0] = make_int4(order.item.row, order.item.page, order.item.begin, order.item.count);
      to[1] = make_int4(order.segment, order.turn, order.ordinal, 0);
      ptx::mbarrier_arrive(smem + S::kOrderFull + slot * 8);
    }
    __syncwarp();
    if (order.item.count == 0) return;
  }
}

/// One warp for each warpgroup of consumers: its tiles, from items to shared memory.
template <int kDim, int kBlock>
__device__ __forceinline__ void produce(const CUtensorMap& q_map, const AttendParams& params,
                                        std::uint32_t smem, char* smem_generic, int warpgroup) {
  using S = Smem<kDim, kBlock>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int log2_group = params.log2_group_size;
  const int tile_tokens = kTileRows >> log2_group;
  std::uint32_t use = 0;  // tiles so far
  const auto slot_of_use = [&] {
    const std::uint32_t slot = static_cast<std::uint32_t>(warpgroup) * kQStages + use % kQStages;
    ptx::mbarrier_wait(smem + S::kQEmpty + slot * 8, (use / kQStages & 1) ^ 1);
    return slot;
  };
  for (std::uint32_t n = 0;; ++n) {
    const std::uint32_t from = n % kOrders;
    ptx::mbarrier_wait(smem + S::kOrderFull + from * 8, n / kOrders & 1);
    const int4* const order =
        reinterpret_cast<const int4*>(smem_generic + S::kOrderSlots) + from * 2;
    const int4 item = load_by_lane_0(order);
    const int4 rest = load_by_lane_0(order + 1);
    if (lane == 0) ptx::mbarrier_arrive(smem + S::kOrderEmpty + from * 8);
    const int count = item.w;
    if (count == 0) break;
    const int segment = rest.x;
    const int ordinal = rest.z;
    const int head = segment % params.num_kv_heads;
    const int first_token = segment / params.num_kv_heads * params.lists.window;
    const int first_entry =
        (segment - static_cast<int>(params.first_segment)) * params.lists.window * params.top_k +
        item.z;
    const std::uint32_t* const list = entries_of_launch(params) + first_entry;
    const int first_slot =
        ((first_token - static_cast<int>(params.partials.first_token)) * params.num_kv_heads +
         head) *
        params.top_k;
    // Entries of a tile, one or two a lane.
    const auto entries_of = [&](int tile, std::uint32_t(&entries)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int in_tile = lane + 32 * i;
        const int at = tile * tile_tokens + in_tile;
        entries[i] = in_tile < tile_tokens && at < count ? list[at] : Entry::kNone;
      }
    };
    const int num_tiles = (count + tile_tokens - 1) / tile_tokens;
    int tile = (warpgroup + kWarpgroups - rest.y) % kWarpgroups;
    std::uint32_t ahead[2];
    entries_of(tile, ahead);
    for (; tile < num_tiles; tile += kWarpgroups, ++use) {
      const std::uint32_t entries[2] = {ahead[0], ahead[1]};
      entries_of(tile + kWarpgroups, ahead);
      const std::uint32_t slot = slot_of_use();
      const std::uint32_t full = smem + S::kQFull + slot * 8;
      if (lane == 0) {
        const int left = count - tile * tile_tokens;
        const int num_tokens = left < tile_tokens ? left : tile_tokens;
        const int flags = (ordinal % kKvStages) * TileInfo::kStage |
                          (ordinal / kKvStages & 1) * TileInfo::kParity |
                          (tile + kWarpgroups >= num_tiles ? TileInfo::kLast : 0) |
                          num_tokens << TileInfo::kCountShift;
        reinterpret_cast<int4*>(smem_generic + S::kInfos)[slot] =
            make_int4(flags, first_entry + tile * tile_tokens, first_slot, 0);
        ptx::mbarrier_expect_tx(full, static_cast<std::uint32_t>(num_tokens * kDim * 2)
                                          << log2_group);
      }
      __syncwarp();
      const std::uint32_t to = smem + S::kQ + slot * S::kQBytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (entries[i] == Entry::kNone) continue;
        const int token = first_token + Entry::token(entries[i]);
        const std::uint32_t row = static_cast<std::uint32_t>(lane + 32 * i) << log2_group;
        if (log2_group >= 3) {
          ptx::tma_load_5d(to + row * (kDim * 2), &q_map, 0, 0, 0, head << (log2_group - 3), token,
                           full);
        } else {
          for (int panel = 0; panel < S::kPanels; ++panel) {
            ptx::tma_load_5d(to + row / 8 * (kDim * 16) + static_cast<std::uint32_t>(panel) * 1024 +
                                 row % 8 * 128,
                             &q_map, 0, head << log2_group, panel, 0, token, full);
          }
        }
      }
      __syncwarp();
    }
  }
  const std::uint32_t slot = slot_of_use();
  if (lane == 0) {
    reinterpret_cast<int4*>(smem_generic + S::kInfos)[slot] = make_int4(TileInfo::kStop, 0, 0, 0);
    ptx::mbarrier_arrive(smem + S::kQFull + slot * 8);
  }
}

/// A warpgroup's tile once S stands: S -> P. Returns per row (of two a thread) the sum of the
/// weights before they are rounded to 16 bits, 2^-shift of the largest one's, and the base-2
/// logarithm of it with the maximum put back.
template <int kCount>
__device__ __forceinline__ void softmax(float (&s)[kCount], float scale, const int (&visible)[2],
                                        int block_size, float shift, float (&sum)[2],
                                        float (&lse)[2]) {
  if (__any_sync(~0u, visible[0] < block_size || visible[1] < block_size)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (ptx::accumulator_column(i) >= visible[i / 2 % 2]) s[i] = -INFINITY;
    }
  }
  float reference[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float chain[4];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float x = s[i / 2 * 4 + h * 2 + i % 2];
      chain[i % 4] = i < 4 ? x : fmaxf(chain[i % 4], x);
    }
    float top = fmaxf(fmaxf(chain[0], chain[1]), fmaxf(chain[2], chain[3]));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    reference[h] = top == -INFINITY ? 0.0f : fmaf(top, scale, shift);
  }
  float part[2][2] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    s[i] = ptx::ex2(fmaf(s[i], scale, -reference[i / 2 % 2]));
    part[i / 2 % 2][i % 2] += s[i];
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] = part[h][0] + part[h][1];
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    // The merge computes rows of huge scores.
    lse[h] = fabsf(reference[h]) > kHugeScore ? reference[h] : reference[h] + ptx::lg2(sum[h]);
  }
}

/// Where a row of a tile goes, in one register until its products stand: the (token, KV head, slot)
/// among those of the launch, 2 GiB of partials of at least 128 bytes, and what the row's end
/// depends on.
struct Target {
  static constexpr std::uint32_t kSlots = (1u << 30) - 1;
  static constexpr std::uint32_t kNone = kSlots;      // no row
  static constexpr std::uint32_t kPartly = 1u << 30;  // the row doesn't see the whole block
  static constexpr std::uint32_t kHuge = 1u << 31;    // its scores are beyond kHugeScore
};

template <class T, int kDim, int kBlock>
__device__ __forceinline__ void consume(const AttendParams& params, std::uint32_t smem,
                                        const char* smem_generic, int warpgroup) {
  using S = Smem<kDim, kBlock>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto row_in_group = [&](int h) {
    return ptx::accumulator_row(2 * h) & ((1 << params.log2_group_size) - 1);
  };

  for (std::uint32_t use = 0;; ++use) {
    const std::uint32_t slot = static_cast<std::uint32_t>(warpgroup) * kQStages + use % kQStages;
    ptx::mbarrier_wait(smem + S::kQFull + slot * 8, use / kQStages & 1);
    const int4 info =
        load_by_lane_0(reinterpret_cast<const int4*>(smem_generic + S::kInfos) + slot);
    if (info.x & TileInfo::kStop) break;
    const std::uint32_t kv_stage = info.x & TileInfo::kStage ? 1 : 0;
    std::uint32_t entries[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int in_tile = ptx::accumulator_row(2 * h) >> params.log2_group_size;
      entries[h] = in_tile < info.x >> TileInfo::kCountShift
                       ? __ldg(entries_of_launch(params) + info.y + in_tile)
                       : Entry::kNone;
    }
    ptx::mbarrier_wait(smem + S::kKvFull + kv_stage * 8, info.x & TileInfo::kParity ? 1 : 0);

    const std::uint32_t k_tile = smem + kv_stage * 2 * S::kKvBytes;
    const std::uint32_t q_tile = smem + S::kQ + slot * S::kQBytes;
    float s[kBlock / 2];
    ptx::wgmma_fence();
    {
      const std::uint64_t k_descriptor = ptx::k_major_descriptor(k_tile);
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        ptx::Wgmma<T, kBlock>::template ss<0>(
            s, q_descriptor<kDim>(q_tile, step),
            ptx::advance(k_descriptor, k_major_step(kBlock, static_cast<std::uint32_t>(step))),
            step != 0);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin(s);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(smem + S::kQEmpty + slot * 8);

    const int visible[2] = {Entry::num_visible(entries[0]), Entry::num_visible(entries[1])};
    std::uint32_t target[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int slot_of_launch = info.z +
                                 Entry::token(entries[h]) * params.num_kv_heads * params.top_k +
                                 Entry::slot(entries[h]);
      target[h] = entries[h] == Entry::kNone ? Target::kNone
                                             : static_cast<std::uint32_t>(slot_of_launch) |
                                                   (visible[h] < kBlock ? Target::kPartly : 0);
    }
    float sum[2];
    float lse[2];
    // Weights of at most 2^-7.5 (see kHugeScore), so that 128 of the largest bf16 values stay below
    // 2^128. f16 can't overflow f32, and needs the range below 1.
    constexpr float kShift = std::is_same_v<T, __half> ? 0.0f : 8.0f;
    softmax(s, params.scale_log2, visible, kBlock, kShift, sum, lse);
    std::uint32_t p[kBlock / 16][4];
#pragma unroll
    for (int i = 0; i < kBlock / 4; ++i) p[i / 4][i % 4] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < kBlock / 16; ++i) ptx::pin(p[i]);

    float o[kDim / 2];
    ptx::wgmma_fence();
    {
      const std::uint64_t v_descriptor =
          ptx::mn_major_descriptor(k_tile + S::kKvBytes, static_cast<std::uint32_t>(kBlock));
#pragma unroll
      for (int step = 0; step < kBlock / 16; ++step) {
        ptx::Wgmma<T, kDim>::template rs<1>(
            o, p[step], ptx::advance(v_descriptor, mn_major_step(static_cast<std::uint32_t>(step))),
            step != 0);
      }
    }
    ptx::wgmma_commit();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (fabsf(lse[h]) > kHugeScore) target[h] |= Target::kHuge;
      if ((target[h] & Target::kSlots) != Target::kNone && lane % 4 == 0) {
        params.partials.lse[(std::int64_t{target[h] & Target::kSlots} << params.log2_group_size) +
                            row_in_group(h)] = lse[h];
      }
    }
    ptx::wgmma_wait<0>();
    ptx::pin(o);
    if ((info.x & TileInfo::kLast) != 0 && lane == 0) {
      ptx::mbarrier_arrive(smem + S::kKvEmpty + kv_stage * 8);
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kDim / 4; ++i) {
        largest = ptx::max_nan(largest, fabsf(o[i / 2 * 4 + h * 2 + i % 2]));
      }
      largest = ptx::max_nan(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = ptx::max_nan(largest, __shfl_xor_sync(~0u, largest, 2));
      const float inverse = sum[h] == 0.0f ? 0.0f : __fdividef(1.0f, sum[h]);
      const int magnitude = __float_as_int(largest * inverse) >> 23 & 0xFF;
      // 255: infinite or NaN. Ends such that 2^exponent and 2^-exponent are normal numbers.
      int exponent = magnitude == 255 ? 0 : 14 + 127 - magnitude;
      exponent = exponent > 112 ? 112 : exponent;
      const float factor = inverse * __int_as_float((127 + exponent) << 23);
      // A value that the row doesn't see may have made NaN of 0 times it.
      if ((largest != largest && (target[h] & Target::kPartly) != 0) ||
          (target[h] & Target::kHuge) != 0) {
        exponent = kRecompute;
      }

      if ((target[h] & Target::kSlots) != Target::kNone) {
        const std::int64_t row0 = std::int64_t{target[h] & Target::kSlots}
                                  << params.log2_group_size;
        const int row = row_in_group(h);
        std::uint16_t* const to = params.partials.out + row0 * kDim +
                                  partial_offset<kDim>(params.log2_group_size, row) + lane % 4 * 8;
        const int chunk_stride = partial_chunk_stride(params.log2_group_size);
#pragma unroll
        for (int c = 0; c < kDim / 32; ++c) {
          std::uint32_t packed[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int at = (4 * c + i) * 4 + h * 2;
            packed[i] = ptx::pack<__half>(o[at] * factor, o[at + 1] * factor);
          }
          __stcs(reinterpret_cast<uint4*>(to + c * chunk_stride),
                 make_uint4(packed[0], packed[1], packed[2], packed[3]));
        }
        if (lane % 4 == 0) {
          params.partials.exponents[row0 + row] = static_cast<std::int8_t>(exponent);
        }
      }
    }
  }
}

/// Persistent: a CTA takes items by number until none is left.
template <class T, int kDim, int kBlock>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map,
                  const __grid_constant__ AttendParams params) {
  using S = Smem<kDim, kBlock>;
  extern __shared__ __align__(1024) char smem_generic[];
  if (params.any_cold != nullptr && *params.any_cold == 0) return;
  const std::uint32_t smem = ptx::smem_address(smem_generic);
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  int* const first_items = reinterpret_cast<int*>(smem_generic + S::kFirstItems);

  for (int i = static_cast<int>(threadIdx.x); i < params.num_segments; i += kThreads) {
    first_items[i + 1] = params.lists.num_items[params.first_segment + i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    first_items[0] = 0;
    for (int i = 0; i < params.num_segments; ++i) first_items[i + 1] += first_items[i];
    for (std::uint32_t i = 0; i < S::kTiles; ++i) {
      ptx::mbarrier_init(smem + S::kQFull + i * 8, 1);
      ptx::mbarrier_init(smem + S::kQEmpty + i * 8, 4);
    }
    for (std::uint32_t i = 0; i < kKvStages; ++i) {
      ptx::mbarrier_init(smem + S::kKvFull + i * 8, 1);
      ptx::mbarrier_init(smem + S::kKvEmpty + i * 8, kWarpgroups * 4);
    }
    for (std::uint32_t i = 0; i < kOrders; ++i) {
      ptx::mbarrier_init(smem + S::kOrderFull + i * 8, 1);
      ptx::mbarrier_init(smem + S::kOrderEmpty + i * 8, kWarpgroups);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (warpgroup == kWarpgroups) {
    ptx::decrease_registers<80>();
    const int warp = static_cast<int>(threadIdx.x) / 32 - kWarpgroups * 4;
    if (warp < kWarpgroups) {
      produce<kDim, kBlock>(q_map, params, smem, smem_generic, warp);
    } else {
      schedule<kDim, kBlock>(k_map, v_map, params, smem, smem_generic);
    }
  } else {
    ptx::increase_registers<144>();
    consume<T, kDim, kBlock>(params, smem, smem_generic, warpgroup);
  }
}

}  // namespace msa::cuda::sm90::kv_outer
