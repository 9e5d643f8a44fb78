// SPDX-License-Identifier: Apache-2.0
//
// From dS of each pair to the gradients of the student. A CTA holds the index keys of a piece and
// takes 128 queries at a time: a warp's 16 queries times the keys give their parts of dindex_q,
// and all queries' dS transposed times their index_q add to dindex_k, of which each warp keeps a
// part in registers.
#include <type_traits>

#include "cuda/common/indexer_kl.cuh"
#include "cuda/common/indexer_kl.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/common/ptx/math.cuh"

namespace msa::cuda {
namespace {

using namespace kl;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kQueries = kWarps * 16;

template <int kDim, int kKeys>
constexpr std::size_t kSmemBytes =
    sizeof(std::uint16_t) * (kPitch<kDim> * (kKeys + kQueries) + kPitch<kKeys> * kQueries);

template <class T>
__device__ __forceinline__ bool is_finite(T x) {
  return fabsf(static_cast<float>(x)) < INFINITY;
}

template <class T, int kDim>
__device__ __forceinline__ bool has_special(const T* row, int dim) {
  bool special = false;
  for (int d = 0; d < dim; ++d) special |= !is_finite(row[d]);
  return special;
}

/// Whether this thread's share of a whole tile has a NaN or an infinity.
template <class T, int kDim, int kRows>
__device__ __forceinline__ bool tile_has_special(const T* tile) {
  constexpr std::uint32_t kExponent = std::is_same_v<T, __half> ? 0x7C00 : 0x7F80;
  constexpr int kVectors = kDim / 8;
  bool special = false;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kThreads) {
    const uint4 vector =
        *reinterpret_cast<const uint4*>(tile + i / kVectors * kPitch<kDim> + i % kVectors * 8);
    for (const std::uint32_t pair : {vector.x, vector.y, vector.z, vector.w}) {
      special |= (pair & kExponent) == kExponent || (pair >> 16 & kExponent) == kExponent;
    }
  }
  return special;
}

/// Tiles of a CTA in shared memory. Rows and columns beyond the piece's are zeros, and so are dS of
/// tokens that a query does not see.
template <class T, int kDim, int kKeys>
struct Tiles {
  T* index_k;  ///< [kKeys][kPitch<kDim>]
  T* index_q;  ///< [kQueries][kPitch<kDim>]
  T* ds;       ///< [kQueries][kPitch<kKeys>]
  const int* limits;
};

/// sum[2 j], sum[2 j + 1] += rows [16 warp, + 16) of dS times columns [first + 16 j, + 16) of the
/// index keys.
template <class T, int kDim, int kKeys, int kColumns>
__device__ __forceinline__ void add_keys(float (&sum)[kColumns / 8][4],
                                         const Tiles<T, kDim, kKeys>& tiles, int first, int warp) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int c = 0; c < kKeys / 16; ++c) {
    std::uint32_t a[4];
    ptx::ldmatrix_x4(a, address_in<kKeys>(tiles.ds, 16 * warp + lane % 16, 16 * c + lane / 16 * 8));
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4_trans(
          b, address_in<kDim>(tiles.index_k, 16 * c + lane % 16, first + 16 * j + lane / 16 * 8));
      ptx::mma_m16n8k16<T>(sum[2 * j], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(sum[2 * j + 1], a, b[2], b[3]);
    }
  }
}

/// The same where 0 times a key that a query does not see may be NaN.
template <class T, int kDim, int kKeys, int kColumns>
__device__ __forceinline__ void add_keys_that_are_seen(float (&sum)[kColumns / 8][4],
                                                       const Tiles<T, kDim, kKeys>& tiles,
                                                       int first, int warp) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int query = 16 * warp + lane / 4 + 8 * h;
    const T* const ds = tiles.ds + query * kPitch<kKeys>;
#pragma unroll 1
    for (int key = 0; key < tiles.limits[query]; ++key) {
      const T* const row = tiles.index_k + key * kPitch<kDim> + first + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sum[j][2 * h + e] += static_cast<float>(ds[key]) * static_cast<float>(row[8 * j + e]);
        }
      }
    }
  }
}

/// sum[2 j], sum[2 j + 1] += columns [first_key, + 16) of dS, transposed, times columns [first +
/// 16 j, + 16) of index_q, over `count` queries.
template <class T, int kDim, int kKeys, int kColumns>
__device__ __forceinline__ void add_queries(float (&sum)[kColumns / 8][4],
                                            const Tiles<T, kDim, kKeys>& tiles, int first_key,
                                            int first, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int q = 0; q < count; q += 16) {
    std::uint32_t a[4];
    ptx::ldmatrix_x4_trans(
        a, address_in<kKeys>(tiles.ds, q + lane / 16 * 8 + lane % 8, first_key + lane / 8 % 2 * 8));
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4_trans(
          b, address_in<kDim>(tiles.index_q, q + lane % 16, first + 16 * j + lane / 16 * 8));
      ptx::mma_m16n8k16<T>(sum[2 * j], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(sum[2 * j + 1], a, b[2], b[3]);
    }
  }
}

/// The same where 0 times a query that does not see a key may be NaN.
template <class T, int kDim, int kKeys, int kColumns>
__device__ __forceinline__ void add_queries_that_see(float (&sum)[kColumns / 8][4],
                                                     const Tiles<T, kDim, kKeys>& tiles,
                                                     int first_key, int first, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int query = 0; query < count; ++query) {
    const T* const row = tiles.index_q + query * kPitch<kDim> + first + lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = first_key + lane / 4 + 8 * h;
      if (key >= tiles.limits[query]) continue;
      const auto ds = static_cast<float>(tiles.ds[query * kPitch<kKeys> + key]);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) sum[j][2 * h + e] += ds * static_cast<float>(row[8 * j + e]);
      }
    }
  }
}

template <class T, int kDim, int kKeys>
__global__ void __launch_bounds__(kThreads, 1)
    index_gradients_kernel(const __grid_constant__ Params g) {
  // Of dindex_k a warp has 16 keys and these columns.
  constexpr int kColumns = kDim * (kKeys / 16) / kWarps;
  // Of dindex_q it makes so many columns at a time.
  constexpr int kStep = 64;
  extern __shared__ uint4 smem[];
  __shared__ int limits[kQueries];
  __shared__ std::int64_t rows[kQueries];
  __shared__ std::int64_t pairs[kQueries];
  Piece piece;
  const int head = static_cast<int>(blockIdx.y);
  if (!find_piece(g, blockIdx.x, head, -1, piece)) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  T* const index_k = reinterpret_cast<T*>(smem);
  T* const index_q = index_k + kKeys * kPitch<kDim>;
  const Tiles<T, kDim, kKeys> tiles{.index_k = index_k,
                                    .index_q = index_q,
                                    .ds = index_q + kQueries * kPitch<kDim>,
                                    .limits = limits};

  load_tile<T, kDim, kThreads>(index_k, kKeys, g.index_dim, g.index_k.load, thread,
                               [&](int token) -> const std::byte* {
                                 if (token >= piece.num_tokens) return nullptr;
                                 return token_address(g.batch, piece.key_block.sequence, g.index_k,
                                                      0, piece.first_token + token);
                               });
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  const bool special_keys = __syncthreads_or(tile_has_special<T, kDim, kKeys>(index_k)) != 0;

  const int first_key = warp % (kKeys / 16) * 16;
  const int first_column = warp / (kKeys / 16) * kColumns;
  float dk[kColumns / 8][4] = {};
#pragma unroll 1
  for (std::int64_t first = piece.begin; first < piece.end; first += kQueries) {
    const int count = static_cast<int>(min(std::int64_t{kQueries}, piece.end - first));
    bool partly = false;
    if (thread < kQueries) {
      const Query query = query_at(g, piece, first + thread);
      limits[thread] = query.limit;
      rows[thread] = query.row;
      pairs[thread] = query.pair;
      partly = query.limit > 0 && query.limit < piece.num_tokens;
    }
    const bool hidden_special_keys = __syncthreads_or(partly) != 0 && special_keys;
    load_tile<T, kKeys, kThreads>(
        tiles.ds, kQueries, g.piece_size, Load::vectors, thread, [&](int n) -> const std::byte* {
          const T* const ds = static_cast<const T*>(g.ds) + pairs[n] * g.piece_size;
          return limits[n] > 0 ? reinterpret_cast<const std::byte*>(ds) : nullptr;
        });
    load_tile<T, kDim, kThreads>(index_q, kQueries, g.index_dim, g.index_q.load, thread,
                                 [&](int n) -> const std::byte* {
                                   return limits[n] > 0 ? g.index_q.at(rows[n], head) : nullptr;
                                 });
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const bool special_queries = __syncthreads_or(
        partly && has_special<T, kDim>(index_q + thread * kPitch<kDim>, g.index_dim));

    if (16 * warp < count) {
#pragma unroll 1
      for (int column = 0; column < kDim; column += kStep) {
        float dq[kStep / 8][4] = {};
        if (hidden_special_keys) {
          add_keys_that_are_seen<T, kDim, kKeys, kStep>(dq, tiles, column, warp);
        } else {
          add_keys<T, kDim, kKeys, kStep>(dq, tiles, column, warp);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int query = 16 * warp + lane / 4 + 8 * h;
          if (limits[query] == 0) continue;
          float* const to = g.dindex_q_parts + pairs[query] * g.index_dim;
#pragma unroll
          for (int j = 0; j < kStep / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int d = column + 8 * j + lane % 4 * 2 + e;
              if (d < g.index_dim) to[d] = dq[j][2 * h + e];
            }
          }
        }
      }
    }
    if (special_queries) {
      add_queries_that_see<T, kDim, kKeys, kColumns>(dk, tiles, first_key, first_column, count);
    } else {
      add_queries<T, kDim, kKeys, kColumns>(dk, tiles, first_key, first_column, count);
    }
    __syncthreads();
  }

  float* const sums =
      g.dindex_k_sums +
      (head * g.total_k + piece.key_block.sequence.k_begin + piece.first_token) * g.index_dim;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first_key + lane / 4 + i / 2 * 8;
      const int d = first_column + 8 * j + lane % 4 * 2 + i % 2;
      if (key < piece.num_tokens && d < g.index_dim) {
        sums[std::int64_t{key} * g.index_dim + d] += dk[j][i];
      }
    }
  }
}

}  // namespace

void launch_kl_index_gradients(const kl::Params& g, DType dtype, cudaStream_t stream) {
  with_tiles(g, [&]<int kDim, int kKeys>() {
    launch(dtype == DType::f16 ? index_gradients_kernel<__half, kDim, kKeys>
                               : index_gradients_kernel<__nv_bfloat16, kDim, kKeys>,
           {.grid = dim3(static_cast<unsigned>(g.lists.num_bins * g.pieces_per_block),
                         static_cast<unsigned>(g.num_kv_heads)),
            .threads = kThreads,
            .smem_bytes = kSmemBytes<kDim, kKeys>},
           stream, g);
  });
}

}  // namespace msa::cuda
