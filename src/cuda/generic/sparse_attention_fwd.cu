// SPDX-License-Identifier: Apache-2.0
//
// SparseAttentionForward: a CTA has one token and up to 16 heads of one group as the 16 rows of its
// products, so every row sees the same keys. Its four warps take the selected blocks' chunks of 16
// keys by turns, each with its own pipeline and softmax, and merge at the end. See
// docs/kernels/cuda_generic.md.
#include <algorithm>

#include "cuda/common/attention.cuh"
#include "cuda/common/launch.hpp"
#include "cuda/cuda.hpp"

namespace msa::cuda::generic {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kRows = 16;
constexpr int kKeys = 16;  // no block is smaller

/// q, then of each warp k and v; at the end O of each warp [kWarps][kRows][kDim] and (m, l) take
/// the place of k and v.
template <int kDim>
constexpr std::size_t kSmemBytes =
    sizeof(std::uint16_t) * kPitch<kDim> * (kRows + kWarps * 2 * kKeys);

struct Chunk {
  const std::byte* k;
  const std::byte* v;
  int num_keys;  ///< that the token sees
};

/// Every kWarps-th chunk of the token's blocks; ids that are no visible block are skipped.
class ChunkWalk {
 public:
  __device__ __forceinline__ ChunkWalk(const AttentionParams& g, const DeviceSequence& sequence,
                                       std::int64_t row, int kv_head, int warp)
      : g_(g),
        sequence_(sequence),
        ids_(g.block_ids + kv_head * g.ids_head_stride + row * g.ids_token_stride),
        visible_(num_visible_keys(sequence, row)),
        kv_head_(kv_head),
        next_(warp) {}

  __device__ __forceinline__ bool next(Chunk& chunk) {
    while (next_ >= num_chunks_) {
      if (slot_ >= g_.top_k) return false;
      next_ -= num_chunks_;
      num_chunks_ = 0;
      const std::int64_t first = std::int64_t{ids_[slot_++]} << g_.k.block_shift;
      if (first < 0 || first >= visible_) continue;
      k_ = token_address(g_.batch, sequence_, g_.k, kv_head_, first);
      v_ = token_address(g_.batch, sequence_, g_.v, kv_head_, first);
      if (k_ == nullptr) continue;
      num_keys_ = static_cast<int>(min(std::int64_t{g_.batch.block_size}, visible_ - first));
      num_chunks_ = (num_keys_ + kKeys - 1) / kKeys;
    }
    const int first = next_ * kKeys;
    chunk = {.k = k_ + first * g_.k.token_stride,
             .v = v_ + first * g_.v.token_stride,
             .num_keys = min(kKeys, num_keys_ - first)};
    next_ += kWarps;
    return true;
  }

 private:
  const AttentionParams& g_;
  const DeviceSequence& sequence_;
  const std::int32_t* ids_;
  std::int64_t visible_;  ///< keys that the token sees
  int kv_head_;
  const std::byte* k_ = nullptr;  ///< of the block of slot_ - 1
  const std::byte* v_ = nullptr;
  int num_keys_ = 0;
  int num_chunks_ = 0;
  int next_;  ///< chunk of that block
  int slot_ = 0;
};

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 128 ? 2 : 1)
    sparse_attention_kernel(const __grid_constant__ AttentionParams g) {
  extern __shared__ uint4 smem[];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  T* const q_tile = reinterpret_cast<T*>(smem);
  T* const kv_tiles = q_tile + kRows * kPitch<kDim>;
  T* const k_tile = kv_tiles + warp * 2 * kKeys * kPitch<kDim>;
  T* const v_tile = k_tile + kKeys * kPitch<kDim>;
  const std::int64_t row = gridDim.x - 1 - blockIdx.x;
  const int parts = (g.group_size + kRows - 1) / kRows;
  const int kv_head = static_cast<int>(blockIdx.y) / parts;
  const int first_in_group = static_cast<int>(blockIdx.y) % parts * kRows;
  const int num_heads = min(kRows, g.group_size - first_in_group);
  const int head0 = kv_head * g.group_size + first_in_group;
  const DeviceSequence sequence = sequence_of_query(g.batch, row);
  const auto scale_log2 = static_cast<float>(g.score_scale(kv_head) * 1.4426950408889634);

  // Rows of keys that the token does not see are zeros: 0 * NaN would be NaN.
  const auto load_chunk = [&](T* tile, const KeyRows& rows, const std::byte* from, int num_keys) {
    load_tile<T, kDim, 32>(tile, kKeys, g.head_dim, rows.load, lane,
                           [&](int key) -> const std::byte* {
                             return key < num_keys ? from + key * rows.token_stride : nullptr;
                           });
  };
  load_tile<T, kDim, kThreads>(q_tile, kRows, g.head_dim, g.q_load, thread,
                               [&](int head) -> const std::byte* {
                                 return head < num_heads ? g.q_row(row, head0 + head) : nullptr;
                               });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  ChunkWalk walk(g, sequence, row, kv_head, warp);
  Chunk chunk;
  bool more = walk.next(chunk);
  if (more) load_chunk(k_tile, g.k, chunk.k, chunk.num_keys);
  ptx::cp_async_commit();
  if (more) load_chunk(v_tile, g.v, chunk.v, chunk.num_keys);
  ptx::cp_async_commit();
  SoftmaxRows<T, kDim> rows;
  while (more) {
    ptx::cp_async_wait<1>();
    __syncwarp();
    float s[2][4];
    multiply_qk<T, kDim, 1>(s, q_tile, k_tile);
    __syncwarp();
    const int num_keys = chunk.num_keys;
    more = walk.next(chunk);
    if (more) load_chunk(k_tile, g.k, chunk.k, chunk.num_keys);
    ptx::cp_async_commit();
    rows.template attend<1>(s, {num_keys, num_keys}, 1u, scale_log2);
    ptx::cp_async_wait<1>();
    __syncwarp();
    rows.template accumulate<1>(s, v_tile);
    __syncwarp();
    if (more) load_chunk(v_tile, g.v, chunk.v, chunk.num_keys);
    ptx::cp_async_commit();
  }
  rows.finish();

  // Merge: every warp has the sums of its chunks for all 16 rows.
  __syncthreads();
  float* const all_o = reinterpret_cast<float*>(kv_tiles);
  float2* const all_ml = reinterpret_cast<float2*>(all_o + kWarps * kRows * kDim);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int at = warp * kRows + lane / 4 + 8 * h;
    if (lane % 4 == 0) all_ml[at] = {rows.m[h], rows.l[h]};
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      *reinterpret_cast<float2*>(all_o + at * kDim + 8 * j + lane % 4 * 2) = {rows.o[j][2 * h],
                                                                              rows.o[j][2 * h + 1]};
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int r = warp; r < num_heads; r += kWarps) {
    float m = -INFINITY;
    for (int w = 0; w < kWarps; ++w) m = fmaxf(m, all_ml[w * kRows + r].x);
    float weight[kWarps];
    float l = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 ml = all_ml[w * kRows + r];
      weight[w] = ml.x == -INFINITY ? 0.0f : ptx::ex2(ml.x - m);
      l += ml.y == 0.0f ? 0.0f : weight[w] * ml.y;
      if (ml.y != ml.y) l = ml.y;
    }
    const float factor = l == 0.0f ? 0.0f : g.value_scale(kv_head) / l;
    float not_finite = l * 0.0f;  // 0, or NaN for NaN and infinities
    T* const out = g.out_row<T>(row, head0 + r);
    for (int d = lane; d < g.head_dim; d += 32) {
      float o = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) o += weight[w] * all_o[(w * kRows + r) * kDim + d];
      const T rounded = static_cast<T>(o * factor);
      not_finite = fmaf(static_cast<float>(rounded), 0.0f, not_finite);
      out[d] = rounded;
    }
    if (lane == 0) g.store_lse(row, head0 + r, natural_lse(m, l));
    if (__any_sync(~0u, !(not_finite == 0.0f) || is_huge(m))) exact_row<T>(g, row, head0 + r);
  }
}

template <class T>
void launch_attention(const AttentionParams& params, int num_kv_heads, cudaStream_t stream) {
  const auto start = [&]<int kDim>() {
    const std::int64_t parts = ceil_div(params.group_size, kRows);
    launch(sparse_attention_kernel<T, kDim>,
           {.grid = dim3(static_cast<unsigned>(params.batch.total_q),
                         static_cast<unsigned>(num_kv_heads * parts)),
            .threads = kThreads,
            .smem_bytes = kSmemBytes<kDim>},
           stream, params);
  };
  with_padded_dim(params.head_dim, start);
}

}  // namespace

const msa::detail::Implementation<SparseAttentionForward> kSparseAttentionForward = {
    .name = "cuda_generic",
    .dtypes = "f16 bf16, k and v also e4m3",
    .declines = [](const SparseAttentionForward& args,
                   const Options&) { return declines_attention(args); },
    .workspace_bytes = [](const SparseAttentionForward&) -> std::size_t { return 0; },
    .run =
        [](const SparseAttentionForward& args, std::span<std::byte>, Stream stream) {
          const AttentionParams params = make_attention_params(args);
          const int num_kv_heads = args.problem.num_kv_heads;
          if (args.q.dtype == DType::f16) {
            return launch_attention<__half>(params, num_kv_heads, stream_of(stream));
          }
          launch_attention<__nv_bfloat16>(params, num_kv_heads, stream_of(stream));
        }};

}  // namespace msa::cuda::generic
