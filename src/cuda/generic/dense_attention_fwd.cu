// SPDX-License-Identifier: Apache-2.0
//
// DenseAttentionForward: a CTA has 64 rows (neighbouring tokens times the heads of one group) and
// walks all keys in tiles, which its four warps of 16 rows share. See
// docs/kernels/cuda_generic.md.
#include <algorithm>

#include "cuda/common/attention.cuh"
#include "cuda/common/launch.hpp"
#include "cuda/cuda.hpp"

namespace msa::cuda::generic {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;
/// Of a tile; wide rows leave fewer registers for scores.
template <int kDim>
constexpr int kKeysOf = kDim <= 128 ? 64 : 32;

template <int kDim>
constexpr std::size_t kSmemBytes =
    sizeof(std::uint16_t) * kPitch<kDim> * (kRows + 2 * kKeysOf<kDim>);

/// The tokens [begin, end) of one sequence.
template <class T, int kDim>
__device__ __forceinline__ void attend_tokens(const AttentionParams& g,
                                              const DeviceSequence& sequence, std::int64_t begin,
                                              std::int64_t end, T* q_tile) {
  constexpr int kKeys = kKeysOf<kDim>;
  constexpr int kChunks = kKeys / 16;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  T* const k_tile = q_tile + kRows * kPitch<kDim>;
  T* const v_tile = k_tile + kKeys * kPitch<kDim>;
  const int parts = (g.group_size + g.heads_per_tile - 1) / g.heads_per_tile;
  const int kv_head = static_cast<int>(blockIdx.y) / parts;
  const int first_in_group = static_cast<int>(blockIdx.y) % parts * g.heads_per_tile;
  const int num_heads = min(g.heads_per_tile, g.group_size - first_in_group);
  const int head0 = kv_head * g.group_size + first_in_group;
  const int num_rows = static_cast<int>(end - begin) * num_heads;
  const std::int64_t key_end = num_visible_keys(sequence, end - 1);
  const auto scale_log2 = static_cast<float>(g.score_scale(kv_head) * 1.4426950408889634);

  std::int64_t visible[2];  // keys that the lane's rows see
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * 16 + lane / 4 + 8 * h;
    visible[h] = row < num_rows ? num_visible_keys(sequence, begin + row / num_heads) : 0;
  }
  const auto load_keys = [&](T* tile, const KeyRows& rows, std::int64_t first) {
    load_tile<T, kDim, kThreads>(
        tile, kKeys, g.head_dim, rows.load, thread, [&](int key) -> const std::byte* {
          if (first + key >= key_end) return nullptr;
          return token_address(g.batch, sequence, rows, kv_head, first + key);
        });
  };

  // Tokens without keys leave their copy of q under way.
  ptx::cp_async_wait<0>();
  __syncthreads();
  load_tile<T, kDim, kThreads>(q_tile, kRows, g.head_dim, g.q_load, thread,
                               [&](int row) -> const std::byte* {
                                 if (row >= num_rows) return nullptr;
                                 return g.q_row(begin + row / num_heads, head0 + row % num_heads);
                               });
  if (key_end > 0) load_keys(k_tile, g.k, 0);
  ptx::cp_async_commit();
  if (key_end > 0) load_keys(v_tile, g.v, 0);
  ptx::cp_async_commit();
  SoftmaxRows<T, kDim> rows;
#pragma unroll 1
  for (std::int64_t first = 0; first < key_end; first += kKeys) {
    const bool more = first + kKeys < key_end;
    ptx::cp_async_wait<1>();
    __syncthreads();
    float s[2 * kChunks][4];
    multiply_qk<T, kDim, kChunks>(s, q_tile + warp * 16 * kPitch<kDim>, k_tile);
    __syncthreads();
    if (more) load_keys(k_tile, g.k, first + kKeys);
    ptx::cp_async_commit();
    int limit[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      limit[h] = static_cast<int>(msa::cuda::detail::clamp(visible[h] - first, 0, kKeys));
    }
    unsigned present = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const std::int64_t key = first + 16 * c;
      if (key < key_end && exists(g.batch, sequence, key >> g.k.block_shift)) present |= 1u << c;
    }
    rows.template attend<kChunks>(s, limit, present, scale_log2);
    ptx::cp_async_wait<1>();
    __syncthreads();
    rows.template accumulate<kChunks>(s, v_tile);
    __syncthreads();
    if (more) load_keys(v_tile, g.v, first + kKeys);
    ptx::cp_async_commit();
  }
  rows.finish();

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * 16 + lane / 4 + 8 * h;
    const bool live = row < num_rows;
    const std::int64_t token = begin + row / num_heads;
    const int head = head0 + row % num_heads;
    const float l = rows.l[h];
    const float factor = l == 0.0f ? 0.0f : g.value_scale(kv_head) / l;
    float not_finite = l * 0.0f;  // 0, or NaN for NaN and infinities
    T* const out = g.out_row<T>(token, head);
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = 8 * j + lane % 4 * 2 + i;
        const T o = static_cast<T>(rows.o[j][2 * h + i] * factor);
        not_finite = fmaf(static_cast<float>(o), 0.0f, not_finite);
        if (live && d < g.head_dim) out[d] = o;
      }
    }
    if (live && lane % 4 == 0) g.store_lse(token, head, natural_lse(rows.m[h], l));
    // Rows that 0 * NaN of a later token's key has reached are done again, among others.
    unsigned again = __ballot_sync(~0u, live && (!(not_finite == 0.0f) || is_huge(rows.m[h])));
    again |= again >> 1;
    again = (again | again >> 2) & 0x11111111u;
#pragma unroll 1
    for (; again != 0; again &= again - 1) {
      const int bad = warp * 16 + (__ffs(static_cast<int>(again)) - 1) / 4 + 8 * h;
      __syncwarp();
      exact_row<T>(g, begin + bad / num_heads, head0 + bad % num_heads);
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kDim <= 128 ? 2 : 1)
    dense_attention_kernel(const __grid_constant__ AttentionParams g) {
  extern __shared__ uint4 smem[];
  // Late tokens see the most keys: they come first.
  const std::int64_t tile = gridDim.x - 1 - blockIdx.x;
  const std::int64_t first = tile * g.tokens_per_tile;
  for_each_sequence(g.batch, first, min(first + g.tokens_per_tile, g.batch.total_q),
                    [&](const DeviceSequence& sequence, std::int64_t begin, std::int64_t end) {
                      attend_tokens<T, kDim>(g, sequence, begin, end, reinterpret_cast<T*>(smem));
                    });
}

template <class T>
void launch_attention(const AttentionParams& params, int num_kv_heads, cudaStream_t stream) {
  const auto start = [&]<int kDim>() {
    const std::int64_t parts = ceil_div(params.group_size, params.heads_per_tile);
    launch(
        dense_attention_kernel<T, kDim>,
        {.grid = dim3(static_cast<unsigned>(ceil_div(params.batch.total_q, params.tokens_per_tile)),
                      static_cast<unsigned>(num_kv_heads * parts)),
         .threads = kThreads,
         .smem_bytes = kSmemBytes<kDim>},
        stream, params);
  };
  with_padded_dim(params.head_dim, start);
}

}  // namespace

const msa::detail::Implementation<DenseAttentionForward> kDenseAttentionForward = {
    .name = "cuda_generic",
    .dtypes = "f16 bf16, k and v also e4m3",
    .declines = [](const DenseAttentionForward& args,
                   const Options&) { return declines_attention(args); },
    .workspace_bytes = [](const DenseAttentionForward&) -> std::size_t { return 0; },
    .run =
        [](const DenseAttentionForward& args, std::span<std::byte>, Stream stream) {
          AttentionParams params = make_attention_params(args);
          params.heads_per_tile = std::min(params.group_size, kRows);
          params.tokens_per_tile = tokens_per_tile(kRows, params.heads_per_tile,
                                                   params.batch.total_q, params.batch.batch_size);
          const int num_kv_heads = args.problem.num_kv_heads;
          if (args.q.dtype == DType::f16) {
            return launch_attention<__half>(params, num_kv_heads, stream_of(stream));
          }
          launch_attention<__nv_bfloat16>(params, num_kv_heads, stream_of(stream));
        }};

}  // namespace msa::cuda::generic
