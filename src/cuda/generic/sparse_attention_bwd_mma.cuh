// SPDX-License-Identifier: Apache-2.0
//
// Gradients of sparse attention for 16-bit tensors, by mma.sync. Included by one file per type.
#pragma once

#include "cuda/generic/sparse_attention_bwd.cuh"

namespace msa::cuda::generic {
namespace {

constexpr int kWarps = 4;
constexpr int kRows = 16;      ///< of a dq tile: heads of one group, of one query
constexpr int kKeys = 64;      ///< of a dk, dv tile, 16 a warp
constexpr int kListRows = 32;  ///< (query, head) pairs that it takes at a time

/// q and dout, then two stages of k and v of each warp; at the end f32 sums of each warp take the
/// place of the stages.
template <int kDim>
constexpr std::size_t kDqSmemBytes =
    sizeof(std::uint16_t) * kPitch<kDim> * (2 * kRows + kWarps * 2 * 2 * kKeysPerChunk);

/// Warps that share 16 keys: wide sums are divided.
template <int kDim>
constexpr int kSplit = kDim <= 128 ? 1 : 2;

/// k and v, then two stages of q and dout.
template <int kDim>
constexpr std::size_t kDkvSmemBytes =
    sizeof(std::uint16_t) * kPitch<kDim> * (2 * kKeys + 2 * 2 * kListRows);

/// sums += a b for the 16 rows of b from `chunk` on, columns [first, first + kColumns).
template <class T, int kDim, int kColumns>
__device__ __forceinline__ void add_product(float (&sums)[kColumns / 8][4],
                                            const std::uint32_t (&a)[4], const T* b, int chunk,
                                            int first) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
    std::uint32_t fragment[4];
    ptx::ldmatrix_x4_trans(
        fragment, address_in<kDim>(b, 16 * chunk + lane % 16, first + 16 * j + lane / 16 * 8));
    ptx::mma_m16n8k16<T>(sums[2 * j], a, fragment[0], fragment[1]);
    ptx::mma_m16n8k16<T>(sums[2 * j + 1], a, fragment[2], fragment[3]);
  }
}

/// 16 columns of an accumulator as the A operand.
template <class T>
__device__ __forceinline__ void pack_a(std::uint32_t (&a)[4], const float (&left)[4],
                                       const float (&right)[4]) {
  a[0] = ptx::pack<T>(left[0], left[1]);
  a[1] = ptx::pack<T>(left[2], left[3]);
  a[2] = ptx::pack<T>(right[0], right[1]);
  a[3] = ptx::pack<T>(right[2], right[3]);
}

/// dq of one query and up to 16 heads of a group. Warps take chunks of keys by turns, and add up.
template <class T, int kDim>
__global__ void __launch_bounds__(kWarps * 32, kDim <= 128 ? 2 : 1)
    dq_kernel(const __grid_constant__ AttentionGradients g) {
  constexpr int kTile = kKeysPerChunk * kPitch<kDim>;
  extern __shared__ uint4 smem[];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  T* const q_tile = reinterpret_cast<T*>(smem);
  T* const dout_tile = q_tile + kRows * kPitch<kDim>;
  T* const stages = dout_tile + kRows * kPitch<kDim>;
  T* const own = stages + warp * 2 * 2 * kTile;  // [stage][k, v]
  const std::int64_t row = gridDim.x - 1 - blockIdx.x;
  const int parts = (g.group_size + kRows - 1) / kRows;
  const int kv_head = static_cast<int>(blockIdx.y) / parts;
  const int first_in_group = static_cast<int>(blockIdx.y) % parts * kRows;
  const int num_heads = min(kRows, g.group_size - first_in_group);
  const int head0 = kv_head * g.group_size + first_in_group;
  const auto scale_log2 = static_cast<float>(g.scale * 1.4426950408889634);

  const auto load_rows = [&](T* tile, const TokenRows& rows) {
    load_tile<T, kDim, kWarps * 32>(
        tile, kRows, g.head_dim, rows.load, thread, [&](int head) -> const std::byte* {
          return head < num_heads ? rows.at(row, head0 + head) : nullptr;
        });
  };
  // Rows of keys that the query does not see are zeros: 0 * NaN would be NaN.
  const auto load_chunk = [&](T* tile, const TokenRows& rows, const KeyChunk& chunk) {
    load_tile<T, kDim, 32>(
        tile, kKeysPerChunk, g.head_dim, rows.load, lane, [&](int key) -> const std::byte* {
          return key < chunk.num_keys ? rows.at(chunk.first + key, kv_head) : nullptr;
        });
  };
  float lse[2];
  float delta[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int head = lane / 4 + 8 * h;
    RowStatistics statistics{INFINITY, 0.0f};
    if (head < num_heads) statistics = g.statistics[g.statistic(row, head0 + head)];
    lse[h] = statistics.lse;
    delta[h] = statistics.delta;
  }
  load_rows(q_tile, g.q);
  load_rows(dout_tile, g.dout);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();

  ChunkWalk walk(g, row, kv_head, warp, kWarps);
  KeyChunk chunk;
  bool more = walk.next(chunk);
  int stage = 0;
  if (more) {
    load_chunk(own, g.k, chunk);
    load_chunk(own + kTile, g.v, chunk);
  }
  ptx::cp_async_commit();
  float sums[kDim / 8][4] = {};
  while (more) {
    const int num_keys = chunk.num_keys;
    T* const k_tile = own + stage * 2 * kTile;
    stage ^= 1;
    more = walk.next(chunk);
    if (more) {
      load_chunk(own + stage * 2 * kTile, g.k, chunk);
      load_chunk(own + stage * 2 * kTile + kTile, g.v, chunk);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncwarp();
    float s[2][4];
    float dp[2][4];
    multiply_qk<T, kDim, 1>(s, q_tile, k_tile);
    multiply_qk<T, kDim, 1>(dp, dout_tile, k_tile + kTile);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool visible = 8 * j + lane % 4 * 2 + i % 2 < num_keys;
        const float p = ptx::ex2(fmaf(s[j][i], scale_log2, -lse[i / 2]));
        s[j][i] = visible ? p * (dp[j][i] - delta[i / 2]) : 0.0f;
      }
    }
    std::uint32_t ds[4];
    pack_a<T>(ds, s[0], s[1]);
    add_product<T, kDim, kDim>(sums, ds, k_tile, 0, 0);
    __syncwarp();
  }

  __syncthreads();
  float* const all = reinterpret_cast<float*>(stages);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float* const to = all + (warp * kRows + lane / 4 + 8 * h) * kDim + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
      *reinterpret_cast<float2*>(to + 8 * j) = {sums[j][2 * h], sums[j][2 * h + 1]};
    }
  }
  __syncthreads();
  const auto scale = static_cast<float>(g.scale);
#pragma unroll 1
  for (int r = warp; r < num_heads; r += kWarps) {
    float not_finite = 0.0f;  // or NaN
    T* const dq = reinterpret_cast<T*>(g.dq.at(row, head0 + r));
    for (int d = lane; d < g.head_dim; d += 32) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += all[(w * kRows + r) * kDim + d];
      const T rounded = static_cast<T>(sum * scale);
      not_finite = fmaf(static_cast<float>(rounded), 0.0f, not_finite);
      dq[d] = rounded;
    }
    if (__any_sync(~0u, !(not_finite == 0.0f))) dq_row<T>(g, row, head0 + r);
  }
}

/// Of the (query, head) pairs that a dk, dv kernel takes at a time.
struct ListRows {
  const std::byte* q[kListRows];  ///< null: there is no such pair
  const std::byte* dout[kListRows];
  float2 lse[kListRows / 2];
  float2 delta[kListRows / 2];
  int2 limit[kListRows / 2];  ///< keys of the tile that the query sees
};

/// dk and dv of 64 keys of a block, or of the whole block where it has less. The queries of the
/// block stream by; products are transposed, so that every warp keeps the sums of its 16 keys.
template <class T, int kDim>
__global__ void __launch_bounds__(kWarps * 32 * kSplit<kDim>, kDim <= 128 ? 2 : 1)
    dkv_kernel(const __grid_constant__ AttentionGradients g) {
  constexpr int kThreads = kWarps * 32 * kSplit<kDim>;
  constexpr int kColumns = kDim / kSplit<kDim>;
  constexpr int kStage = 2 * kListRows * kPitch<kDim>;
  extern __shared__ uint4 smem[];
  __shared__ ListRows described[3];
  __shared__ int not_finite[kKeys];
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int first_key = warp % kWarps * 16;           // of the warp
  const int first_column = warp / kWarps * kColumns;  // of its sums
  T* const k_tile = reinterpret_cast<T*>(smem);
  T* const v_tile = k_tile + kKeys * kPitch<kDim>;
  T* const stages = v_tile + kKeys * kPitch<kDim>;  // [stage][q, dout]
  const int kv_head = static_cast<int>(blockIdx.y);
  const KeyTile tile = key_tile_of<kKeys>(g, blockIdx.x, kv_head);
  if (tile.num_keys == 0) return;
  const std::int64_t first_token = tile.key_block.first_key(g.batch.block_size) + tile.first;
  const std::int64_t num_rows = tile.list.count * g.group_size;
  const std::int64_t num_chunks = (num_rows + kListRows - 1) / kListRows;
  const auto scale_log2 = static_cast<float>(g.scale * 1.4426950408889634);

  const auto load_keys = [&](T* to, const TokenRows& rows) {
    load_tile<T, kDim, kThreads>(
        to, kKeys, g.head_dim, rows.load, thread, [&](int key) -> const std::byte* {
          return key < tile.num_keys ? rows.at(first_token + key, kv_head) : nullptr;
        });
  };
  const auto describe = [&](std::int64_t chunk) {
    if (thread >= kListRows) return;
    ListRows& to = described[chunk % 3];
    const std::int64_t i = chunk * kListRows + thread;
    to.q[thread] = nullptr;
    to.dout[thread] = nullptr;
    RowStatistics statistics{INFINITY, 0.0f};
    int limit = 0;
    if (i < num_rows) {
      const std::int64_t row = tile.list[i / g.group_size];
      const int head = kv_head * g.group_size + static_cast<int>(i % g.group_size);
      to.q[thread] = g.q.at(row, head);
      to.dout[thread] = g.dout.at(row, head);
      statistics = g.statistics[g.statistic(row, head)];
      limit = tile.limit(g.batch.block_size, row);
    }
    reinterpret_cast<float*>(to.lse)[thread] = statistics.lse;
    reinterpret_cast<float*>(to.delta)[thread] = statistics.delta;
    reinterpret_cast<int*>(to.limit)[thread] = limit;
  };
  const auto load_chunk = [&](std::int64_t chunk) {
    const ListRows& from = described[chunk % 3];
    T* const to = stages + chunk % 2 * kStage;
    load_tile<T, kDim, kThreads>(to, kListRows, g.head_dim, g.q.load, thread,
                                 [&](int i) { return from.q[i]; });
    load_tile<T, kDim, kThreads>(to + kListRows * kPitch<kDim>, kListRows, g.head_dim, g.dout.load,
                                 thread, [&](int i) { return from.dout[i]; });
  };

  if (thread < kKeys) not_finite[thread] = 0;
  load_keys(k_tile, g.k);
  load_keys(v_tile, g.v);
  describe(0);
  describe(1);
  __syncthreads();
  load_chunk(0);
  ptx::cp_async_commit();
  float dk[kColumns / 8][4] = {};
  float dv[kColumns / 8][4] = {};
#pragma unroll 1
  for (std::int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    if (chunk + 1 < num_chunks) load_chunk(chunk + 1);
    ptx::cp_async_commit();
    describe(chunk + 2);
    ptx::cp_async_wait<1>();
    __syncthreads();
    if (first_key < tile.num_keys) {
      const ListRows& rows = described[chunk % 3];
      const T* const q_tile = stages + chunk % 2 * kStage;
      const T* const dout_tile = q_tile + kListRows * kPitch<kDim>;
      float p[4][4];
      float ds[4][4];
      multiply_qk<T, kDim, 2>(p, k_tile + first_key * kPitch<kDim>, q_tile);
      multiply_qk<T, kDim, 2>(ds, v_tile + first_key * kPitch<kDim>, dout_tile);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int pair = 4 * j + lane % 4;  // columns 2 pair and 2 pair + 1
        const float2 lse = rows.lse[pair];
        const float2 delta = rows.delta[pair];
        const int2 limit = rows.limit[pair];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = first_key + lane / 4 + i / 2 * 8;
          const bool visible = key < (i % 2 == 0 ? limit.x : limit.y);
          const float power = ptx::ex2(fmaf(p[j][i], scale_log2, i % 2 == 0 ? -lse.x : -lse.y));
          const float slope = power * (ds[j][i] - (i % 2 == 0 ? delta.x : delta.y));
          p[j][i] = visible ? power : 0.0f;
          ds[j][i] = visible ? slope : 0.0f;
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        std::uint32_t a[4];
        pack_a<T>(a, p[2 * c], p[2 * c + 1]);
        add_product<T, kDim, kColumns>(dv, a, dout_tile, c, first_column);
        pack_a<T>(a, ds[2 * c], ds[2 * c + 1]);
        add_product<T, kDim, kColumns>(dk, a, q_tile, c, first_column);
      }
    }
    __syncthreads();
  }
  ptx::cp_async_wait<0>();

  const auto scale = static_cast<float>(g.scale);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int key = first_key + lane / 4 + 8 * h;
    if (key >= tile.num_keys) continue;
    T* const dk_row = reinterpret_cast<T*>(g.dk.at(first_token + key, kv_head));
    T* const dv_row = reinterpret_cast<T*>(g.dv.at(first_token + key, kv_head));
    float sum = 0.0f;  // or NaN
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = first_column + 8 * j + lane % 4 * 2 + i;
        const T dk_rounded = static_cast<T>(dk[j][2 * h + i] * scale);
        const T dv_rounded = static_cast<T>(dv[j][2 * h + i]);
        sum = fmaf(static_cast<float>(dk_rounded), 0.0f, sum);
        sum = fmaf(static_cast<float>(dv_rounded), 0.0f, sum);
        if (d >= g.head_dim) continue;
        dk_row[d] = dk_rounded;
        dv_row[d] = dv_rounded;
      }
    }
    if (!(sum == 0.0f)) atomicExch(&not_finite[key], 1);
  }
  __syncthreads();
#pragma unroll 1
  for (int key = warp; key < tile.num_keys; key += kThreads / 32) {
    if (not_finite[key] == 0) continue;
    dkv_row<T>(g, tile.bin, tile.key_block, tile.first + key, kv_head);
  }
}

template <class T>
void launch_gradients(const AttentionGradients& g, int num_kv_heads, cudaStream_t stream) {
  const auto heads = static_cast<unsigned>(num_kv_heads);
  with_padded_dim(g.head_dim, [&]<int kDim>() {
    launch(dq_kernel<T, kDim>,
           {.grid = dim3(static_cast<unsigned>(g.batch.total_q),
                         heads * static_cast<unsigned>(ceil_div(g.group_size, kRows))),
            .threads = kWarps * 32,
            .smem_bytes = kDqSmemBytes<kDim>},
           stream, g);
    const std::int64_t tiles = g.lists.num_bins * tiles_per_block(g.batch.block_size, kKeys);
    launch(dkv_kernel<T, kDim>,
           {.grid = dim3(static_cast<unsigned>(tiles), heads),
            .threads = kWarps * 32 * kSplit<kDim>,
            .smem_bytes = kDkvSmemBytes<kDim>},
           stream, g);
  });
}

}  // namespace
}  // namespace msa::cuda::generic
