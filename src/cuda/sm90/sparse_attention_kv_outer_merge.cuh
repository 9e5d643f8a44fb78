// SPDX-License-Identifier: Apache-2.0
//
// Merges the partial results of a row, in the order of its slots.
#pragma once

#include "cuda/sm90/attention_row.cuh"
#include "cuda/sm90/sparse_attention_kv_outer_attend.cuh"

namespace msa::cuda::sm90::kv_outer {

inline constexpr int kMergeThreads = 128;

struct MergeParams {
  Selection selection;
  const std::uint64_t* attended;
  Partials partials;
  std::int64_t num_tokens;  ///< of this launch
  int num_q_heads;
  int log2_group_size;
  float scale_log2;
  bool vector_stores;        ///< 16 bytes of a row of `out` are aligned
  AttentionTensors tensors;  ///< for what the tensor cores could not do
  void* out;
  std::int64_t out_stride, out_head_stride;
  float* lse;  ///< or null
  std::int64_t lse_stride, lse_head_stride;
};

/// Of 4 x 4 numbers, one row in each lane of a quad, leaves one column.
__device__ __forceinline__ void transpose_in_quad(std::uint32_t (&x)[4], int lane) {
  const bool odd = lane & 1;
  const bool upper = lane & 2;
  std::uint32_t a = __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
  std::uint32_t b = __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  (odd ? x[0] : x[1]) = a;
  (odd ? x[2] : x[3]) = b;
  a = __shfl_xor_sync(~0u, upper ? x[0] : x[2], 2);
  b = __shfl_xor_sync(~0u, upper ? x[1] : x[3], 2);
  (upper ? x[0] : x[2]) = a;
  (upper ? x[1] : x[3]) = b;
}

/// Rows [first, first + 32 / (kDim / 8)) of (token, head in the group) of one KV head by one warp,
/// kDim / 8 lanes a row; row 0 is of token `token0`.
template <class T, int kDim>
__device__ __forceinline__ void merge_rows(const MergeParams& params, std::int64_t token0, int head,
                                           int first) {
  constexpr int kLanes = kDim / 8;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const unsigned shift = threadIdx.x % 32 / kLanes * kLanes;
  const unsigned lanes = (kLanes == 32 ? ~0u : (1u << kLanes) - 1) << shift;
  const int index = first + static_cast<int>(threadIdx.x) % 32 / kLanes;
  const std::int64_t end = params.partials.first_token + params.num_tokens;
  const bool exists = token0 + (index >> params.log2_group_size) < end;
  const std::int64_t token = exists ? token0 + (index >> params.log2_group_size) : token0;
  const int row = index & ((1 << params.log2_group_size) - 1);
  const int q_head = (head << params.log2_group_size) + row;
  const int top_k = params.selection.top_k;
  const bool takes = exists && params.selection.takes(token, head);
  const std::uint64_t attended =
      takes ? params.attended[token * params.selection.num_kv_heads + head] : 0;
  // Of slot 0; those of further slots are group_size rows apart.
  const std::int64_t slot0 =
      ((token - params.partials.first_token) * params.selection.num_kv_heads + head) * top_k
      << params.log2_group_size;
  const std::int64_t row0 = slot0 + row;
  const auto lse_of = [&](int slot) {
    return slot < top_k && (attended >> slot & 1) != 0
               ? __ldcs(params.partials.lse + row0 + (std::int64_t{slot} << params.log2_group_size))
               : -INFINITY;
  };

  float top = -INFINITY;
  for (int slot = lane; slot < top_k; slot += kLanes) top = fmaxf(top, lse_of(slot));
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  }
  const float reference = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (int slot = lane; slot < top_k; slot += kLanes) total += ptx::ex2(lse_of(slot) - reference);
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;

  float sum[8] = {};
  bool recompute = false;  // the row
#pragma unroll 1
  for (int base = 0; base < top_k; base += kLanes) {
    // Each lane looks after the weight of one slot.
    const float lse = lse_of(base + lane);
    float weight = 0.0f;
    bool redo = false;
    if (lse != -INFINITY) {
      const int exponent =
          params.partials.exponents[row0 + (std::int64_t{base + lane} << params.log2_group_size)];
      redo = exponent == kRecompute;
      weight = ptx::ex2(lse - reference) * inverse * __int_as_float((127 - exponent) << 23);
    }
    const unsigned used = __ballot_sync(~0u, lse != -INFINITY && !redo) >> shift;
    recompute |= (__ballot_sync(~0u, redo) & lanes) != 0;
    uint4 partial[kLanes];
    const std::uint16_t* const from =
        params.partials.out + (slot0 + (std::int64_t{base} << params.log2_group_size)) * kDim +
        partial_offset<kDim>(params.log2_group_size, row) +
        lane / 4 * partial_chunk_stride(params.log2_group_size) + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      partial[i] = make_uint4(0, 0, 0, 0);
      if (used >> i & 1) {
        partial[i] = __ldcs(reinterpret_cast<const uint4*>(
            from + (static_cast<std::int64_t>(i) * kDim << params.log2_group_size)));
      }
    }
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const float w = __shfl_sync(~0u, weight, i, kLanes);
      const std::uint32_t words[4] = {partial[i].x, partial[i].y, partial[i].z, partial[i].w};
      if (used >> i & 1) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[j]));
          sum[2 * j] = fmaf(w, pair.x, sum[2 * j]);
          sum[2 * j + 1] = fmaf(w, pair.y, sum[2 * j + 1]);
        }
      }
    }
  }
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(sum[i]));
  recompute |= (__ballot_sync(~0u, largest > kLargest<T>) & lanes) != 0;
  std::uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = ptx::pack<T>(sum[2 * i], sum[2 * i + 1]);
  transpose_in_quad(words, lane);
  if (takes && !recompute) {
    T* const out = static_cast<T*>(params.out) + token * params.out_stride +
                   q_head * params.out_head_stride + 8 * lane;
    if (params.vector_stores) {
      __stcs(reinterpret_cast<uint4*>(out), make_uint4(words[0], words[1], words[2], words[3]));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        reinterpret_cast<std::uint16_t*>(out)[i] =
            static_cast<std::uint16_t>(words[i / 2] >> i % 2 * 16);
      }
    }
    if (params.lse != nullptr && lane == 0) {
      constexpr float kLn2 = 0.693147180559945f;
      params.lse[token * params.lse_stride + q_head * params.lse_head_stride] =
          total == 0.0f ? -INFINITY : (reference + log2f(total)) * kLn2;
    }
  }
  unsigned rows = __ballot_sync(~0u, takes && recompute && lane == 0);
  while (rows != 0) {
    const int from = __ffs(static_cast<int>(rows)) - 1;
    rows &= rows - 1;
    attend_row<T>(params.tensors, __shfl_sync(~0u, token, from), head, __shfl_sync(~0u, row, from));
  }
}

/// CTAs walk the tiles of the launch, of each KV head, and pass over those of the union kernel.
template <class T, int kDim>
__global__ void __launch_bounds__(kMergeThreads, 4)
    merge_kernel(const __grid_constant__ MergeParams params) {
  if (params.selection.takes_nothing()) return;
  constexpr int kRowsPerWarp = 32 / (kDim / 8);
  constexpr int kRowsPerCta = kMergeThreads / 32 * kRowsPerWarp;
  const int num_heads = params.selection.num_kv_heads;
  const std::int64_t tiles = (params.num_tokens + kTokensPerColdTile - 1) / kTokensPerColdTile;
  const int rows = kTokensPerColdTile << params.log2_group_size;
  for (std::int64_t i = blockIdx.x; i < tiles * num_heads; i += gridDim.x) {
    const std::int64_t token0 = params.partials.first_token + i / num_heads * kTokensPerColdTile;
    const int head = static_cast<int>(i % num_heads);
    if (!params.selection.takes(token0, head)) continue;
    for (int row = static_cast<int>(threadIdx.x) / 32 * kRowsPerWarp; row < rows;
         row += kRowsPerCta) {
      merge_rows<T, kDim>(params, token0, head, row);
    }
  }
}

}  // namespace msa::cuda::sm90::kv_outer
