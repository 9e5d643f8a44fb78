// SPDX-License-Identifier: Apache-2.0
//
// SparseAttentionForward for few query tokens: keys and values stream from memory into the
// registers of tensor-core fragments, without shared memory. A CTA has one token, the heads of one
// group as the 16 rows of its products, and every num_splits-th of the token's blocks; its warps
// take chunks of 16 keys by turns. What they have is merged in shared memory, and that of a token's
// splits, which are one cluster, through distributed shared memory: one launch, in a fixed order.
//
// Fragments (lane 4 g + t of m16n8k16): the sum over dimensions of q k takes them in any order, so
// the 16-byte pieces t, t + 4, ... of key g are the lane's B fragments as they lie in memory. Of V
// a lane has piece g of the keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9, which are the columns of P that
// it holds: two keys' elements are paired by a byte permutation, and dimension i of the pieces is
// column g of the i-th product. See docs/kernels/sm90_decode_attention.md.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/common/attention.cuh"
#include "cuda/common/launch.hpp"
#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/cluster.cuh"
#include "cuda/sm90/sparse_attention_decode.hpp"
#include "cuda/sm90/sparse_attention_widen.cuh"

namespace msa::cuda::sm90 {

/// Of a CTA. A block has 8 chunks: with a whole cluster for a token, 8 warps have one each and wait
/// for memory once. Otherwise twice as many CTAs of 4 warps overlap better.
inline constexpr int kDecodeFewWarps = 4;
inline constexpr int kDecodeManyWarps = 8;
inline constexpr int kDecodeAttentionRows = 16;
inline constexpr int kDecodeAttentionKeys = 16;   // of a chunk; no block is smaller
inline constexpr int kDecodeAttentionSlots = 64;  // most blocks of a token

/// Of 16 keys, as a lane holds them. T is the type of the products, Element that in memory
/// (std::uint8_t: e4m3).
template <class T, class Element, int kDim>
struct DecodeFragments {
  static constexpr int kPieceDims = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kKeyPieces = kDim / kPieceDims / 4;  ///< of a key in a lane
  static constexpr int kStepsPerPiece = kPieceDims / 4;     ///< 4 dimensions of a step of 16
  static constexpr int kSteps = kDim / 16;
  static constexpr int kValuePieces = kDim / kPieceDims / 8;  ///< of a value in a lane
  static_assert(kValuePieces > 0);
  static constexpr bool kNarrow = sizeof(Element) == 1;
  /// e4m3 widens to f16 in one instruction for two, and keeps NaN. Of keys that serves f16 queries
  /// only; weights of values are f16 as well, multiplied by kWeightScale to be above its subnormal
  /// numbers.
  using Value = std::conditional_t<kNarrow, __half, T>;
  static constexpr float kWeightScale = kNarrow ? 0x1p15f : 1.0f;

  uint4 k[2][kKeyPieces];    ///< of keys g and g + 8
  uint4 v[4][kValuePieces];  ///< of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9

  static __device__ __forceinline__ uint4 piece(const std::byte* row, int index) {
    return __ldcs(reinterpret_cast<const uint4*>(row) + index);
  }
  /// Keys from num_keys on are zeros: 0 * NaN would be NaN.
  __device__ __forceinline__ void load_keys(const std::byte* from, std::int64_t stride,
                                            int num_keys) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = lane / 4 + 8 * half;
#pragma unroll
      for (int i = 0; i < kKeyPieces; ++i) {
        k[half][i] = key < num_keys ? piece(from + key * stride, lane % 4 + 4 * i) : uint4{};
      }
    }
  }
  __device__ __forceinline__ void load_values(const std::byte* from, std::int64_t stride,
                                              int num_keys) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = lane % 4 * 2 + i % 2 + i / 2 * 8;
#pragma unroll
      for (int j = 0; j < kValuePieces; ++j) {
        v[i][j] = key < num_keys ? piece(from + key * stride, lane / 4 + 8 * j) : uint4{};
      }
    }
  }

  static __device__ __forceinline__ std::uint32_t word(const uint4& words, int i) {
    return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
  }

  /// s = q k for the 16 keys, q as A fragments of each step. `nan` gets NaN bits that widening to
  /// T drops.
  __device__ __forceinline__ void multiply_keys(const std::uint32_t (&q)[kSteps][4],
                                                float (&s)[2][4], std::uint32_t& nan) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      s[half][0] = s[half][1] = s[half][2] = s[half][3] = 0.0f;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint4& words = k[half][step / kStepsPerPiece];
        if constexpr (sizeof(Element) == 2) {
          ptx::mma_m16n8k16<T>(s[half], q[step], word(words, step % 2 * 2),
                               word(words, step % 2 * 2 + 1));
        } else {
          const std::uint32_t four = word(words, step % 4);
          nan |= nan_bits<T>(four);
          const uint2 wide = widen4<T>(four);
          ptx::mma_m16n8k16<T>(s[half], q[step], wide.x, wide.y);
        }
      }
    }
  }

  /// o[i] += P V for columns i of all pieces.
  __device__ __forceinline__ void multiply_values(const std::uint32_t (&p)[4],
                                                  float (&o)[kDim / 8][4]) const {
    constexpr std::uint32_t kLow = 0x5410;
    constexpr std::uint32_t kHigh = 0x7632;
#pragma unroll
    for (int j = 0; j < kValuePieces; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Two or four dimensions of each key.
        uint2 pairs[4];
#pragma unroll
        for (int key = 0; key < 4; ++key) {
          const std::uint32_t bits = word(v[key][j], i);
          if constexpr (sizeof(Element) == 2) {
            pairs[key] = {bits, 0};
          } else {
            pairs[key] = widen4<Value>(bits);
          }
        }
#pragma unroll
        for (int half = 0; half < kPieceDims / 8; ++half) {
          const auto of = [&](int key) { return half == 0 ? pairs[key].x : pairs[key].y; };
          const int column = j * kPieceDims + i * (kPieceDims / 4) + half * 2;
          ptx::mma_m16n8k16<Value>(o[column], p, __byte_perm(of(0), of(1), kLow),
                                   __byte_perm(of(2), of(3), kLow));
          ptx::mma_m16n8k16<Value>(o[column + 1], p, __byte_perm(of(0), of(1), kHigh),
                                   __byte_perm(of(2), of(3), kHigh));
        }
      }
    }
  }

  /// The dimension of o[i], column `column` of 8.
  static __device__ __forceinline__ int dim_of(int i, int column) {
    return i / kPieceDims * 8 * kPieceDims + column * kPieceDims + i % kPieceDims;
  }
};

/// A block of the CTA's share, ready to be read.
struct DecodeBlock {
  const std::byte* k;
  const std::byte* v;
  int num_keys;  ///< that the token sees; 0: none, or no such block
};

template <int kDim, int kWarps>
struct DecodeMerge {
  static constexpr int kPitch = kDim + 4;  // rows in different banks
  float o[kWarps][kDecodeAttentionRows][kPitch];
  float2 ml[kWarps][kDecodeAttentionRows];  ///< maximum and sum
  float merged_o[kDecodeAttentionRows][kDim];
  float2 merged_ml[kDecodeAttentionRows];
};

/// Maximum and sum of a row whose parts have `ml`, and the weight of each part's sums.
template <int kParts>
__device__ __forceinline__ float2 merge_statistics(const float2 (&ml)[kParts],
                                                   float (&weight)[kParts]) {
  float m = -INFINITY;
#pragma unroll
  for (int i = 0; i < kParts; ++i) m = fmaxf(m, ml[i].x);
  float l = 0.0f;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    weight[i] = ml[i].x == -INFINITY ? 0.0f : ptx::ex2(ml[i].x - m);
    // NaN stays: a row with a score that is not finite is done again.
    l += ml[i].y == 0.0f ? 0.0f : weight[i] * ml[i].y;
    if (ml[i].y != ml[i].y) l = ml[i].y;
  }
  return {m, l};
}

__device__ __forceinline__ void cluster_sync() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

inline constexpr int kDecodeWarpsPerSm = 8;  // of 255 registers

/// Steps of q as a lane multiplies them: 4 dimensions each of rows lane / 4 and + 8.
template <class Fragments>
__device__ __forceinline__ void load_queries(const AttentionParams& g, std::int64_t row, int head0,
                                             std::uint32_t (&q)[Fragments::kSteps][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = lane / 4 + 8 * half;
    const std::byte* const from = g.q_row(row, head0 + head);
#pragma unroll
    for (int step = 0; step < Fragments::kSteps; step += 2) {
      const int dim = (lane % 4 + 4 * (step / Fragments::kStepsPerPiece)) * Fragments::kPieceDims +
                      step % Fragments::kStepsPerPiece * 4;
      const uint4 eight =
          head < g.group_size ? *reinterpret_cast<const uint4*>(from + dim * 2) : uint4{};
      q[step][half] = eight.x;
      q[step][2 + half] = eight.y;
      q[step + 1][half] = eight.z;
      q[step + 1][2 + half] = eight.w;
    }
  }
}

/// Attention of a token and KV head on every num_splits-th of its blocks from `split` on, of which
/// id_of(slot) is one, and the merge with the other CTAs of the cluster.
template <class T, class Element, int kDim, int kWarps, class IdOf>
__device__ __forceinline__ void attend_share(
    const AttentionParams& g, std::uint8_t* smem, DecodeBlock (&blocks)[kDecodeAttentionSlots],
    const std::uint32_t (&q)[DecodeFragments<T, Element, kDim>::kSteps][4],
    const DeviceSequence& sequence, std::int64_t row, int kv_head, int split, int num_splits,
    const IdOf& id_of) {
  using Fragments = DecodeFragments<T, Element, kDim>;
  constexpr int kLaneDims = kDim / 32;
  using LaneVector = std::conditional_t<kLaneDims == 4, float4, float2>;
  auto& merge = *reinterpret_cast<DecodeMerge<kDim, kWarps>*>(smem);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int head0 = kv_head * g.group_size;
  const int num_slots = (g.top_k - split + num_splits - 1) / num_splits;
  for (int i = thread; i < num_slots; i += kWarps * 32) {
    const std::int64_t id = id_of(split + i * num_splits);
    const std::int64_t first = id << g.k.block_shift;
    DecodeBlock block{};
    // The page does not wait for the sequence's length, which may still be under way.
    if (first >= 0 && first < g.batch.max_seq_len_k) {
      block.k = token_address(g.batch, sequence, g.k, kv_head, first);
      block.v = token_address(g.batch, sequence, g.v, kv_head, first);
    }
    const std::int64_t visible = num_visible_keys(sequence, row);
    if (block.k != nullptr && first < visible) {
      block.num_keys = static_cast<int>(min(std::int64_t{g.batch.block_size}, visible - first));
    }
    blocks[i] = block;
  }
  const auto scale_log2 = static_cast<float>(g.score_scale(kv_head) * 1.4426950408889634);
  __syncthreads();

  const int chunk_shift = g.k.block_shift - 4;  // chunks of a block
  const int num_chunks = num_slots << chunk_shift;
  // The keys of a chunk that the token sees; most often all, or none of a block.
  const auto keys_of = [&](int chunk) {
    const int first = (chunk & ((1 << chunk_shift) - 1)) * kDecodeAttentionKeys;
    return min(blocks[chunk >> chunk_shift].num_keys - first, kDecodeAttentionKeys);
  };
  const auto offset_of = [&](int chunk, const KeyRows& rows) {
    return (chunk & ((1 << chunk_shift) - 1)) * kDecodeAttentionKeys * rows.token_stride;
  };
  const auto next_chunk = [&](int chunk) {
    do chunk += kWarps;
    while (chunk < num_chunks && keys_of(chunk) <= 0);
    return chunk;
  };
  Fragments fragments;
  const auto load_keys = [&](int chunk) {
    fragments.load_keys(blocks[chunk >> chunk_shift].k + offset_of(chunk, g.k), g.k.token_stride,
                        keys_of(chunk));
  };
  const auto load_values = [&](int chunk) {
    fragments.load_values(blocks[chunk >> chunk_shift].v + offset_of(chunk, g.v), g.v.token_stride,
                          keys_of(chunk));
  };
  SoftmaxRows<T, kDim> rows;
  std::uint32_t nan = 0;
  int chunk = next_chunk(warp - kWarps);
  if (chunk < num_chunks) {
    load_keys(chunk);
    load_values(chunk);
  }
  while (chunk < num_chunks) {
    float s[2][4];
    fragments.multiply_keys(q, s, nan);
    const int num_keys = keys_of(chunk);
    const int next = next_chunk(chunk);
    if (next < num_chunks) load_keys(next);
    rows.template attend<1>(s, {num_keys, num_keys}, 1u, scale_log2);
    const auto weights = [&](int half, int i) {
      return ptx::pack<typename Fragments::Value>(s[half][i] * Fragments::kWeightScale,
                                                  s[half][i + 1] * Fragments::kWeightScale);
    };
    const std::uint32_t p[4] = {weights(0, 0), weights(0, 2), weights(1, 0), weights(1, 2)};
    fragments.multiply_values(p, rows.o);
    if (next < num_chunks) load_values(next);
    chunk = next;
  }
  rows.finish();
  const bool any_nan = __any_sync(~0u, nan != 0);

  // Of the warps.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = lane / 4 + 8 * h;
    if (lane % 4 == 0) merge.ml[warp][r] = {rows.m[h], any_nan ? NAN : rows.l[h]};
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        merge.o[warp][r][Fragments::dim_of(i, lane % 4 * 2 + c)] =
            rows.o[i][2 * h + c] * (1.0f / Fragments::kWeightScale);
      }
    }
  }
  __syncthreads();
  const auto add = [](LaneVector& sum, float weight, const LaneVector& part) {
    sum.x += weight * part.x;
    sum.y += weight * part.y;
    if constexpr (kLaneDims == 4) {
      sum.z += weight * part.z;
      sum.w += weight * part.w;
    }
  };
  const auto store = [&](int r, float2 ml, const LaneVector& o) {
    const float factor = ml.y == 0.0f ? 0.0f : g.value_scale(kv_head) / ml.y;
    const auto& values = reinterpret_cast<const float(&)[kLaneDims]>(o);
    float not_finite = ml.y * 0.0f;  // 0, or NaN for NaN and infinities
    T* const out = g.out_row<T>(row, head0 + r) + lane * kLaneDims;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      const T rounded = static_cast<T>(values[i] * factor);
      not_finite = fmaf(static_cast<float>(rounded), 0.0f, not_finite);
      out[i] = rounded;
    }
    if (lane == 0) g.store_lse(row, head0 + r, natural_lse(ml.x, ml.y));
    if (__any_sync(~0u, !(not_finite == 0.0f) || is_huge(ml.x))) {
      __syncwarp();
      exact_row<T>(g, row, head0 + r);
    }
  };
#pragma unroll 1
  for (int r = warp; r < g.group_size; r += kWarps) {
    float2 parts[kWarps];
    float weight[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) parts[i] = merge.ml[i][r];
    const float2 ml = merge_statistics(parts, weight);
    LaneVector o{};
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      add(o, weight[i], reinterpret_cast<const LaneVector*>(merge.o[i][r])[lane]);
    }
    if (num_splits == 1) {
      store(r, ml, o);
    } else {
      reinterpret_cast<LaneVector*>(merge.merged_o[r])[lane] = o;
      if (lane == 0) merge.merged_ml[r] = ml;
    }
  }
  if (num_splits == 1) return;

  // Of the cluster: every CTA finishes its share of the rows.
  cluster_sync();
  const int share = (g.group_size + num_splits - 1) / num_splits;
#pragma unroll 1
  for (int i = warp; i < share; i += kWarps) {
    const int r = split * share + i;
    if (r >= g.group_size) break;
    float2 parts[kDecodeMostSplits];
    float weight[kDecodeMostSplits];
#pragma unroll
    for (int part = 0; part < kDecodeMostSplits; ++part) {
      parts[part] =
          part < num_splits ? ptx::load_remote(&merge.merged_ml[r], part) : float2{-INFINITY, 0.0f};
    }
    const float2 ml = merge_statistics(parts, weight);
    LaneVector o{};
    const auto* const own = reinterpret_cast<const LaneVector*>(merge.merged_o[r]) + lane;
#pragma unroll
    for (int part = 0; part < kDecodeMostSplits; ++part) {
      if (part < num_splits) add(o, weight[part], ptx::load_remote(own, part));
    }
    store(r, ml, o);
  }
  cluster_sync();  // others read this CTA's shared memory until here
}

template <class T, class Element, int kDim, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, kDecodeWarpsPerSm / kWarps)
    sparse_attention_decode_kernel(const __grid_constant__ AttentionParams g) {
  using Fragments = DecodeFragments<T, Element, kDim>;
  extern __shared__ __align__(16) std::uint8_t smem[];
  __shared__ DecodeBlock blocks[kDecodeAttentionSlots];

  const int thread = static_cast<int>(threadIdx.x);
  const int num_splits = static_cast<int>(ptx::cluster_size());
  const int split = static_cast<int>(ptx::cluster_cta_rank());
  const std::int64_t row = blockIdx.x / num_splits;
  const int kv_head = static_cast<int>(blockIdx.y);
  const int head0 = kv_head * g.group_size;

  ptx::let_dependents_start();
  if (thread == 0 && g.batch.seq_lens_k != nullptr) ptx::prefetch_l2(g.batch.seq_lens_k);
  if (thread < g.group_size) ptx::prefetch_l2(g.q_row(row, head0 + thread));
  if (kDim == 128 && thread >= 16 && thread < 16 + g.group_size) {
    ptx::prefetch_l2(g.q_row(row, head0 + thread - 16) + 128);
  }
  ptx::wait_for_dependencies();
  std::uint32_t q[Fragments::kSteps][4];
  load_queries<Fragments>(g, row, head0, q);
  const DeviceSequence sequence = sequence_of_query(g.batch, row);
  attend_share<T, Element, kDim, kWarps>(
      g, smem, blocks, q, sequence, row, kv_head, split, num_splits, [&](int slot) {
        return g.block_ids[kv_head * g.ids_head_stride + row * g.ids_token_stride + slot];
      });
}

template <class T, class Element, int kDim, int kWarps>
void launch_decode_warps(const AttentionParams& params, int num_kv_heads, int num_splits,
                         cudaStream_t stream) {
  const auto kernel = sparse_attention_decode_kernel<T, Element, kDim, kWarps>;
  if (num_splits > 8) {
    MSA_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  }
  launch(kernel,
         {.grid = dim3(static_cast<unsigned>(params.batch.total_q * num_splits),
                       static_cast<unsigned>(num_kv_heads)),
          .threads = kWarps * 32,
          .smem_bytes = sizeof(DecodeMerge<kDim, kWarps>),
          .cluster = num_splits,
          .dependent = true},
         stream, params);
}

template <class T, class Element, int kDim>
void launch_decode(const AttentionParams& params, int num_kv_heads, DecodeSplit split,
                   cudaStream_t stream) {
  const auto launch_kernel = split.wide ? launch_decode_warps<T, Element, kDim, kDecodeManyWarps>
                                        : launch_decode_warps<T, Element, kDim, kDecodeFewWarps>;
  launch_kernel(params, num_kv_heads, split.ctas, stream);
}

}  // namespace msa::cuda::sm90
