// SPDX-License-Identifier: Apache-2.0
//
// Exact top-k of decode: one CTA a row. Of 8192 scores at a time every thread holds 32. Groups of 4
// threads (or 1, where more than 16 are wanted) find their largest; only the `wanted` groups whose
// largest are the largest of all can hold one of the `wanted` largest scores. Their scores that
// reach the least of those maxima, 16 * 128 or 64 * 32 at most and about `wanted` in practice, are
// ranked by counting the larger ones. A score and its block make one key of 64 bits, so that no
// two are equal and the lower block wins a tie.
#pragma once

#include <cuda_runtime.h>

#include "cuda/sm90/indexer_decode.hpp"

namespace msa::cuda::sm90 {

inline constexpr int kSelectThreads = 256;
inline constexpr int kSelectVectors = 8;  // float4 a thread and round
inline constexpr int kSelectRound = kSelectThreads * kSelectVectors * 4;

using SelectKey = unsigned long long;

/// Ascending with the score, then descending with the block; both zeros are one value. Never 0.
__device__ __forceinline__ SelectKey key_of(float score, int block) {
  const std::uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  const std::uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return SelectKey{ordered} << 32 | ~static_cast<std::uint32_t>(block);
}
__device__ __forceinline__ int block_of(SelectKey key) {
  return static_cast<int>(~static_cast<std::uint32_t>(key));
}

/// How many of keys[0, count) are larger than `key`; two at a time, so a last one is 0.
__device__ __forceinline__ int rank_of(SelectKey key, const SelectKey* keys, int count) {
  const auto* const pairs = reinterpret_cast<const ulonglong2*>(keys);
  int rank = 0;
#pragma unroll 8
  for (int i = 0; i < (count + 1) / 2; ++i) {
    const ulonglong2 pair = pairs[i];
    rank += (pair.x > key ? 1 : 0) + (pair.y > key ? 1 : 0);
  }
  return rank;
}

struct SelectShared {
  alignas(16) SelectKey maxima[kSelectThreads];
  alignas(16) SelectKey candidates[kDecodeTopK * (kSelectVectors * 4 + 1) + 2];
  SelectKey best[kDecodeTopK];
  SelectKey least;  ///< of the `wanted` largest maxima
  int num_candidates;
};

/// The `wanted` largest of scores[first..last], more than that many, into shared.best.
__device__ __forceinline__ void select(const float* scores, int first, int last, int wanted,
                                       SelectShared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lanes = wanted <= 16 ? 4 : 1;  // of a group
  const int num_groups = kSelectThreads / lanes;
  int num_best = 0;
  for (int round = first / 4 * 4; round <= last; round += kSelectRound) {
    float values[kSelectVectors][4];
#pragma unroll
    for (int i = 0; i < kSelectVectors; ++i) {
      const int block = round + (i * kSelectThreads + thread) * 4;
      float4 four{};
      // Rows are padded to four scores.
      if (block <= last) four = *reinterpret_cast<const float4*>(scores + block);
      values[i][0] = four.x;
      values[i][1] = four.y;
      values[i][2] = four.z;
      values[i][3] = four.w;
    }
    const auto for_each = [&](const auto& visit) {
#pragma unroll
      for (int i = 0; i < kSelectVectors; ++i) {
        if (round + i * kSelectThreads * 4 > last) break;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int block = round + (i * kSelectThreads + thread) * 4 + j;
          if (block >= first && block <= last) visit(key_of(values[i][j], block));
        }
      }
    };
    SelectKey maximum = 0;
    for_each([&](SelectKey key) { maximum = key > maximum ? key : maximum; });
    SelectKey of_group = maximum;
    for (int distance = 1; distance < lanes; distance *= 2) {
      const SelectKey other = __shfl_xor_sync(~0u, of_group, distance);
      of_group = other > of_group ? other : of_group;
    }
    if (thread % lanes == 0) shared.maxima[thread / lanes] = of_group;
    if (thread < num_best) shared.candidates[thread] = shared.best[thread];
    if (thread == 0) {
      shared.least = 0;
      shared.num_candidates = num_best;
    }
    __syncthreads();
    if (thread < num_groups) {
      const SelectKey own = shared.maxima[thread];
      if (own != 0 && rank_of(own, shared.maxima, num_groups) == wanted - 1) shared.least = own;
    }
    __syncthreads();
    const SelectKey least = shared.least;
    if (maximum != 0 && maximum >= least) {
      for_each([&](SelectKey key) {
        if (key >= least) shared.candidates[atomicAdd(&shared.num_candidates, 1)] = key;
      });
    }
    __syncthreads();
    const int count = shared.num_candidates;
    if (thread == 0) shared.candidates[count] = 0;
    __syncthreads();
    for (int i = thread; i < count; i += kSelectThreads) {
      const SelectKey key = shared.candidates[i];
      const int rank = rank_of(key, shared.candidates, count);
      if (rank < wanted) shared.best[rank] = key;
    }
    num_best = min(count, wanted);
    __syncthreads();
  }
}

/// Which blocks of a row are forced and which compete.
struct RowRange {
  int batch_idx, num_visible, num_local;
  int first, last;  ///< compete by score
  int wanted;       ///< of those
};

__device__ __forceinline__ RowRange range_of(const DecodeSelectParams& params, std::int64_t row) {
  const DeviceSequence sequence = sequence_of_query(params.batch, row);
  const std::int64_t position = sequence.position(row - sequence.q_begin);
  RowRange range{};
  range.batch_idx = static_cast<int>(sequence.batch_idx);
  range.num_visible = position < 0 || sequence.k_len == 0
                          ? 0
                          : static_cast<int>(min(position, sequence.k_len - 1) / kDecodeBlock) + 1;
  range.num_local = min(params.num_local_blocks, range.num_visible);
  range.first = min(params.num_init_blocks, range.num_visible - range.num_local);
  range.last = range.num_visible - range.num_local - 1;
  range.wanted = params.top_k - range.num_local - range.first;
  return range;
}

/// The ids of a row, in order, by store(slot, id).
template <class Store>
__device__ __forceinline__ void select_row(const DecodeSelectParams& params, std::int64_t row,
                                           std::int64_t head, const RowRange& range,
                                           SelectShared& shared, const Store& store) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto [batch_idx, num_visible, num_local, first, last, wanted] = range;
  if (num_visible <= params.top_k) {
    if (thread < params.top_k) store(thread, thread < num_visible ? thread : -1);
    return;
  }
  if (wanted > 0) {
    select(params.scores + head * params.head_stride + row * params.row_stride, first, last, wanted,
           shared);
  }
  if (thread < first) store(thread, thread);
  if (thread < wanted) {
    const int block = block_of(shared.best[thread]);
    int lower = 0;
    for (int i = 0; i < wanted; ++i) lower += block_of(shared.best[i]) < block ? 1 : 0;
    store(first + lower, block);
  }
  if (thread < num_local) store(first + wanted + thread, num_visible - num_local + thread);
}

}  // namespace msa::cuda::sm90
