// SPDX-License-Identifier: Apache-2.0
//
// What sparse and dense attention share: their arguments, a warp's 16 rows of the online softmax,
// and the exact way out for rows that tensor cores can't do.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>

#include "cuda/common/keys.cuh"
#include "cuda/common/ptx/math.cuh"
#include "cuda/common/support.hpp"
#include "cuda/common/tile.cuh"

namespace msa::cuda {

inline constexpr int kMostDim = 256;

/// Both attention operations as kernels get them. Strides of q and out are in bytes, others in
/// elements.
struct AttentionParams {
  DeviceBatch batch;
  KeyRows k;
  KeyRows v;
  const std::byte* q;
  std::byte* out;
  float* lse;                     ///< or null
  const std::int32_t* block_ids;  ///< null: dense
  const float* k_scale;           ///< of KV heads, or null
  const float* v_scale;
  std::int64_t q_token_stride, q_head_stride;
  std::int64_t out_token_stride, out_head_stride;
  std::int64_t lse_token_stride, lse_head_stride;
  std::int64_t ids_head_stride, ids_token_stride;
  std::int64_t k_scale_stride, v_scale_stride;
  double scale;
  Load q_load;
  int group_size;
  int head_dim;
  int top_k;            ///< sparse
  int heads_per_tile;   ///< of a group
  int tokens_per_tile;  ///< dense

  __device__ __forceinline__ double score_scale(int kv_head) const {
    return k_scale == nullptr ? scale
                              : scale * static_cast<double>(k_scale[kv_head * k_scale_stride]);
  }
  __device__ __forceinline__ float value_scale(int kv_head) const {
    return v_scale == nullptr ? 1.0f : v_scale[kv_head * v_scale_stride];
  }
  __device__ __forceinline__ const std::byte* q_row(std::int64_t row, int head) const {
    return q + row * q_token_stride + head * q_head_stride;
  }
  template <class T>
  __device__ __forceinline__ T* out_row(std::int64_t row, int head) const {
    return reinterpret_cast<T*>(out + row * out_token_stride + head * out_head_stride);
  }
  __device__ __forceinline__ void store_lse(std::int64_t row, int head, float value) const {
    if (lse != nullptr) lse[row * lse_token_stride + head * lse_head_stride] = value;
  }
};

template <class Args>
AttentionParams make_attention_params(const Args& args) {
  const Problem& p = args.problem;
  const auto size = static_cast<std::int64_t>(size_of(args.q.dtype));
  AttentionParams params{};
  params.batch = make_device_batch(args);
  params.k = make_key_rows(args.k, args.batch, p.block_size);
  params.v = make_key_rows(args.v, args.batch, p.block_size);
  params.q = static_cast<const std::byte*>(args.q.data);
  params.out = static_cast<std::byte*>(args.out.data);
  params.q_token_stride = args.q.stride[0] * size;
  params.q_head_stride = args.q.stride[1] * size;
  params.out_token_stride = args.out.stride[0] * size;
  params.out_head_stride = args.out.stride[1] * size;
  if (args.lse.given()) {
    params.lse = static_cast<float*>(args.lse.data);
    params.lse_token_stride = args.lse.stride[0];
    params.lse_head_stride = args.lse.stride[1];
  }
  if (args.k_scale.given()) {
    params.k_scale = static_cast<const float*>(args.k_scale.data);
    params.k_scale_stride = args.k_scale.stride[0];
  }
  if (args.v_scale.given()) {
    params.v_scale = static_cast<const float*>(args.v_scale.data);
    params.v_scale_stride = args.v_scale.stride[0];
  }
  if constexpr (requires { args.block_ids; }) {
    params.block_ids = static_cast<const std::int32_t*>(args.block_ids.data);
    params.ids_head_stride = args.block_ids.stride[0];
    params.ids_token_stride = args.block_ids.stride[1];
    params.top_k = p.top_k;
  }
  params.scale = scale_or_default(args.softmax_scale, p.head_dim);
  params.q_load = load_of(args.q);
  params.group_size = p.group_size();
  params.head_dim = p.head_dim;
  return params;
}

template <class Args>
std::optional<std::string> declines_attention(const Args& args) {
  if (auto reason = declines_device(args, 80, false)) return reason;
  const DType dtype = args.q.dtype;
  if (dtype != DType::bf16 && dtype != DType::f16) {
    return core::concat("q is ", name_of(dtype), ", not bf16 or f16");
  }
  const auto differs = [&](const char* name, const TensorView& view, bool or_e4m3) {
    std::optional<std::string> reason;
    if (view.dtype != dtype && !(or_e4m3 && view.dtype == DType::e4m3)) {
      reason = core::concat(name, " is ", name_of(view.dtype), " and q is ", name_of(dtype));
    }
    return reason;
  };
  if (auto reason = differs("k", args.k, true)) return reason;
  if (auto reason = differs("v", args.v, true)) return reason;
  if (auto reason = differs("out", args.out, false)) return reason;
  if (args.lse.given() && args.lse.dtype != DType::f32) {
    return core::concat("lse is ", name_of(args.lse.dtype), ", not f32");
  }
  if (args.problem.head_dim > kMostDim) {
    return core::concat("head_dim ", args.problem.head_dim, " is above ", kMostDim);
  }
  return std::nullopt;
}

/// Rows l / 4 and l / 4 + 8 of a warp's 16 in lane l: accumulators of O, unnormalised, and the
/// softmax in base 2.
template <class T, int kDim>
struct SoftmaxRows {
  float o[kDim / 8][4] = {};
  float m[2] = {-INFINITY, -INFINITY};  ///< largest score
  float l[2] = {};                      ///< the lane's part of the sum of exp2(s - m)
  float check[2] = {};                  ///< 0; NaN once a score was not finite

  /// Takes 16 kChunks keys: s = q k, of which the rows see the columns below limit[] of the chunks
  /// in the mask `present`.
  template <int kChunks>
  __device__ __forceinline__ void attend(float (&s)[2 * kChunks][4], const int (&limit)[2],
                                         unsigned present, float scale_log2) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int j = 0; j < 2 * kChunks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = i / 2;
        const bool visible =
            8 * j + lane % 4 * 2 + i % 2 < limit[h] && (present >> (j / 2) & 1) != 0;
        const float score = visible ? s[j][i] * scale_log2 : 0.0f;
        check[h] = fmaf(score, 0.0f, check[h]);
        s[j][i] = visible ? score : -INFINITY;
        top[h] = fmaxf(top[h], s[j][i]);
      }
    }
    float alpha[2];
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
      const float larger = fmaxf(m[h], top[h]);
      base[h] = larger == -INFINITY ? 0.0f : larger;
      alpha[h] = larger == m[h] ? 1.0f : ptx::ex2(m[h] - base[h]);
      m[h] = larger;
      l[h] *= alpha[h];
    }
    if (__any_sync(~0u, alpha[0] != 1.0f || alpha[1] != 1.0f)) {
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[j][i] *= alpha[i / 2];
      }
    }
#pragma unroll
    for (int j = 0; j < 2 * kChunks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[j][i] = ptx::ex2(s[j][i] - base[i / 2]);
        l[i / 2] += s[j][i];
      }
    }
  }

  /// O += P v for the keys that attend() took, whose weights are in s.
  template <int kChunks>
  __device__ __forceinline__ void accumulate(const float (&s)[2 * kChunks][4], const T* v) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const std::uint32_t p[4] = {ptx::pack<T>(s[2 * c][0], s[2 * c][1]),
                                  ptx::pack<T>(s[2 * c][2], s[2 * c][3]),
                                  ptx::pack<T>(s[2 * c + 1][0], s[2 * c + 1][1]),
                                  ptx::pack<T>(s[2 * c + 1][2], s[2 * c + 1][3])};
      multiply_pv<T, kDim>(o, p, v, c);
    }
  }

  /// The whole sums, and the rows' check in them: NaN where a score was not finite.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      l[h] += check[h];
      l[h] += __shfl_xor_sync(~0u, l[h], 1);
      l[h] += __shfl_xor_sync(~0u, l[h], 2);
    }
  }
};

/// A row whose scores are so large (base 2) that fp32's rounding of them is no rounding of weights
/// anymore, or with something that is not finite, has to be done by exact_row().
__device__ __forceinline__ bool is_huge(float m) {
  return m != -INFINITY && !(fabsf(m) <= 0x1p30f);
}

__device__ __forceinline__ float natural_lse(float m, float l) {
  constexpr float kLn2 = 0.693147180559945309f;
  return l == 0.0f ? -INFINITY : (m + log2f(l)) * kLn2;
}

__device__ __forceinline__ double warp_sum(double x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

/// One row by one warp in double precision, touching nothing but what the row attends: the way out
/// for rows with a NaN or an infinity, be it their own or a 0 * NaN of a neighbour's key. Slow and
/// rare; its result is the contract's for any input.
template <class T>
__device__ __noinline__ void exact_row(const AttentionParams& g, std::int64_t row, int head) {
  constexpr int kShare = kMostDim / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int kv_head = head / g.group_size;
  const DeviceSequence sequence = sequence_of_query(g.batch, row);
  const std::int64_t visible = num_visible_keys(sequence, row);
  const std::int64_t num_blocks = (visible + g.batch.block_size - 1) >> g.k.block_shift;
  const std::int64_t num_slots = g.block_ids == nullptr ? num_blocks : g.top_k;
  const std::byte* const q = g.q_row(row, head);
  const double scale = g.score_scale(kv_head);
  double m = -INFINITY;
  double l = 0.0;
  double o[kShare] = {};
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
    for (std::int64_t slot = 0; slot < num_slots; ++slot) {
      const std::int64_t block =
          g.block_ids == nullptr
              ? slot
              : g.block_ids[kv_head * g.ids_head_stride + row * g.ids_token_stride + slot];
      if (block < 0 || block >= num_blocks || !exists(g.batch, sequence, block)) continue;
      const std::int64_t begin = block << g.k.block_shift;
      const std::int64_t end = min(begin + g.batch.block_size, visible);
#pragma unroll 1
      for (std::int64_t token = begin; token < end; ++token) {
        const std::byte* const k = token_address(g.batch, sequence, g.k, kv_head, token);
        const std::byte* const v = token_address(g.batch, sequence, g.v, kv_head, token);
        double dot = 0.0;
#pragma unroll 1
        for (int d = lane; d < g.head_dim; d += 32) {
          dot += static_cast<double>(element_at<T>(q, g.q_load, d)) *
                 static_cast<double>(element_at<T>(k, g.k.load, d));
        }
        const double s = scale * warp_sum(dot);
        if (pass == 0) {
          m = s > m ? s : m;
          continue;
        }
        const double p = s == -INFINITY ? 0.0 : exp(s - m);
        l += p;
#pragma unroll
        for (int e = 0; e < kShare; ++e) {
          const int d = lane + 32 * e;
          if (d < g.head_dim) o[e] += p * static_cast<double>(element_at<T>(v, g.v.load, d));
        }
      }
    }
  }
  const double scale_v = static_cast<double>(g.value_scale(kv_head));
  T* const out = g.out_row<T>(row, head);
#pragma unroll
  for (int e = 0; e < kShare; ++e) {
    const int d = lane + 32 * e;
    if (d < g.head_dim) {
      out[d] = static_cast<T>(static_cast<float>(l == 0.0 ? 0.0 : scale_v * o[e] / l));
    }
  }
  if (lane == 0) g.store_lse(row, head, static_cast<float>(m + log(l)));
}

}  // namespace msa::cuda
