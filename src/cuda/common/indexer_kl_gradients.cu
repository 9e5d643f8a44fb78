// SPDX-License-Identifier: Apache-2.0
//
// From dS of each pair to the gradients of the student, 128 queries at a time. Parts of dindex_q: a
// CTA holds the index keys of a piece, and a warp multiplies 16 queries' dS with them. dindex_k: a
// CTA walks all queries of a piece, whose dS transposed times index_q add to some columns, of which
// each warp keeps a part in registers; another CTA has the other columns, for the walk of a block
// that all queries attend is what the others wait for.
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

constexpr int kColumnParts = 2;  // CTAs that share dindex_k of a piece

/// `rows` of keys or queries, and dS.
template <int kDim, int kKeys>
constexpr std::size_t smem_bytes(int rows) {
  return sizeof(std::uint16_t) *
         static_cast<std::size_t>(kPitch<kDim> * rows + kPitch<kKeys> * kQueries);
}

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

/// Those of kQueries queries that lie in shared memory. Rows of dS of queries that see nothing are
/// zeros, and so are dS of tokens that a query does not see.
struct Queries {
  int limits[kQueries];
  std::int64_t rows[kQueries];
  std::int64_t pairs[kQueries];

  /// By the threads that have one; whether it sees a part of the piece only.
  __device__ __forceinline__ bool put(const Query& query, const Piece& piece) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread >= kQueries) return false;
    limits[thread] = query.limit;
    rows[thread] = query.row;
    pairs[thread] = query.pair;
    return query.limit > 0 && query.limit < piece.num_tokens;
  }
};

/// The query of this thread among the kQueries from `first` on.
__device__ __forceinline__ Query own_query(const Params& g, const Piece& piece,
                                           std::int64_t first) {
  const int thread = static_cast<int>(threadIdx.x);
  return thread < kQueries ? query_at(g, piece, first + thread) : Query{};
}

template <class T, int kKeys>
__device__ __forceinline__ void load_ds(const Params& g, const Queries& queries, T* tile) {
  load_tile<T, kKeys, kThreads>(
      tile, kQueries, g.piece_size, Load::vectors, static_cast<int>(threadIdx.x),
      [&](int n) -> const std::byte* {
        const T* const ds = static_cast<const T*>(g.ds) + queries.pairs[n] * g.piece_size;
        return queries.limits[n] > 0 ? reinterpret_cast<const std::byte*>(ds) : nullptr;
      });
}

/// sum[2 j], sum[2 j + 1] += rows [16 warp, + 16) of dS times columns [first + 16 j, + 16) of the
/// index keys.
template <class T, int kDim, int kKeys, int kColumns>
__device__ __forceinline__ void add_keys(float (&sum)[kColumns / 8][4], const T* ds,
                                         const T* index_k, int first, int warp) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int c = 0; c < kKeys / 16; ++c) {
    std::uint32_t a[4];
    ptx::ldmatrix_x4(a, address_in<kKeys>(ds, 16 * warp + lane % 16, 16 * c + lane / 16 * 8));
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4_trans(
          b, address_in<kDim>(index_k, 16 * c + lane % 16, first + 16 * j + lane / 16 * 8));
      ptx::mma_m16n8k16<T>(sum[2 * j], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(sum[2 * j + 1], a, b[2], b[3]);
    }
  }
}

/// The same where 0 times a key that a query does not see may be NaN.
template <class T, int kDim, int kKeys, int kColumns>
__device__ __forceinline__ void add_keys_that_are_seen(float (&sum)[kColumns / 8][4],
                                                       const T* all_ds, const T* index_k,
                                                       const int* limits, int first, int warp) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int query = 16 * warp + lane / 4 + 8 * h;
    const T* const ds = all_ds + query * kPitch<kKeys>;
#pragma unroll 1
    for (int key = 0; key < limits[query]; ++key) {
      const T* const row = index_k + key * kPitch<kDim> + first + lane % 4 * 2;
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
__device__ __forceinline__ void add_queries(float (&sum)[kColumns / 8][4], const T* ds,
                                            const T* index_q, int first_key, int first, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 2
  for (int q = 0; q < count; q += 16) {
    std::uint32_t a[4];
    ptx::ldmatrix_x4_trans(
        a, address_in<kKeys>(ds, q + lane / 16 * 8 + lane % 8, first_key + lane / 8 % 2 * 8));
#pragma unroll
    for (int j = 0; j < kColumns / 16; ++j) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4_trans(
          b, address_in<kDim>(index_q, q + lane % 16, first + 16 * j + lane / 16 * 8));
      ptx::mma_m16n8k16<T>(sum[2 * j], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(sum[2 * j + 1], a, b[2], b[3]);
    }
  }
}

/// The same where 0 times a query that does not see a key may be NaN.
template <class T, int kDim, int kKeys, int kColumns>
__device__ __forceinline__ void add_queries_that_see(float (&sum)[kColumns / 8][4], const T* all_ds,
                                                     const T* index_q, const int* limits,
                                                     int first_key, int first, int count) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int query = 0; query < count; ++query) {
    const T* const row = index_q + query * kPitch<kDim> + first + lane % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int key = first_key + lane / 4 + 8 * h;
      if (key >= limits[query]) continue;
      const auto ds = static_cast<float>(all_ds[query * kPitch<kKeys> + key]);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) sum[j][2 * h + e] += ds * static_cast<float>(row[8 * j + e]);
      }
    }
  }
}

/// Parts of dindex_q, f32: a CTA has a part of the queries of a piece.
template <class T, int kDim, int kKeys>
__global__ void __launch_bounds__(kThreads, 2)
    query_gradients_kernel(const __grid_constant__ Params g) {
  constexpr int kStep = 64;  // columns at a time
  extern __shared__ uint4 smem[];
  __shared__ Queries queries;
  Piece piece;
  const int head = static_cast<int>(blockIdx.y) % g.num_kv_heads;
  if (!find_piece(g, blockIdx.x, head, static_cast<int>(blockIdx.y) / g.num_kv_heads, piece)) {
    return;
  }
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  T* const index_k = reinterpret_cast<T*>(smem);
  T* const ds = index_k + kKeys * kPitch<kDim>;

  load_tile<T, kDim, kThreads>(index_k, kKeys, g.index_dim, g.index_k.load, thread,
                               [&](int token) -> const std::byte* {
                                 if (token >= piece.num_tokens) return nullptr;
                                 return token_address(g.batch, piece.key_block.sequence, g.index_k,
                                                      0, piece.first_token + token);
                               });
  ptx::cp_async_commit();
  Query own = own_query(g, piece, piece.begin);
  ptx::cp_async_wait<0>();
  __syncthreads();
  const bool special_keys = __syncthreads_or(tile_has_special<T, kDim, kKeys>(index_k)) != 0;

#pragma unroll 1
  for (std::int64_t first = piece.begin; first < piece.end; first += kQueries) {
    const int count = static_cast<int>(min(std::int64_t{kQueries}, piece.end - first));
    const bool hidden_special_keys = __syncthreads_or(queries.put(own, piece)) != 0 && special_keys;
    load_ds<T, kKeys>(g, queries, ds);
    ptx::cp_async_commit();
    own = own_query(g, piece, first + kQueries);  // while dS are on their way
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (16 * warp < count) {
#pragma unroll 1
      for (int column = 0; column < kDim; column += kStep) {
        float dq[kStep / 8][4] = {};
        if (hidden_special_keys) {
          add_keys_that_are_seen<T, kDim, kKeys, kStep>(dq, ds, index_k, queries.limits, column,
                                                        warp);
        } else {
          add_keys<T, kDim, kKeys, kStep>(dq, ds, index_k, column, warp);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int query = 16 * warp + lane / 4 + 8 * h;
          if (queries.limits[query] == 0) continue;
          float* const to = g.dindex_q_parts + queries.pairs[query] * g.index_dim;
#pragma unroll
          for (int j = 0; j < kStep / 8; ++j) {
            const int d = column + 8 * j + lane % 4 * 2;
            if (g.index_dim % 2 == 0) {
              if (d < g.index_dim) {
                *reinterpret_cast<float2*>(to + d) = {dq[j][2 * h], dq[j][2 * h + 1]};
              }
              continue;
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (d + e < g.index_dim) to[d + e] = dq[j][2 * h + e];
            }
          }
        }
      }
    }
    __syncthreads();
  }
}

/// Sums of dindex_k over the queries of the window: a CTA has some columns of a piece.
template <class T, int kDim, int kKeys>
__global__ void __launch_bounds__(kThreads, 2)
    key_gradients_kernel(const __grid_constant__ Params g) {
  constexpr int kPart = kDim / kColumnParts;
  // A warp has 16 keys and these columns.
  constexpr int kColumns = kPart * (kKeys / 16) / kWarps;
  extern __shared__ uint4 smem[];
  __shared__ Queries queries;
  const int part = static_cast<int>(blockIdx.z) * kPart;
  const int dim = min(g.index_dim - part, kPart);
  Piece piece;
  const int head = static_cast<int>(blockIdx.y);
  if (dim <= 0 || !find_piece(g, blockIdx.x, head, -1, piece)) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  T* const index_q = reinterpret_cast<T*>(smem);
  T* const ds = index_q + kQueries * kPitch<kPart>;

  const int first_key = warp % (kKeys / 16) * 16;
  const int first_column = warp / (kKeys / 16) * kColumns;
  float dk[kColumns / 8][4] = {};
  Query own = own_query(g, piece, piece.begin);
#pragma unroll 1
  for (std::int64_t first = piece.begin; first < piece.end; first += kQueries) {
    const int count = static_cast<int>(min(std::int64_t{kQueries}, piece.end - first));
    const bool partly = queries.put(own, piece);
    __syncthreads();
    load_ds<T, kKeys>(g, queries, ds);
    load_tile<T, kPart, kThreads>(
        index_q, kQueries, dim, g.index_q.load, thread, [&](int n) -> const std::byte* {
          if (queries.limits[n] == 0) return nullptr;
          return g.index_q.at(queries.rows[n], head) + part * static_cast<int>(sizeof(T));
        });
    ptx::cp_async_commit();
    own = own_query(g, piece, first + kQueries);  // while the others are on their way
    ptx::cp_async_wait<0>();
    __syncthreads();
    const bool special_queries =
        __syncthreads_or(partly && has_special<T, kPart>(index_q + thread * kPitch<kPart>, dim));
    if (special_queries) {
      add_queries_that_see<T, kPart, kKeys, kColumns>(dk, ds, index_q, queries.limits, first_key,
                                                      first_column, count);
    } else {
      add_queries<T, kPart, kKeys, kColumns>(dk, ds, index_q, first_key, first_column, count);
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
      const int d = part + first_column + 8 * j + lane % 4 * 2 + i % 2;
      if (key < piece.num_tokens && d < g.index_dim) {
        sums[std::int64_t{key} * g.index_dim + d] += dk[j][i];
      }
    }
  }
}

template <class T>
void launch_gradients(const Params& g, cudaStream_t stream) {
  with_tiles(g, [&]<int kDim, int kKeys>() {
    const auto pieces = static_cast<unsigned>(g.lists.num_bins * g.pieces_per_block);
    const auto heads = static_cast<unsigned>(g.num_kv_heads);
    const auto parts = static_cast<unsigned>(ceil_div(g.num_rows, kQueriesPerPart));
    launch(query_gradients_kernel<T, kDim, kKeys>,
           {.grid = dim3(pieces, parts * heads),
            .threads = kThreads,
            .smem_bytes = smem_bytes<kDim, kKeys>(kKeys)},
           stream, g);
    launch(key_gradients_kernel<T, kDim, kKeys>,
           {.grid = dim3(pieces, heads, kColumnParts),
            .threads = kThreads,
            .smem_bytes = smem_bytes<kDim / kColumnParts, kKeys>(kQueries)},
           stream, g);
  });
}

}  // namespace

void launch_kl_index_gradients(const kl::Params& g, DType dtype, cudaStream_t stream) {
  dtype == DType::f16 ? launch_gradients<__half>(g, stream)
                      : launch_gradients<__nv_bfloat16>(g, stream);
}

}  // namespace msa::cuda
