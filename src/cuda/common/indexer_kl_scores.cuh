// SPDX-License-Identifier: Apache-2.0
//
// The scores of the KL loss. A CTA holds the keys and index keys of a piece; each of its warps
// takes 16 queries at a time: the teacher's scores query by query with 16 heads as the rows of its
// products, the student's with the 16 queries as rows. A file for each kernel and dtype, or they
// would compile for minutes.
#pragma once

#include "cuda/common/indexer_kl.cuh"
#include "cuda/common/indexer_kl.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/common/ptx/math.cuh"

namespace msa::cuda::kl::scores {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kRows = 16;
inline constexpr int kStages = 2;

/// k, index_k, then kStages tiles of each warp.
template <int kDim, int kKeys>
inline constexpr std::size_t kSmemBytes =
    sizeof(std::uint16_t) * kPitch<kDim> * (2 * kKeys + kWarps * kStages * kRows);

template <int kDim, int kKeys>
inline constexpr int kCtasPerSm = kDim <= 128 ? 2 : 1;

/// The part of a piece's work that one warp does: its 16 queries, lane n holding query n.
template <class T, int kDim, int kKeys>
class Warp {
 public:
  static constexpr int kChunks = kKeys / 16;

  __device__ __forceinline__ Warp(const Params& g, const Piece& piece, T* smem)
      : g_(g),
        piece_(piece),
        k_(smem),
        index_k_(smem + kKeys * kPitch<kDim>),
        stages_(smem + (2 * kKeys + warp() * kStages * kRows) * kPitch<kDim>) {}

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  /// False: none of the 16 sees anything.
  __device__ __forceinline__ bool take_queries(std::int64_t first) {
    query_ = lane() < kRows ? query_at(g_, piece_, first + lane()) : Query{};
    return __any_sync(~0u, query_.limit > 0);
  }
  __device__ __forceinline__ Query query(int n) const {
    return {__shfl_sync(~0u, query_.row, n), __shfl_sync(~0u, query_.pair, n),
            __shfl_sync(~0u, query_.limit, n)};
  }

  /// Teacher's tiles: query n / parts, heads 16 (n % parts) and on. Calls visit(query number, first
  /// head of the group, scores) for queries [begin, end) that see something.
  template <class Visit>
  __device__ __forceinline__ void for_each_teacher(int begin, int end, Visit visit) {
    const int parts = (g_.group_size + kRows - 1) / kRows;
    load_heads(begin * parts, parts);
    ptx::cp_async_commit();
#pragma unroll 1
    for (int n = begin * parts; n < end * parts; ++n) {
      if (n + 1 < end * parts) load_heads(n + 1, parts);
      ptx::cp_async_commit();
      ptx::cp_async_wait<1>();
      __syncwarp();
      if (__shfl_sync(~0u, query_.limit, n / parts) > 0) {
        Scores<kKeys> s;
        multiply_qk<T, kDim, kChunks>(s, stage(n), k_);
        visit(n / parts, n % parts * kRows, s);
      }
      __syncwarp();  // the stage is loaded again
    }
  }

  __device__ __forceinline__ void student(Scores<kKeys>& s) {
    load_tile<T, kDim, 32>(stage(0), kRows, g_.index_dim, g_.index_q.load, lane(), [&](int n) {
      const std::int64_t row = __shfl_sync(~0u, query_.row, n);
      const int limit = __shfl_sync(~0u, query_.limit, n);
      return limit > 0 ? g_.index_q.at(row, piece_.head) : nullptr;
    });
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    multiply_qk<T, kDim, kChunks>(s, stage(0), index_k_);
    __syncwarp();
  }

 private:
  __device__ __forceinline__ T* stage(int n) const {
    return stages_ + n % kStages * kRows * kPitch<kDim>;
  }

  __device__ __forceinline__ void load_heads(int n, int parts) {
    const std::int64_t row = __shfl_sync(~0u, query_.row, n / parts);
    const int limit = __shfl_sync(~0u, query_.limit, n / parts);
    const int first = n % parts * kRows;
    load_tile<T, kDim, 32>(stage(n), kRows, g_.head_dim, g_.q.load, lane(),
                           [&](int r) -> const std::byte* {
                             const int head = first + r;
                             return limit > 0 && head < g_.group_size
                                        ? g_.q.at(row, piece_.head * g_.group_size + head)
                                        : nullptr;
                           });
  }

  const Params& g_;
  const Piece& piece_;
  const T* k_;
  const T* index_k_;
  T* stages_;
  Query query_;
};

/// The keys and index keys of a piece; rows beyond its tokens are zeros. The teacher's only where
/// `teacher`.
template <class T, int kDim, int kKeys>
__device__ __forceinline__ void load_keys(const Params& g, const Piece& piece, T* smem,
                                          bool teacher) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto load = [&](T* tile, const KeyRows& keys, int head, int dim) {
    load_tile<T, kDim, kThreads>(tile, kKeys, dim, keys.load, thread,
                                 [&](int token) -> const std::byte* {
                                   if (token >= piece.num_tokens) return nullptr;
                                   return token_address(g.batch, piece.key_block.sequence, keys,
                                                        head, piece.first_token + token);
                                 });
  };
  if (teacher) load(smem, g.k, piece.head, g.head_dim);
  load(smem + kKeys * kPitch<kDim>, g.index_k, 0, g.index_dim);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
}

/// Maximum of the visible scores that are no NaN, and the sum of 2^(score - maximum), of row
/// lane / 4 + 8 h, in all lanes of its quad.
template <int kKeys>
__device__ __forceinline__ float2 statistics_of(const Scores<kKeys>& s, int h, int limit,
                                                float scale) {
  float m = -INFINITY;
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int i = 2 * h; i < 2 * h + 2; ++i) {
      if (column_of(j, i) < limit) m = fmaxf(m, __fmul_rn(s[j][i], scale));
    }
  }
  m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
  m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
  const float base = m == -INFINITY ? 0.0f : m;
  float l = 0.0f;
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int i = 2 * h; i < 2 * h + 2; ++i) {
      if (column_of(j, i) < limit) l += ptx::ex2(difference_of(s[j][i], scale, base));
    }
  }
  l += __shfl_xor_sync(~0u, l, 1);
  l += __shfl_xor_sync(~0u, l, 2);
  return {m, l};
}

template <class T, int kDim, int kKeys>
__global__ void __launch_bounds__(kThreads, kCtasPerSm<kDim, kKeys>)
    statistics_kernel(const __grid_constant__ Params g) {
  extern __shared__ uint4 smem[];
  Piece piece;
  const int head = static_cast<int>(blockIdx.y) % g.num_kv_heads;
  if (!find_piece(g, blockIdx.x, head, static_cast<int>(blockIdx.y) / g.num_kv_heads, piece)) {
    return;
  }
  const bool teacher = g.given_lse == nullptr;
  T* const tiles = reinterpret_cast<T*>(smem);
  load_keys<T, kDim, kKeys>(g, piece, tiles, teacher);
  Warp<T, kDim, kKeys> warp(g, piece, tiles);
  const int lane = warp.lane();
#pragma unroll 1
  for (std::int64_t first = piece.begin + warp.warp() * kRows; first < piece.end;
       first += kWarps * kRows) {
    if (!warp.take_queries(first)) continue;
    if (teacher) {
      warp.for_each_teacher(0, kRows, [&](int n, int first_head, const Scores<kKeys>& s) {
        const Query query = warp.query(n);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 statistics = statistics_of<kKeys>(s, h, query.limit, g.teacher_scale);
          const int in_group = first_head + lane / 4 + 8 * h;
          if (lane % 4 == 0 && in_group < g.group_size) {
            g.teacher_statistics[query.pair * g.group_size + in_group] = statistics;
          }
        }
      });
    }
    Scores<kKeys> s;
    warp.student(s);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Query query = warp.query(lane / 4 + 8 * h);
      const float2 statistics = statistics_of<kKeys>(s, h, query.limit, g.student_scale);
      if (lane % 4 == 0 && query.limit > 0) g.student_statistics[query.pair] = statistics;
    }
  }
}

template <class T, int kDim, int kKeys>
__global__ void __launch_bounds__(kThreads, kCtasPerSm<kDim, kKeys>)
    score_gradients_kernel(const __grid_constant__ Params g) {
  extern __shared__ uint4 smem[];
  Piece piece;
  const int head = static_cast<int>(blockIdx.y) % g.num_kv_heads;
  if (!find_piece(g, blockIdx.x, head, static_cast<int>(blockIdx.y) / g.num_kv_heads, piece)) {
    return;
  }
  T* const tiles = reinterpret_cast<T*>(smem);
  load_keys<T, kDim, kKeys>(g, piece, tiles, true);
  Warp<T, kDim, kKeys> warp(g, piece, tiles);
  const int lane = warp.lane();
#pragma unroll 1
  for (std::int64_t first = piece.begin + warp.warp() * kRows; first < piece.end;
       first += kWarps * kRows) {
    if (!warp.take_queries(first)) continue;
    // Sums over the group's heads, in the layout of the student's scores.
    Scores<kKeys> teacher = {};
    const auto add_half = [&]<int kHalf>() {
      warp.for_each_teacher(
          8 * kHalf, 8 * kHalf + 8, [&](int n, int first_head, const Scores<kKeys>& s) {
            const Query query = warp.query(n);
            float lse[2];
            bool exists[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int in_group = first_head + lane / 4 + 8 * r;
              exists[r] = in_group < g.group_size;
              lse[r] = exists[r] ? g.lse_of(query.row, head * g.group_size + in_group) : 0.0f;
            }
            add_heads<kHalf, kKeys>(teacher, s, n, lse, exists, g.teacher_scale);
          });
    };
    add_half.template operator()<0>();
    add_half.template operator()<1>();
    Scores<kKeys> s;
    warp.student(s);
    finish_query<T, 0, kKeys>(g, warp.query(lane / 4), head, teacher, s);
    finish_query<T, 1, kKeys>(g, warp.query(lane / 4 + 8), head, teacher, s);
  }
}

template <class T>
void launch_statistics(const Params& g, cudaStream_t stream) {
  with_tiles(g, [&]<int kDim, int kKeys>() {
    launch(statistics_kernel<T, kDim, kKeys>,
           {.grid = grid_of(g), .threads = kThreads, .smem_bytes = kSmemBytes<kDim, kKeys>}, stream,
           g);
  });
}

template <class T>
void launch_score_gradients(const Params& g, cudaStream_t stream) {
  with_tiles(g, [&]<int kDim, int kKeys>() {
    launch(score_gradients_kernel<T, kDim, kKeys>,
           {.grid = grid_of(g), .threads = kThreads, .smem_bytes = kSmemBytes<kDim, kKeys>}, stream,
           g);
  });
}

void launch_statistics_bf16(const Params& g, cudaStream_t stream);
void launch_statistics_f16(const Params& g, cudaStream_t stream);
void launch_score_gradients_bf16(const Params& g, cudaStream_t stream);
void launch_score_gradients_f16(const Params& g, cudaStream_t stream);

}  // namespace msa::cuda::kl::scores
