// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of IndexerKlBackward share. See docs/kernels/kl.md.
#pragma once

#include "cuda/common/keys.cuh"
#include "cuda/common/ptx/math.cuh"
#include "cuda/common/query_lists.cuh"

namespace msa::cuda::kl {

/// Rows of a float tensor that is read or written by heads; strides in bytes.
struct Rows {
  std::byte* data;
  std::int64_t token_stride;
  std::int64_t head_stride;
  DType dtype;
  Load load;

  __device__ __forceinline__ std::byte* at(std::int64_t token, int head) const {
    return data + token * token_stride + head * head_stride;
  }
};

/// By value to every kernel. A piece is a KV block, or kKeys tokens of a larger one: what one CTA
/// holds. A pair is a query of one KV head and a piece that it attends; pairs of the window have
/// ((row - first_row) * num_kv_heads + head) * num_slots + slot, slots counting pieces.
struct Params {
  DeviceBatch batch;
  QueryLists lists;
  const std::int32_t* block_ids;  ///< or null: every visible token
  std::int64_t ids_head_stride, ids_token_stride;
  Rows q;
  Rows index_q;
  KeyRows k;
  KeyRows index_k;
  const float* given_lse;  ///< of the teacher, natural, or null
  std::int64_t lse_token_stride, lse_head_stride;
  float* teacher_lse;          ///< without given_lse: [total_q][num_q_heads], base 2
  float* student_lse;          ///< [total_q][num_kv_heads], base 2
  float2* teacher_statistics;  ///< without given_lse: [pairs][group_size], maximum and sum, base 2
  float2* student_statistics;  ///< [pairs]
  double* pair_losses;         ///< [pairs], or null where score gradients add to `losses`
  void* ds;                    ///< [pairs][piece_size], 16 bits, times ds_scale; with gradients
  float* dindex_q_parts;       ///< [pairs][index_dim], with gradients
  double* losses;  ///< [total_q][num_kv_heads], or one of each CTA of the score gradients' grid
  std::int64_t num_losses;
  float* dindex_k_sums;  ///< [num_kv_heads][total_k][index_dim], with gradients
  Rows dindex_q;         ///< data is null without gradients
  Rows dindex_k;
  std::byte* loss;                   ///< or null
  bool wide_loss;                    ///< f64, else f32
  std::int64_t first_row, num_rows;  ///< the window
  std::int64_t num_slots;
  std::int64_t total_q, total_k;
  int piece_size;  ///< tokens, at most block_size
  int pieces_per_block;
  int num_kv_heads;
  int group_size;
  int head_dim;
  int index_dim;
  int top_k;
  float teacher_scale;  ///< of scores in base 2
  float student_scale;  ///< the same
  float ds_scale;       ///< a power of two: small dS keep their bits in f16
  double weight;        ///< of each (query, KV head) in the loss
  float gradient_scale;

  __device__ __forceinline__ std::int64_t pair(std::int64_t row, int head,
                                               std::int64_t slot) const {
    return ((row - first_row) * num_kv_heads + head) * num_slots + slot;
  }
  /// The teacher's, in base 2.
  __device__ __forceinline__ float lse_of(std::int64_t row, int q_head) const {
    constexpr float kLog2E = 1.44269504088896341f;
    if (given_lse != nullptr) {
      return given_lse[row * lse_token_stride + q_head * lse_head_stride] * kLog2E;
    }
    return teacher_lse[row * (num_kv_heads * group_size) + q_head];
  }
};

/// A CTA of the kernels that walk queries takes so many, or a block that all attend would be the
/// work of one CTA.
inline constexpr int kQueriesPerPart = 1024;

/// Of the kernels that walk queries: pieces, and parts of their queries by KV head.
inline dim3 grid_of(const Params& g) {
  const std::int64_t parts = ceil_div(g.num_rows, kQueriesPerPart);
  return {static_cast<unsigned>(g.lists.num_bins * g.pieces_per_block),
          static_cast<unsigned>(parts * g.num_kv_heads)};
}

/// Tokens of the widest piece for rows of kDim elements: what shared memory and registers hold.
inline constexpr int most_keys(int padded_dim) { return padded_dim == 128 ? 128 : 64; }

/// Starts start.operator()<kDim, kKeys>() for the narrowest tiles that hold the problem.
template <class Start>
void with_tiles(const Params& g, Start start) {
  const int dim = std::max(g.head_dim, g.index_dim);
  with_padded_dim(dim, [&]<int kDim>() {
    if constexpr (most_keys(kDim) == 128) {
      if (g.piece_size == 128) return start.template operator()<kDim, 128>();
    }
    start.template operator()<kDim, 64>();
  });
}

/// A piece, and the entries [begin, end) of its list that this CTA takes.
struct Piece {
  KeyBlock key_block;
  QueryList queries;
  std::int64_t begin, end;
  std::int64_t first_token;  ///< of the sequence
  std::int64_t first_slot;   ///< dense: the piece's; sparse: among those of its block
  int num_tokens;
  int head;

  /// Tokens of the piece that the query sees.
  __device__ __forceinline__ int limit(std::int64_t row) const {
    const DeviceSequence& sequence = key_block.sequence;
    const std::int64_t position = sequence.position(row - sequence.q_begin);
    return static_cast<int>(msa::cuda::detail::clamp(position + 1 - first_token, 0, num_tokens));
  }
};

/// A whole warp's search in a list: where the first entry that is not below a row stands, within
/// [low, high]. Its 32 probes at a time divide what is left by 32; a search by halves waits for
/// memory 17 times where this does so 4 times.
struct ListSearch {
  std::int64_t low, high;

  __device__ __forceinline__ void narrow(const QueryList& list, std::int64_t row) {
    const std::int64_t step = (high - low + 31) / 32;
    const std::int64_t probe = low + step * (threadIdx.x % 32 + 1) - 1;
    const bool below = probe < high && list[probe] < row;
    const std::int64_t num_below = __popc(__ballot_sync(~0u, below));  // the list ascends
    high = min(high, low + step * (num_below + 1) - 1);
    low += step * num_below;
  }
};

/// Piece `number` for a head and the window's queries; part < 0: all of them. False: nothing to do.
__device__ __forceinline__ bool find_piece(const Params& g, std::int64_t number, int head, int part,
                                           Piece& piece) {
  const std::int64_t bin = number / g.pieces_per_block;
  const int in_block = static_cast<int>(number % g.pieces_per_block);
  piece.head = head;
  piece.key_block = key_block_of_bin(g.batch, bin);
  if (!piece.key_block.exists) return false;
  const int before = in_block * g.piece_size;
  piece.num_tokens = min(g.piece_size, piece.key_block.num_tokens(g.batch.block_size) - before);
  if (piece.num_tokens <= 0) return false;
  piece.first_token = piece.key_block.block * g.batch.block_size + before;
  piece.first_slot =
      (g.block_ids == nullptr ? piece.key_block.block * g.pieces_per_block : 0) + in_block;
  if (piece.first_slot >= g.num_slots) return false;  // beyond a max_seq_len_k that is too small
  piece.queries = queries(g.batch, g.lists, head, bin, piece.key_block);
  if (std::int64_t{part} * kQueriesPerPart >= piece.queries.count) return false;
  ListSearch begin{0, piece.queries.count};
  ListSearch end = begin;
  while (begin.low < begin.high || end.low < end.high) {
    if (begin.low < begin.high) begin.narrow(piece.queries, g.first_row);
    if (end.low < end.high) end.narrow(piece.queries, g.first_row + g.num_rows);
  }
  piece.begin = begin.low;
  piece.end = end.low;
  if (part >= 0) {
    piece.begin += std::int64_t{part} * kQueriesPerPart;
    piece.end = min(piece.end, piece.begin + kQueriesPerPart);
  }
  return piece.begin < piece.end;
}

/// One query of a piece; limit 0: none, or it sees nothing of the piece.
struct Query {
  std::int64_t row = 0;
  std::int64_t pair = 0;
  int limit = 0;
};

__device__ __forceinline__ Query query_at(const Params& g, const Piece& piece, std::int64_t entry) {
  Query query;
  if (entry >= piece.end) return query;
  query.row = piece.queries[entry];
  query.limit = piece.limit(query.row);
  std::int64_t slot = piece.first_slot;
  if (g.block_ids != nullptr) {
    const std::int32_t* const ids =
        g.block_ids + piece.head * g.ids_head_stride + query.row * g.ids_token_stride;
    // To the end in any case, so that several loads are under way.
    int found = g.top_k;
#pragma unroll 4
    for (int i = 0; i < g.top_k; ++i) {
      if (ids[i] == piece.key_block.block) found = min(found, i);
    }
    if (found == g.top_k) query.limit = 0;
    slot += std::int64_t{found} * g.pieces_per_block;
  }
  query.pair = g.pair(query.row, piece.head, slot);
  return query;
}

/// Whether the query attends the piece of a slot, where `visible` keys are visible to it.
__device__ __forceinline__ bool attends(const Params& g, std::int64_t row, int head,
                                        std::int64_t visible, std::int64_t slot) {
  // Slots fit 32 bits, in which a division is a few instructions.
  const auto number = static_cast<std::uint32_t>(slot);
  const auto pieces = static_cast<std::uint32_t>(g.pieces_per_block);
  std::int64_t block = number / pieces;
  if (g.block_ids != nullptr) {
    block = g.block_ids[head * g.ids_head_stride + row * g.ids_token_stride + block];
  }
  return block >= 0 &&
         block * g.batch.block_size + static_cast<std::int64_t>(number % pieces) * g.piece_size <
             visible;
}

/// Scores of a warp's 16 rows with the keys of a piece, as products of tensor cores leave them: row
/// lane / 4 + 8 (i / 2), column 8 j + lane % 4 * 2 + i % 2 at [j][i].
template <int kKeys>
using Scores = float[kKeys / 8][4];

__device__ __forceinline__ int column_of(int j, int i) {
  return 8 * j + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
}

/// A score minus a logarithm of sums of them. The product is rounded before it is subtracted: the
/// largest score must give what it gave when the sum was made, which a fused difference of huge
/// numbers does not.
__device__ __forceinline__ float difference_of(float product, float scale, float lse) {
  return __fmul_rn(product, scale) - lse;
}

/// 2^(score - lse): at most 1 however lse was rounded, NaN where either is NaN.
__device__ __forceinline__ float probability(float difference) {
  return ptx::ex2(ptx::min_nan(difference, 0.0f));
}

/// Rows of `s` are 16 heads of query n (of the warp's 16), whose probabilities are added up and put
/// to row n of `teacher`, of which kHalf is n / 8; in columns that the query does not see they mean
/// nothing. `lse` of heads lane / 4 and lane / 4 + 8.
template <int kHalf, int kKeys>
__device__ __forceinline__ void add_heads(Scores<kKeys>& teacher, const Scores<kKeys>& s, int n,
                                          const float (&lse)[2], const bool (&exists)[2],
                                          float scale) {
  const bool own = static_cast<int>(threadIdx.x) % 32 / 4 == n % 8;
  const auto add = [&](auto power) {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float sum = exists[0] ? power(s[j][e], lse[0]) : 0.0f;
        sum += exists[1] ? power(s[j][2 + e], lse[1]) : 0.0f;
        sum += __shfl_xor_sync(~0u, sum, 4);
        sum += __shfl_xor_sync(~0u, sum, 8);
        sum += __shfl_xor_sync(~0u, sum, 16);
        if (own) teacher[j][2 * kHalf + e] += sum;
      }
    }
  };
  // Up to here a difference is known to within 2^-6, and no power is much above 1.
  constexpr float kLarge = 0x1p16f;
  if (__any_sync(~0u, fabsf(lse[0]) > kLarge || fabsf(lse[1]) > kLarge)) {
    // Where all scores are -inf, and lse is, nothing weighs anything.
    add([scale](float x, float l) {
      return probability(difference_of(x, scale, l == -INFINITY ? INFINITY : l));
    });
  } else {
    add([scale](float x, float l) { return ptx::ex2(fmaf(x, scale, -l)); });
  }
}

/// dS and the loss of query lane / 4 + 8 kHalf of the warp's, from the teacher's sums and the
/// student's scores.
template <class T, int kHalf, int kKeys>
__device__ __forceinline__ void finish_query(const Params& g, const Query& query, int head,
                                             const Scores<kKeys>& teacher,
                                             const Scores<kKeys>& student) {
  float loss = 0.0f;
  if (query.limit > 0) {
    const float share = 1.0f / static_cast<float>(g.group_size);
    const float lse = g.student_lse[query.row * g.num_kv_heads + head];
    T* const ds = static_cast<T*>(g.ds) + query.pair * g.piece_size;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      float difference[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float p = teacher[j][2 * kHalf + e] * share;
        // log P_idx = score - lse stays finite where P_idx underflows.
        const float log_student = difference_of(student[j][2 * kHalf + e], g.student_scale, lse);
        const bool visible = column_of(j, e) < query.limit;
        const float own = lse == -INFINITY ? 0.0f : probability(log_student);
        difference[e] = visible ? own - p : 0.0f;
        if (visible && p != 0.0f) loss += p * (log2f(p) - log_student);
      }
      if (g.dindex_q.data != nullptr && column_of(j, 0) < g.piece_size) {
        *reinterpret_cast<std::uint32_t*>(ds + column_of(j, 0)) =
            ptx::pack<T>(difference[0] * g.ds_scale, difference[1] * g.ds_scale);
      }
    }
  }
  // A quad has one query.
  constexpr double kLn2 = 0.69314718055994530942;
  double sum = static_cast<double>(loss) * kLn2;
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  if (threadIdx.x % 4 == 0 && query.limit > 0) g.pair_losses[query.pair] = sum;
}

}  // namespace msa::cuda::kl
