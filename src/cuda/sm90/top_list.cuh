// SPDX-License-Identifier: Apache-2.0
//
// The best blocks of 16 rows per warp, in registers. Two lanes keep the list of one row: lane l of
// a quad keeps row l / 4 + 8 (l % 2) of the warp's 16, and of its 2 kEntries places lanes with
// (l & 2) != 0 ("upper") hold the better half. Each half is sorted, its worst entry first.
#pragma once

#include <cstdint>

namespace msa::cuda::sm90 {

/// The id of a place that holds no block.
inline constexpr int kNoBlock = 0x7fffffff;

/// What a row takes without looking at scores, and which blocks compete for the rest.
struct RowRule {
  int top_k;
  int num_local;  ///< forced blocks local - num_local + 1 .. local
  int num_init;   ///< forced blocks 0 .. num_init - 1, where they are not local ones too
  int local;      ///< the last visible block; -1: the row sees nothing

  __device__ RowRule(int top_k, int num_local_blocks, int num_init_blocks, int local_block)
      : top_k(top_k),
        num_local(min(num_local_blocks, local_block + 1)),
        num_init(min(num_init_blocks, local_block + 1 - num_local)),
        local(local_block) {}

  /// Blocks first() .. last() compete by score.
  __device__ int first() const { return num_init; }
  __device__ int last() const { return local - num_local; }
};

template <int kEntries>
struct TopList {
  float score[kEntries];
  int id[kEntries];

  static __device__ bool upper() { return (threadIdx.x & 2) != 0; }

  /// Places beyond top_k and forced blocks stand first. Their score is NaN: it compares as false,
  /// so that nothing displaces them, not even a score of +inf. The free places wait with -inf,
  /// which any score replaces.
  __device__ void start(const RowRule& rule) {
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const int rank = (upper() ? kEntries : 2 * kEntries) - 1 - i;  // 0 is the best place
      const int forced = rank - (2 * kEntries - rule.top_k);
      score[i] = __int_as_float(0x7fc00000);
      id[i] = kNoBlock;
      if (forced < 0) continue;
      if (forced < rule.num_local) {
        id[i] = rule.local - forced;
      } else if (forced < rule.num_local + rule.num_init) {
        id[i] = forced - rule.num_local;
      } else {
        score[i] = -INFINITY;
      }
    }
  }

  /// Takes (x, x_id) into its place and drops the worst entry; NaN changes nothing. Both lanes of a
  /// row give the same. worse(entry score, entry id, x, x_id): the entry ranks below x. Called by
  /// whole warps.
  template <class Worse>
  __device__ void insert(float x, int x_id, Worse worse) {
    // What falls out of the upper half is the best of the lower one.
    const float fallen = __shfl_xor_sync(~0u, score[0], 2);
    const int fallen_id = __shfl_xor_sync(~0u, id[0], 2);
    if (!upper() && worse(fallen, fallen_id, x, x_id)) {
      x = fallen;
      x_id = fallen_id;
    }
    bool here = worse(score[0], id[0], x, x_id);
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const bool next = i + 1 < kEntries && worse(score[i + 1], id[i + 1], x, x_id);
      if (next) {
        score[i] = score[i + 1];
        id[i] = id[i + 1];
      } else if (here) {
        score[i] = x;
        id[i] = x_id;
      }
      here = next;
    }
  }

  /// The row's ids, ascending, then -1; `live`: the row exists.
  __device__ void store_ids(std::int32_t* to, int top_k, bool live) const {
    int rank[kEntries] = {};
    int count = 0;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const int other = __shfl_xor_sync(~0u, id[i], 2);
      count += (other != kNoBlock) + (id[i] != kNoBlock);
#pragma unroll
      for (int j = 0; j < kEntries; ++j) rank[j] += (id[i] < id[j]) + (other < id[j]);
    }
    if (!live) return;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      if (id[i] != kNoBlock) to[rank[i]] = id[i];
    }
    for (int slot = count + (upper() ? 1 : 0); slot < top_k; slot += 2) to[slot] = -1;
  }
};

}  // namespace msa::cuda::sm90
