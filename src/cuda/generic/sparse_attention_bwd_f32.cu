// SPDX-License-Identifier: Apache-2.0
//
// Gradients of sparse attention in f32, by FMA: 16 rows that stay and 16 that stream by, in shared
// memory. Each thread has two of the 256 pairs' products, then two columns of all 16 sums.
#include "cuda/generic/sparse_attention_bwd.cuh"

namespace msa::cuda::generic {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 16;
constexpr int kColumns = kMostDim / kThreads;  ///< of each thread
constexpr int kPitchF32 = kMostDim + 1;        ///< so that rows start in different banks
constexpr std::size_t kSmemBytes = sizeof(float) * 4 * kRows * kPitchF32;

/// A row of a tile as it is asked for: null for zeros.
template <class RowAt>
__device__ void load_rows(float* tile, int dim, RowAt row_at) {
  for (int row = 0; row < kRows; ++row) {
    const std::byte* const from = row_at(row);
    for (int d = static_cast<int>(threadIdx.x); d < dim; d += kThreads) {
      tile[row * kPitchF32 + d] = from == nullptr ? 0.0f : reinterpret_cast<const float*>(from)[d];
    }
  }
}

__device__ float dot(const float* a, const float* b, int dim) {
  float sum = 0.0f;
#pragma unroll 4
  for (int d = 0; d < dim; ++d) sum = fmaf(a[d], b[d], sum);
  return sum;
}

/// sums[row] += weights[i][row] * from[i] for the thread's columns.
__device__ __forceinline__ void add_product(float (&sums)[kRows][kColumns],
                                            const float (&weights)[kRows][kRows], const float* from,
                                            int dim) {
#pragma unroll 1
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int d = static_cast<int>(threadIdx.x) + c * kThreads;
      if (d >= dim) continue;
      const float x = from[i * kPitchF32 + d];
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        sums[row][c] = fmaf(weights[i][row], x, sums[row][c]);
      }
    }
  }
}

/// Writes the thread's columns of a row; whether one of them is not finite.
__device__ __forceinline__ bool store_row(std::byte* to, const float (&sums)[kColumns], float scale,
                                          int dim) {
  float sum = 0.0f;  // or NaN
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int d = static_cast<int>(threadIdx.x) + c * kThreads;
    if (d >= dim) continue;
    const float value = sums[c] * scale;
    sum = fmaf(value, 0.0f, sum);
    reinterpret_cast<float*>(to)[d] = value;
  }
  return !(sum == 0.0f);
}

/// dq of one query and up to 16 heads of a group.
__global__ void __launch_bounds__(kThreads)
    dq_kernel(const __grid_constant__ AttentionGradients g) {
  extern __shared__ float tiles[];
  __shared__ RowStatistics statistics[kRows];
  __shared__ float ds[kKeysPerChunk][kRows];
  __shared__ int not_finite[kRows];
  const int thread = static_cast<int>(threadIdx.x);
  const int dim = g.head_dim;
  float* const q_tile = tiles;
  float* const dout_tile = q_tile + kRows * kPitchF32;
  float* const k_tile = dout_tile + kRows * kPitchF32;
  float* const v_tile = k_tile + kRows * kPitchF32;
  const std::int64_t row = gridDim.x - 1 - blockIdx.x;
  const int parts = (g.group_size + kRows - 1) / kRows;
  const int kv_head = static_cast<int>(blockIdx.y) / parts;
  const int first_in_group = static_cast<int>(blockIdx.y) % parts * kRows;
  const int num_heads = min(kRows, g.group_size - first_in_group);
  const int head0 = kv_head * g.group_size + first_in_group;
  const auto scale_log2 = static_cast<float>(g.scale * 1.4426950408889634);
  const auto load_heads = [&](float* tile, const TokenRows& rows) {
    load_rows(tile, dim, [&](int head) -> const std::byte* {
      return head < num_heads ? rows.at(row, head0 + head) : nullptr;
    });
  };
  load_heads(q_tile, g.q);
  load_heads(dout_tile, g.dout);
  if (thread < kRows) {
    not_finite[thread] = 0;
    statistics[thread] = thread < num_heads ? g.statistics[g.statistic(row, head0 + thread)]
                                            : RowStatistics{INFINITY, 0.0f};
  }

  ChunkWalk walk(g, row, kv_head, 0, 1);
  KeyChunk chunk;
  float sums[kRows][kColumns] = {};
  while (walk.next(chunk)) {
    const auto load_keys = [&](float* tile, const TokenRows& rows) {
      load_rows(tile, dim, [&](int key) -> const std::byte* {
        return key < chunk.num_keys ? rows.at(chunk.first + key, kv_head) : nullptr;
      });
    };
    load_keys(k_tile, g.k);
    load_keys(v_tile, g.v);
    __syncthreads();
    for (int i = thread; i < kRows * kKeysPerChunk; i += kThreads) {
      const int head = i / kKeysPerChunk;
      const int key = i % kKeysPerChunk;
      const float s = dot(q_tile + head * kPitchF32, k_tile + key * kPitchF32, dim);
      const float dp = dot(dout_tile + head * kPitchF32, v_tile + key * kPitchF32, dim);
      const float p = ptx::ex2(fmaf(s, scale_log2, -statistics[head].lse));
      ds[key][head] = key < chunk.num_keys ? p * (dp - statistics[head].delta) : 0.0f;
    }
    __syncthreads();
    add_product(sums, ds, k_tile, dim);
    __syncthreads();
  }
  __syncthreads();
#pragma unroll
  for (int head = 0; head < kRows; ++head) {
    if (head >= num_heads) continue;
    if (store_row(g.dq.at(row, head0 + head), sums[head], static_cast<float>(g.scale), dim)) {
      atomicExch(&not_finite[head], 1);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int head = thread / 32; head < num_heads; head += kThreads / 32) {
    if (not_finite[head] != 0) dq_row<float>(g, row, head0 + head);
  }
}

/// dk and dv of 16 keys of a block.
__global__ void __launch_bounds__(kThreads)
    dkv_kernel(const __grid_constant__ AttentionGradients g) {
  extern __shared__ float tiles[];
  __shared__ const std::byte* q_rows[kRows];
  __shared__ const std::byte* dout_rows[kRows];
  __shared__ RowStatistics statistics[kRows];
  __shared__ int limits[kRows];
  __shared__ float p[kRows][kRows];  // [pair of the list][key]
  __shared__ float ds[kRows][kRows];
  __shared__ int not_finite[kRows];
  const int thread = static_cast<int>(threadIdx.x);
  const int dim = g.head_dim;
  float* const k_tile = tiles;
  float* const v_tile = k_tile + kRows * kPitchF32;
  float* const q_tile = v_tile + kRows * kPitchF32;
  float* const dout_tile = q_tile + kRows * kPitchF32;
  const int kv_head = static_cast<int>(blockIdx.y);
  const KeyTile tile = key_tile_of<kRows>(g, blockIdx.x, kv_head);
  if (tile.num_keys == 0) return;
  const std::int64_t first_token = tile.key_block.first_key(g.batch.block_size) + tile.first;
  const std::int64_t num_pairs = tile.list.count * g.group_size;
  const auto scale_log2 = static_cast<float>(g.scale * 1.4426950408889634);
  const auto load_keys = [&](float* to, const TokenRows& rows) {
    load_rows(to, dim, [&](int key) -> const std::byte* {
      return key < tile.num_keys ? rows.at(first_token + key, kv_head) : nullptr;
    });
  };
  load_keys(k_tile, g.k);
  load_keys(v_tile, g.v);
  if (thread < kRows) not_finite[thread] = 0;
  float dk[kRows][kColumns] = {};
  float dv[kRows][kColumns] = {};
#pragma unroll 1
  for (std::int64_t first = 0; first < num_pairs; first += kRows) {
    if (thread < kRows) {
      const std::int64_t i = first + thread;
      const bool exists = i < num_pairs;
      const std::int64_t row = exists ? tile.list[i / g.group_size] : 0;
      const int head = kv_head * g.group_size + static_cast<int>(i % g.group_size);
      q_rows[thread] = exists ? g.q.at(row, head) : nullptr;
      dout_rows[thread] = exists ? g.dout.at(row, head) : nullptr;
      statistics[thread] =
          exists ? g.statistics[g.statistic(row, head)] : RowStatistics{INFINITY, 0.0f};
      limits[thread] = exists ? tile.limit(g.batch.block_size, row) : 0;
    }
    __syncthreads();
    load_rows(q_tile, dim, [&](int i) { return q_rows[i]; });
    load_rows(dout_tile, dim, [&](int i) { return dout_rows[i]; });
    __syncthreads();
    for (int i = thread; i < kRows * kRows; i += kThreads) {
      const int pair = i / kRows;
      const int key = i % kRows;
      const float s = dot(q_tile + pair * kPitchF32, k_tile + key * kPitchF32, dim);
      const float dp = dot(dout_tile + pair * kPitchF32, v_tile + key * kPitchF32, dim);
      const bool visible = key < limits[pair];
      const float power = ptx::ex2(fmaf(s, scale_log2, -statistics[pair].lse));
      p[pair][key] = visible ? power : 0.0f;
      ds[pair][key] = visible ? power * (dp - statistics[pair].delta) : 0.0f;
    }
    __syncthreads();
    add_product(dv, p, dout_tile, dim);
    add_product(dk, ds, q_tile, dim);
    __syncthreads();
  }
  __syncthreads();
#pragma unroll
  for (int key = 0; key < kRows; ++key) {
    if (key >= tile.num_keys) continue;
    const bool dk_bad =
        store_row(g.dk.at(first_token + key, kv_head), dk[key], static_cast<float>(g.scale), dim);
    const bool dv_bad = store_row(g.dv.at(first_token + key, kv_head), dv[key], 1.0f, dim);
    if (dk_bad || dv_bad) atomicExch(&not_finite[key], 1);
  }
  __syncthreads();
#pragma unroll 1
  for (int key = thread / 32; key < tile.num_keys; key += kThreads / 32) {
    if (not_finite[key] == 0) continue;
    dkv_row<float>(g, tile.bin, tile.key_block, tile.first + key, kv_head);
  }
}

}  // namespace

void launch_gradients_f32(const AttentionGradients& g, int num_kv_heads, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(num_kv_heads);
  launch(dq_kernel,
         {.grid = dim3(static_cast<unsigned>(g.batch.total_q),
                       heads * static_cast<unsigned>(ceil_div(g.group_size, kRows))),
          .threads = kThreads,
          .smem_bytes = kSmemBytes},
         stream, g);
  const std::int64_t tiles = g.lists.num_bins * tiles_per_block(g.batch.block_size, kRows);
  launch(dkv_kernel,
         {.grid = dim3(static_cast<unsigned>(tiles), heads),
          .threads = kThreads,
          .smem_bytes = kSmemBytes},
         stream, g);
}

}  // namespace msa::cuda::generic
