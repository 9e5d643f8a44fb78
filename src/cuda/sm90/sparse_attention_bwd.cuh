// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of SparseAttentionBackward on sm_90 share. docs/kernels/sm90_attention_bwd.md
// has the picture and the cycle budget.
//
//   statistics   of each row (query, query head): its LSE and delta (cuda/common)
//   dq           tiles of queries over the union of their blocks: dQ += dS K
//   items        KV blocks with their queries, long ones in pieces
//   dkv          an item at a time: dV += P^T dO, dK += dS^T Q
//   add_pieces   the sums of a block that was cut, in order
//   redo         what came out not finite, once more on CUDA cores (cuda/common)
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/attention_gradients.cuh"
#include "cuda/sm90/attention_row.cuh"

namespace msa::cuda::sm90::bwd {

inline constexpr int kBlock = 128;  ///< keys: 64 for each warpgroup of dkv

/// A KV block of one KV head and queries that attend it.
struct Item {
  int head;        ///< KV head; negative: no item is left
  int bin;         ///< of the block
  int row;         ///< first packed key
  int num_tokens;  ///< keys of the block
  int begin;       ///< first entry in the head's rows; the first query where there are no lists
  int count;       ///< entries
  int unseen;      ///< query i sees min(i - unseen, num_tokens) keys
  int slot;        ///< of the partial sums; negative: the item is the whole block
};
static_assert(sizeof(Item) == 32);

/// A block whose sums are those of pieces [slot, slot + count).
struct Split {
  int head;
  int bin;
  int row;
  int num_tokens;
  int slot;
  int count;
};

struct Counters {
  int num_items;
  int num_splits;
  int ticket;  ///< the next item to take
};

/// In the workspace.
struct Work {
  Item* items;
  Split* splits;
  Counters* counters;
  float* partials;        ///< [max_slots][2: dK, dV][kBlock][head_dim]
  std::uint8_t* redo_q;   ///< [total_q][num_q_heads]: 1: the row of dQ is to be done again
  std::uint8_t* redo_kv;  ///< [num_kv_heads][num_bins]: 1: dK and dV of the block are
  std::int64_t num_bins;
  int max_items;
  int max_splits;
  int piece_entries;  ///< a block with more is cut
};

struct BackwardParams {
  AttentionGradients g;
  Work work;
  int log2_group_size;
  float scale;       ///< of scores
  float scale_log2;  ///< times log2(e)
};

}  // namespace msa::cuda::sm90::bwd
