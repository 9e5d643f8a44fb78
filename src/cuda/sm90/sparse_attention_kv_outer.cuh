// SPDX-License-Identifier: Apache-2.0
//
// The lists that turn a selection around: from the blocks of a query to the queries of a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/batch.cuh"
#include "cuda/common/query_lists.cuh"
#include "cuda/common/scan.cuh"

namespace msa::cuda::sm90::kv_outer {

inline constexpr int kTokensPerColdTile = 8;
inline constexpr int kMaxWindow = 8192;  // tokens; 13 bits of an entry
inline constexpr int kMaxTopK = 64;      // 6 bits of an entry, a bit each of `attended`
inline constexpr int kTokensPerItem =
    128;  // a block that more queries of a window chose is divided
inline constexpr int kListThreads = 512;
inline constexpr int kBinsPerPass = 32 * 1024;

/// Who attends what.
struct Selection {
  DeviceBatch batch;
  const std::int32_t* block_ids;  ///< [num_kv_heads][total_q][top_k]
  std::int64_t head_stride, token_stride, slot_stride;
  const std::uint8_t* tile_is_cold;  ///< [num_kv_heads][num_tiles] or null: all are
  const int* any_cold;               ///< with tile_is_cold; 0: no tile is
  std::int64_t num_tiles;
  int num_kv_heads;
  int top_k;

  __device__ bool takes_nothing() const { return any_cold != nullptr && *any_cold == 0; }
  /// Whether this path computes the token.
  __device__ bool takes(std::int64_t token, int head) const {
    return tile_is_cold == nullptr ||
           tile_is_cold[head * num_tiles + token / kTokensPerColdTile] != 0;
  }
  __device__ std::int64_t block_of(std::int64_t token, int head, int slot) const {
    return block_ids[head * head_stride + token * token_stride + slot * slot_stride];
  }
};

/// One query token that chose a block, in 32 bits: token in the window, slot of its selection, and
/// how many keys of the block it sees.
struct Entry {
  static constexpr std::uint32_t kNone = 0xFFFFFFFF;

  static __device__ std::uint32_t pack(int token, int slot, int num_visible) {
    return static_cast<std::uint32_t>(token | slot << 13 | (num_visible - 1) << 19);
  }
  static __device__ int token(std::uint32_t entry) { return entry & (kMaxWindow - 1); }
  static __device__ int slot(std::uint32_t entry) { return entry >> 13 & (kMaxTopK - 1); }
  static __device__ int num_visible(std::uint32_t entry) { return (entry >> 19 & 127) + 1; }
};

/// A KV block and some of the tokens of a window that chose it.
struct Item {
  int row;    ///< ragged: first packed key; paged: 0
  int page;   ///< ragged: 0
  int begin;  ///< in the entries of the segment
  int count;  ///< entries, 1 .. kTokensPerItem
};

/// A segment is (query window, KV head), in this order.
struct Lists {
  std::uint32_t* entries;   ///< [segments][window * top_k]
  Item* items;              ///< [segments][max_items]
  int* num_items;           ///< [segments]
  std::uint64_t* attended;  ///< [total_q][num_kv_heads]: bit s: slot s has a visible block
  int* tickets;             ///< [launches], zeroed for the launches that take items by number
  int num_tickets;
  int window;  ///< tokens, <= kMaxWindow
  int max_items;
};

/// One (token, slot): the bin of its block and the keys it sees; no keys where it has no block.
struct Pair {
  std::int64_t bin = 0;
  int num_visible = 0;
};

/// Blocks are binned by page, or as in cuda/common/query_lists.cuh.
__device__ __forceinline__ Pair pair_at(const DeviceBatch& batch, const DeviceSequence& sequence,
                                        std::int64_t position, std::int64_t block) {
  Pair pair;
  const std::int64_t first_key = block * batch.block_size;
  if (block < 0 || first_key > position) return pair;
  if (batch.page_table != nullptr) {
    pair.bin = page_of(batch, sequence.batch_idx, block);
    if (pair.bin < 0) return pair;
  } else {
    pair.bin = first_bin(batch, sequence) + block;
  }
  const std::int64_t visible = position + 1 - first_key;
  pair.num_visible = visible < batch.block_size ? static_cast<int>(visible) : batch.block_size;
  return pair;
}

/// Calls visit(token, slot, pair) for the pairs of a window, threads over tokens; done(token, mask)
/// with the slots that have keys.
template <class Visit, class Done>
__device__ __forceinline__ void for_each_pair(const Selection& selection, int head,
                                              std::int64_t begin, std::int64_t end, Visit visit,
                                              Done done) {
  for (std::int64_t token = begin + threadIdx.x; token < end; token += kListThreads) {
    std::uint64_t mask = 0;
    if (selection.takes(token, head)) {
      const DeviceSequence sequence = sequence_of_query(selection.batch, token);
      const std::int64_t position = sequence.position(token - sequence.q_begin);
#pragma unroll 4
      for (int slot = 0; slot < selection.top_k; ++slot) {
        const Pair pair =
            pair_at(selection.batch, sequence, position, selection.block_of(token, head, slot));
        if (pair.num_visible == 0) continue;
        mask |= std::uint64_t{1} << slot;
        visit(token, slot, pair);
      }
    }
    done(token, mask);
  }
}

/// A CTA per segment: counts the pairs of each block, sums up, writes items and entries. The order
/// of entries inside a block depends on timing; no result does, since each row is computed alone.
__global__ void __launch_bounds__(kListThreads, 1)
    build_lists_kernel(const __grid_constant__ Selection selection,
                       const __grid_constant__ Lists lists) {
  extern __shared__ int bins[];
  __shared__ std::uint64_t scratch[kListThreads / 32];
  if (selection.takes_nothing()) return;
  const DeviceBatch& batch = selection.batch;
  const int tid = static_cast<int>(threadIdx.x);
  const std::int64_t segment = blockIdx.x;
  const int head = static_cast<int>(segment % selection.num_kv_heads);
  const std::int64_t begin = segment / selection.num_kv_heads * lists.window;
  const std::int64_t end =
      begin + lists.window < batch.total_q ? begin + lists.window : batch.total_q;
  std::uint32_t* const entries = lists.entries + segment * lists.window * selection.top_k;
  Item* const items = lists.items + segment * lists.max_items;
  if (blockIdx.x == 0) {
    for (int i = tid; i < lists.num_tickets; i += kListThreads) lists.tickets[i] = 0;
  }

  const bool paged = batch.page_table != nullptr;
  const DeviceSequence first = sequence_of_query(batch, begin);
  const DeviceSequence last = sequence_of_query(batch, end - 1);
  const std::int64_t bins_begin = paged ? 0 : first_bin(batch, first);
  const std::int64_t bins_end =
      paged ? batch.num_pages
            : first_bin(batch, last) + (last.k_len + batch.block_size - 1) / batch.block_size;
  int num_entries = 0;
  int num_items = 0;
  for (std::int64_t base = bins_begin; base < bins_end || base == bins_begin;
       base += kBinsPerPass) {
    const std::int64_t left = bins_end - base;
    const int num_bins = left < kBinsPerPass ? static_cast<int>(left) : kBinsPerPass;
    for (int i = tid; i < num_bins; i += kListThreads) bins[i] = 0;
    __syncthreads();
    for_each_pair(
        selection, head, begin, end,
        [&](std::int64_t, int, const Pair& pair) {
          const std::int64_t bin = pair.bin - base;
          if (bin >= 0 && bin < num_bins) atomicAdd(&bins[bin], 1);
        },
        [&](std::int64_t token, std::uint64_t mask) {
          if (base == bins_begin) lists.attended[token * selection.num_kv_heads + head] = mask;
        });
    __syncthreads();

    const int per_thread = (num_bins + kListThreads - 1) / kListThreads;
    const int from = tid * per_thread < num_bins ? tid * per_thread : num_bins;
    const int to = from + per_thread < num_bins ? from + per_thread : num_bins;
    std::uint64_t sum = 0;  // entries in the low half, items in the high one
    for (int i = from; i < to; ++i) {
      const auto count = static_cast<unsigned>(bins[i]);
      sum += count | std::uint64_t{(count + kTokensPerItem - 1) / kTokensPerItem} << 32;
    }
    std::uint64_t total = 0;
    const std::uint64_t before = exclusive_sum<kListThreads>(sum, scratch, total);
    int entry = num_entries + static_cast<int>(before & 0xFFFFFFFF);
    int item = num_items + static_cast<int>(before >> 32);
    for (int i = from; i < to; ++i) {
      const int count = bins[i];
      bins[i] = entry;
      if (count == 0) continue;
      Item next{0, 0, 0, 0};
      if (paged) {
        next.page = static_cast<int>(base + i);
      } else {
        std::int64_t low = first.batch_idx;  // the last sequence whose first bin is not behind
        std::int64_t high = last.batch_idx + 1;
        while (high - low > 1) {
          const std::int64_t middle = (low + high) / 2;
          (first_bin(batch, sequence_at(batch, middle)) <= base + i ? low : high) = middle;
        }
        const DeviceSequence sequence = sequence_at(batch, low);
        next.row = static_cast<int>(sequence.k_begin +
                                    (base + i - first_bin(batch, sequence)) * batch.block_size);
      }
      for (int done = 0; done < count; done += kTokensPerItem) {
        next.begin = entry + done;
        next.count = count - done < kTokensPerItem ? count - done : kTokensPerItem;
        if (item < lists.max_items) items[item++] = next;
      }
      entry += count;
    }
    __syncthreads();
    for_each_pair(
        selection, head, begin, end,
        [&](std::int64_t token, int slot, const Pair& pair) {
          const std::int64_t bin = pair.bin - base;
          if (bin < 0 || bin >= num_bins) return;
          entries[atomicAdd(&bins[bin], 1)] =
              Entry::pack(static_cast<int>(token - begin), slot, pair.num_visible);
        },
        [](std::int64_t, std::uint64_t) {});
    __syncthreads();
    num_entries += static_cast<int>(total & 0xFFFFFFFF);
    num_items += static_cast<int>(total >> 32);
  }
  if (tid == 0)
    lists.num_items[segment] = num_items < lists.max_items ? num_items : lists.max_items;
}

}  // namespace msa::cuda::sm90::kv_outer
