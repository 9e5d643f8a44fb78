// SPDX-License-Identifier: Apache-2.0
//
// One row of SparseAttentionForward by one warp on CUDA cores, touching only what the row attends:
// the way out for rows that a tensor-core kernel reports as not finite, because 0 * NaN of a
// neighbour's key is NaN, or whose sums overflow although its result does not. In double precision:
// slow and rare; its result is the contract's for any input.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/batch.cuh"
#include "cuda/common/ptx/math.cuh"

namespace msa::cuda::sm90 {

/// SparseAttentionForward as kernels get it. Strides are in elements.
struct AttentionTensors {
  DeviceBatch batch;
  const void* q;
  const void* k;
  const void* v;
  const std::int32_t* block_ids;
  void* out;
  float* lse;  ///< or null
  std::int64_t q_token_stride, q_head_stride;
  std::int64_t k_page_stride, k_head_stride, k_token_stride;  ///< no page stride: ragged
  std::int64_t v_page_stride, v_head_stride, v_token_stride;
  std::int64_t ids_head_stride, ids_token_stride;
  std::int64_t out_token_stride, out_head_stride;
  std::int64_t lse_token_stride, lse_head_stride;
  int num_kv_heads;
  int group_size;
  int head_dim;
  int top_k;
  float scale_log2;      ///< softmax scale * log2(e)
  const float* k_scale;  ///< of KV heads, or null: what elements are multiplied by
  const float* v_scale;
  std::int64_t k_scale_stride, v_scale_stride;

  __device__ __forceinline__ float score_scale(int kv_head) const {
    return k_scale == nullptr ? scale_log2 : scale_log2 * k_scale[kv_head * k_scale_stride];
  }
  __device__ __forceinline__ float value_scale(int kv_head) const {
    return v_scale == nullptr ? 1.0f : v_scale[kv_head * v_scale_stride];
  }

  __device__ __forceinline__ const std::int32_t* ids_of(int kv_head, std::int64_t token) const {
    return block_ids + kv_head * ids_head_stride + token * ids_token_stride;
  }
};

/// Rows whose largest score (base 2) is beyond this are computed again. The kernels' weights are
/// 2^(s scale - m), where the product is not rounded and m, a rounded product, is up to half an ulp
/// from it. All of a row have that factor and it cancels, as long as it takes them nowhere out of
/// the range of 16 bits: below 2^24 it is within 2^-1/2 .. 2^1/2, so that weights of at most 2^8
/// stay below 2^9 (f16 ends at 2^16) and small ones lose no more than half a bit of f16's 2^-24.
/// At 2^30 it would be 2^-32 .. 2^32: infinite, or a row of zeros.
inline constexpr float kHugeScore = 0x1p24f;

/// The largest finite number. Rounded weights may take an average of values past the largest of
/// them by up to 2^-8 of it, and so past what T holds; such rows are computed again, too.
template <class T>
inline constexpr float kLargest = std::is_same_v<T, __half> ? 65504.0f : 0x1.fep127f;

/// Queries and outputs of T, keys and values of Key.
template <class T, class Key = T>
__device__ __forceinline__ void attend_row(const AttentionTensors& g, std::int64_t row, int kv_head,
                                           int in_group) {
  constexpr int kMaxShare = 4;  // elements of a row of at most 128 that a lane owns
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int head = kv_head * g.group_size + in_group;
  const DeviceSequence sequence = sequence_of_query(g.batch, row);
  const std::int64_t position = sequence.position(row - sequence.q_begin);
  const int block_size = g.batch.block_size;
  const T* const q = static_cast<const T*>(g.q) + row * g.q_token_stride + head * g.q_head_stride;
  const std::int32_t* const ids = g.ids_of(kv_head, row);
  const double scale = g.score_scale(kv_head);
  const double value_scale = g.value_scale(kv_head);
  double m = -INFINITY;
  double l = 0.0;
  double o[kMaxShare] = {};
#pragma unroll 1
  for (int slot = 0; slot < g.top_k; ++slot) {
    const std::int64_t block = ids[slot];
    if (block < 0 || position < 0 || block > position / block_size) continue;
    const std::int64_t first = block * block_size;
    std::int64_t page = 0;
    std::int64_t token = sequence.k_begin + first;
    if (g.batch.page_table != nullptr) {
      page = page_of(g.batch, sequence.batch_idx, block);
      token = 0;
      if (page < 0) continue;
    }
    const Key* const k = static_cast<const Key*>(g.k) + page * g.k_page_stride +
                         kv_head * g.k_head_stride + token * g.k_token_stride;
    const Key* const v = static_cast<const Key*>(g.v) + page * g.v_page_stride +
                         kv_head * g.v_head_stride + token * g.v_token_stride;
#pragma unroll 1
    for (int start = 0; start < block_size && first + start <= position; start += 32) {
      double s = -INFINITY;
      if (first + start + lane <= position) {
        const Key* const key = k + (start + lane) * g.k_token_stride;
        double dot = 0.0;
#pragma unroll 1
        for (int d = 0; d < g.head_dim; ++d) {
          dot = fma(static_cast<double>(static_cast<float>(q[d])),
                    static_cast<double>(static_cast<float>(key[d])), dot);
        }
        s = dot * scale;
      }
      double top = s;
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        top = fmax(top, __shfl_xor_sync(~0u, top, lanes));
      }
      const double now = fmax(m, top);
      const double alpha = m == now ? 1.0 : ptx::ex2(static_cast<float>(m - now));
      m = now;
      const float p = s == -INFINITY ? 0.0f : ptx::ex2(static_cast<float>(s - m));
      double sum = p;
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      l = l * alpha + sum;
#pragma unroll
      for (int e = 0; e < kMaxShare; ++e) o[e] *= alpha;
#pragma unroll 1
      for (int j = 0; j < 32; ++j) {
        const double weight = __shfl_sync(~0u, p, j);
        if (first + start + j > position) break;
#pragma unroll
        for (int e = 0; e < kMaxShare; ++e) {
          const int d = lane + 32 * e;
          if (d < g.head_dim) {
            const auto value = static_cast<float>(v[(start + j) * g.v_token_stride + d]);
            o[e] = fma(weight, static_cast<double>(value), o[e]);
          }
        }
      }
    }
  }
  T* const out = static_cast<T*>(g.out) + row * g.out_token_stride + head * g.out_head_stride;
#pragma unroll
  for (int e = 0; e < kMaxShare; ++e) {
    const int d = lane + 32 * e;
    const double mean = l == 0.0 ? 0.0 : value_scale * (o[e] / l);
    if (d < g.head_dim) out[d] = static_cast<T>(static_cast<float>(mean));
  }
  if (g.lse != nullptr && lane == 0) {
    constexpr double kLn2 = 0.693147180559945309;
    const double log2_sum = log2f(static_cast<float>(l));
    g.lse[row * g.lse_token_stride + head * g.lse_head_stride] =
        l == 0.0 ? -INFINITY : static_cast<float>((m + log2_sum) * kLn2);
  }
}

}  // namespace msa::cuda::sm90
