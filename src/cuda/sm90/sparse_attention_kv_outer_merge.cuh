// SPDX-License-Identifier: Apache-2.0
//
// Merges the partial results of a row, in the order of its slots.
#pragma once

#include "cuda/sm90/sparse_attention_kv_outer_attend.cuh"

namespace msa::cuda::sm90::kv_outer {

inline constexpr int kMergeThreads = 128;

/// A strided tensor. Paged keys: `stride` is between pages, `row_stride` between keys of one.
struct View {
  const void* data;
  std::int64_t stride;  ///< of the first axis, elements
  std::int64_t row_stride;
  std::int64_t head_stride;
};

struct MergeParams {
  Selection selection;
  const std::uint64_t* attended;
  Partials partials;
  std::int64_t num_rows;  ///< (token, query head) of this launch
  int num_q_heads;
  int log2_group_size;
  float scale_log2;
  bool vector_stores;  ///< 16 bytes of a row of `out` are aligned
  View q, k, v;        ///< for what the tensor cores could not do
  void* out;
  std::int64_t out_stride, out_head_stride;
  float* lse;  ///< or null
  std::int64_t lse_stride, lse_head_stride;
};

/// Columns of a lane of a row, in the order of its partials: 8 (4 c + i) + 2 q + {0, 1}.
__device__ __forceinline__ int column_of(int lane, int i) {
  return 8 * (lane / 4 * 4 + i / 2) + 2 * (lane % 4) + i % 2;
}

/// Adds weight times the normalised output of one (row, slot), computed key by key in fp32: for
/// rows where 0 times a value out of their sight was NaN.
template <class T, int kDim>
__device__ void add_recomputed(const MergeParams& params, std::int64_t token, int q_head, int slot,
                               float lse, float weight, int lane, unsigned lanes, float (&sum)[8]) {
  const DeviceBatch& batch = params.selection.batch;
  const int head = q_head >> params.log2_group_size;
  const DeviceSequence sequence = sequence_of_query(batch, token);
  const std::int64_t block = params.selection.block_of(token, head, slot);
  const int num_visible =
      pair_at(batch, sequence, sequence.position(token - sequence.q_begin), block).num_visible;
  const auto key_offset = [&](const View& view) {
    return batch.page_table == nullptr
               ? (sequence.k_begin + block * batch.block_size) * view.stride +
                     head * view.head_stride
               : page_of(batch, sequence.batch_idx, block) * view.stride + head * view.head_stride;
  };
  const T* const q = static_cast<const T*>(params.q.data) + token * params.q.stride +
                     q_head * params.q.head_stride;
  const T* const k = static_cast<const T*>(params.k.data) + key_offset(params.k);
  const T* const v = static_cast<const T*>(params.v.data) + key_offset(params.v);
#pragma unroll 1
  for (int key = 0; key < num_visible; ++key) {
    float score = 0.0f;
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      const int d = lane * 8 + i;
      score += static_cast<float>(q[d]) * static_cast<float>(k[key * params.k.row_stride + d]);
    }
#pragma unroll
    for (int step = kDim / 16; step > 0; step /= 2) {
      score += __shfl_xor_sync(lanes, score, step);
    }
    const float p = weight * ptx::ex2(score * params.scale_log2 - lse);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      sum[i] += p * static_cast<float>(v[key * params.v.row_stride + column_of(lane, i)]);
    }
  }
}

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

/// The rows [first, first + 32 / (kDim / 8)) by one warp, kDim / 8 lanes a row.
template <class T, int kDim>
__device__ __forceinline__ void merge_rows(const MergeParams& params, std::int64_t first) {
  constexpr int kLanes = kDim / 8;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const unsigned shift = threadIdx.x % 32 / kLanes * kLanes;
  const unsigned lanes = (kLanes == 32 ? ~0u : (1u << kLanes) - 1) << shift;
  const std::int64_t index = first + threadIdx.x % 32 / kLanes;
  const bool exists = index < params.num_rows;
  const std::int64_t token =
      params.partials.first_token + (exists ? index : 0) / params.num_q_heads;
  const int q_head = static_cast<int>((exists ? index : 0) % params.num_q_heads);
  const int head = q_head >> params.log2_group_size;
  const int top_k = params.selection.top_k;
  const bool takes = exists && params.selection.takes(token, head);
  const std::uint64_t attended =
      takes ? params.attended[token * params.selection.num_kv_heads + head] : 0;
  // Of slot 0; those of further slots are group_size rows apart.
  const int row = q_head & ((1 << params.log2_group_size) - 1);
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
  std::uint64_t to_recompute = 0;
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
    to_recompute |= static_cast<std::uint64_t>((__ballot_sync(~0u, redo) & lanes) >> shift) << base;
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
  while (to_recompute != 0) {
    const int slot = __ffsll(static_cast<long long>(to_recompute)) - 1;
    to_recompute &= to_recompute - 1;
    const float lse = lse_of(slot);
    add_recomputed<T, kDim>(params, token, q_head, slot, lse, ptx::ex2(lse - reference) * inverse,
                            lane, lanes, sum);
  }
  __syncwarp();

  std::uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = ptx::pack<T>(sum[2 * i], sum[2 * i + 1]);
  transpose_in_quad(words, lane);
  if (!takes) return;
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

template <class T, int kDim>
__global__ void __launch_bounds__(kMergeThreads, 5)
    merge_kernel(const __grid_constant__ MergeParams params) {
  constexpr int kRowsPerWarp = 32 / (kDim / 8);
  if (params.selection.takes_nothing()) return;
  constexpr std::int64_t kRowsPerCta = kMergeThreads / 32 * kRowsPerWarp;
#pragma unroll 1
  for (std::int64_t first = blockIdx.x * kRowsPerCta; first < params.num_rows;
       first += gridDim.x * kRowsPerCta) {
    merge_rows<T, kDim>(params, first + threadIdx.x / 32 * kRowsPerWarp);
  }
}

}  // namespace msa::cuda::sm90::kv_outer
