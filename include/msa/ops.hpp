// SPDX-License-Identifier: Apache-2.0
//
// The operations of MiniMax Sparse Attention (arXiv 2606.13392): one argument struct each, used as
//
//   msa::SparseAttentionForward args{.q = q, .k = k, .v = v, .block_ids = ids, .out = out};
//   auto plan = msa::plan(args);                       // host only: checks shapes, picks a backend
//   // ... plan.workspace_bytes() of memory aligned to 64 bytes
//   plan.run(args, workspace);                         // allocates nothing, synchronises nothing
//
// Conventions shared by every operation:
//  * Causal, aligned at the bottom right: query i of a sequence with seq_len_q queries and
//    seq_len_k keys stands at position p = seq_len_k - seq_len_q + i and sees keys 0..p. A query
//    with p < 0 sees nothing: its out is 0, its lse -inf, its block_ids all -1.
//  * Block b of a sequence is its tokens [b * block_size, (b + 1) * block_size). The local block
//    of a query is p / block_size.
//  * Index head g serves KV head g and query heads [g * group_size, (g + 1) * group_size).
//  * Tensors may be strided. Shapes below are logical. All tensors of one call are on one device,
//    their data aligned to its element type.
//  * At most 4096 heads, dimensions of 2^16, block_size and top_k of 2^20. index_scale is not
//    negative: a maximum of scores would be a minimum.
//  * plan() throws msa::Error for anything knowable from shapes; run() on host tensors also checks
//    the offsets and lengths in Batch. Values on a GPU can't be checked: block ids and page ids out
//    of range are skipped by every backend, as if the block were masked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "msa/export.h"
#include "msa/tensor.hpp"

namespace msa {

/// What is fixed for a model.
struct Problem {
  int num_q_heads = 64;
  int num_kv_heads = 4;      ///< Also the number of index query heads; divides num_q_heads.
  int head_dim = 128;        ///< Of q, k and v.
  int index_dim = 128;       ///< Of index_q and index_k.
  int block_size = 128;      ///< Tokens per KV block, a power of two >= 16; also the page size.
  int top_k = 16;            ///< Blocks attended per query, forced ones included.
  int num_init_blocks = 0;   ///< First blocks of a sequence that are always selected.
  int num_local_blocks = 1;  ///< Last causally visible blocks that are always selected, >= 1.

  constexpr int group_size() const { return num_q_heads / num_kv_heads; }
};

/// How the packed tensors divide into sequences.
///
/// Ragged keys: `k` is [total_k, heads, dim] and cu_seqlens_k gives the offsets; not given means
/// one sequence of all keys. Paged keys: `k` is [num_pages, heads, block_size, dim], page_table and
/// seq_lens_k are given, and page p of a sequence holds its block p. Where cu_seqlens_q is not
/// given, every sequence has total_q / batch_size queries (so decode needs none).
struct Batch {
  TensorView cu_seqlens_q{};  ///< i32 [batch_size + 1], from 0, ascending, ends with total_q.
  TensorView cu_seqlens_k{};  ///< i32 [batch_size + 1], from 0, ascending, ends with total_k.
  TensorView
      page_table{};  ///< i32 [batch_size, max_pages], page ids; unused entries may be anything.
  TensorView
      seq_lens_k{};  ///< i32 [batch_size], with page_table; includes the queries' own tokens.
  std::int64_t max_seq_len_q = 0;  ///< Upper bound known to the caller; 0: what the shapes allow.
  std::int64_t max_seq_len_k = 0;  ///< Upper bound known to the caller; 0: what the shapes allow.
};

/// Index Branch scores, max-pooled over the causally visible tokens of each block (paper eqs 5-6).
/// A token whose score is NaN never wins: it counts as -inf.
struct IndexerScores {
  Problem problem{};
  Batch batch{};
  TensorView index_q{};      ///< [total_q, num_kv_heads, index_dim]
  TensorView index_k{};      ///< [total_k, 1, index_dim] or [num_pages, 1, block_size, index_dim]
  float index_scale = 0.0f;  ///< 0 means 1 / sqrt(index_dim).
  TensorView
      block_scores{};  ///< f32 [num_kv_heads, total_q, num_blocks]; -inf where nothing is visible.
};

/// The top_k blocks of each row (paper eq 7): forced blocks first (local, then init), the rest by
/// score; ties go to the lowest block id, NaN ranks below -inf. Only visible blocks are taken.
struct SelectTopK {
  Problem problem{};
  Batch batch{};              ///< Keys may be described by cu_seqlens_k or seq_lens_k alone.
  TensorView block_scores{};  ///< f32 [num_kv_heads, total_q, num_blocks]
  TensorView block_ids{};     ///< i32 [num_kv_heads, total_q, top_k], ascending, then -1.
};

/// IndexerScores and SelectTopK in one; block scores are never stored for a whole prompt.
///
/// Paged keys may come with int8 codes (AppendKv writes them). A backend may then read the codes
/// first and the keys only of blocks that the codes' error bound leaves open: about half the memory
/// traffic of a decode step, and always the same selection.
struct Indexer {
  Problem problem{};
  Batch batch{};
  TensorView index_q{};        ///< [total_q, num_kv_heads, index_dim]
  TensorView index_k{};        ///< [total_k, 1, index_dim] or [num_pages, 1, block_size, index_dim]
  TensorView index_k_codes{};  ///< i8 [num_pages, 1, block_size, index_dim]; optional.
  TensorView index_k_scales{};  ///< bf16 [num_pages, 1, block_size, 2], with index_k_codes: scale c
                                ///< and error e of each key, ||k - c codes||_2 <= e.
  TensorView block_ids{};       ///< i32 [num_kv_heads, total_q, top_k], ascending, then -1.
};

/// Main Branch: exact softmax attention over the selected blocks (paper eq 8).
/// block_ids may stand in any order and must be unique within a row; -1 and ids of blocks that the
/// query can't see are skipped. A key whose score is -inf weighs nothing, and a row of only such
/// keys is an empty row; NaN and +inf scores make the row NaN. `out` must not overlap an input.
struct SparseAttentionForward {
  Problem problem{};
  Batch batch{};
  TensorView q{};              ///< [total_q, num_q_heads, head_dim]
  TensorView k{};              ///< [total_k, num_kv_heads, head_dim] or
                               ///< [num_pages, num_kv_heads, block_size, head_dim]
  TensorView v{};              ///< Shaped like k.
  TensorView block_ids{};      ///< i32 [num_kv_heads, total_q, top_k]
  float softmax_scale = 0.0f;  ///< 0 means 1 / sqrt(head_dim).
  TensorView out{};            ///< [total_q, num_q_heads, head_dim]
  TensorView lse{};  ///< f32 [total_q, num_q_heads], natural log, -inf for empty rows; optional.
  TensorView k_scale{};  ///< f32 [num_kv_heads], what e4m3 elements of k are multiplied by; stride
                         ///< 0 for one scale of all heads. Optional: 1.
  TensorView v_scale{};  ///< The same for v.
};

/// Causal attention over every visible token: the comparison, and the dense layers of a model.
struct DenseAttentionForward {
  Problem problem{};
  Batch batch{};
  TensorView q{};              ///< [total_q, num_q_heads, head_dim]
  TensorView k{};              ///< As in SparseAttentionForward.
  TensorView v{};              ///< Shaped like k.
  float softmax_scale = 0.0f;  ///< 0 means 1 / sqrt(head_dim).
  TensorView out{};            ///< [total_q, num_q_heads, head_dim]
  TensorView lse{};            ///< f32 [total_q, num_q_heads]; optional.
  TensorView k_scale{};        ///< As in SparseAttentionForward.
  TensorView v_scale{};        ///< As in SparseAttentionForward.
};

/// Gradients of SparseAttentionForward. Ragged keys only. The selection is a constant: keys of
/// unselected blocks get exactly 0. Without block_ids the support is every visible token (the
/// warm-up stage, where the Main Branch is dense).
struct SparseAttentionBackward {
  Problem problem{};
  Batch batch{};
  TensorView q{};              ///< [total_q, num_q_heads, head_dim]
  TensorView k{};              ///< [total_k, num_kv_heads, head_dim]
  TensorView v{};              ///< [total_k, num_kv_heads, head_dim]
  TensorView block_ids{};      ///< i32 [num_kv_heads, total_q, top_k]; optional.
  TensorView out{};            ///< Of the forward pass.
  TensorView lse{};            ///< Of the forward pass, f32 or f64 [total_q, num_q_heads].
  TensorView dout{};           ///< [total_q, num_q_heads, head_dim]
  float softmax_scale = 0.0f;  ///< 0 means 1 / sqrt(head_dim).
  TensorView dq{};             ///< Shaped like q.
  TensorView dk{};             ///< Shaped like k.
  TensorView dv{};             ///< Shaped like v.
};

/// The KL alignment loss of one layer and its gradients (paper eqs 9-11), both scaled by
/// loss_coefficient / (total_q * num_kv_heads). The teacher is the mean over a group's heads of
/// each head's softmax on the support; it gets no gradient. Support: the visible tokens of the
/// selected blocks, or every visible token where block_ids is not given (warm-up). Ragged keys
/// only.
struct IndexerKlBackward {
  Problem problem{};
  Batch batch{};
  TensorView q{};                 ///< Teacher, [total_q, num_q_heads, head_dim]
  TensorView k{};                 ///< Teacher, [total_k, num_kv_heads, head_dim]
  TensorView index_q{};           ///< Student, [total_q, num_kv_heads, index_dim]
  TensorView index_k{};           ///< Student, [total_k, 1, index_dim]
  TensorView block_ids{};         ///< i32 [num_kv_heads, total_q, top_k]; optional.
  float softmax_scale = 0.0f;     ///< 0 means 1 / sqrt(head_dim).
  float index_scale = 0.0f;       ///< 0 means 1 / sqrt(index_dim).
  float loss_coefficient = 1.0f;  ///< The paper's lambda.
  TensorView loss{};              ///< f32 or f64 [1]; optional.
  TensorView dindex_q{};          ///< Shaped like index_q; optional together with dindex_k.
  TensorView dindex_k{};          ///< Shaped like index_k.
  TensorView lse{};               ///< Of the teacher's forward pass over the same support, f32 or
                                  ///< f64 [total_q, num_q_heads]; optional: may spare a pass over
                                  ///< the teacher's scores, and changes results by its rounding.
};

/// Writes the newest tokens of each sequence into its pages: token i of sequence b goes to position
/// seq_lens_k[b] - seq_len_q + i. A token whose page id is out of range is dropped. Rows outside
/// those positions are not touched. Each of the three (new, pages) pairs is optional. Where
/// index_k_codes_pages is given, each new index key, as stored, is also coded in int8:
/// c = the least bf16 >= max_d |k_d| / 127, codes = round(k / c), e = the least bf16 >=
/// ||k - c codes||_2; a key with an element that is not finite or above 2^40 gets c = 0, codes 0,
/// e = +inf.
struct AppendKv {
  Problem problem{};
  Batch batch{};                      ///< page_table and seq_lens_k are required.
  TensorView k{};                     ///< [total_q, num_kv_heads, head_dim]
  TensorView v{};                     ///< [total_q, num_kv_heads, head_dim]
  TensorView index_k{};               ///< [total_q, 1, index_dim]
  TensorView k_pages{};               ///< [num_pages, num_kv_heads, block_size, head_dim]
  TensorView v_pages{};               ///< [num_pages, num_kv_heads, block_size, head_dim]
  TensorView index_k_pages{};         ///< [num_pages, 1, block_size, index_dim]
  TensorView index_k_codes_pages{};   ///< i8 [num_pages, 1, block_size, index_dim]; optional, with
                                      ///< index_k.
  TensorView index_k_scales_pages{};  ///< bf16 [num_pages, 1, block_size, 2]: (c, e); with
                                      ///< index_k_codes_pages.
};

/// What a serving engine does between the projections and the Indexer, in one pass: RMSNorm of each
/// head, rotary position embedding, quantisation, and AppendKv. Each (input, output) pair is
/// optional, but one of k, v and index_k is given. v is neither normed nor rotated. Places of new
/// tokens are those of AppendKv: q and index_q of a token without a page are still written. Of a
/// token before position 0, or whose rotary position lies outside the table, nothing is written.
///
/// All arithmetic is f32, each operation rounded, none fused, so that backends agree bit by bit
/// (NaN payloads aside); only outputs are rounded to their dtype. With x the dim elements of a
/// head:
///   s[l] = sum of x[d]^2 over d with d / 4 % 32 = l, in ascending order;
///   s[l] += s[l ^ o] for all l at once, o = 16, 8, 4, 2, 1;   r = 1 / sqrt(s[0] / dim + norm_eps)
///   y[d] = (x[d] * r) * (weight[d] + norm_weight_offset)              without a weight: y = x
///   out[i] = y[i] * cos[i] - y[i + h] * sin[i],  out[i + h] = y[i + h] * cos[i] + y[i] * sin[i]
/// for i < h = rotary_dim / 2 (rotate-half layout); elements from rotary_dim on stay y. e4m3 K and
/// V hold out / scale, saturated to +-448; e4m3 index keys and index_q have no scale.
struct NormRopeAppendKv {
  Problem problem{};
  Batch batch{};                ///< page_table and seq_lens_k are required.
  TensorView q{};               ///< [total_q, num_q_heads, head_dim]; inputs are f32, f16 or bf16.
  TensorView k{};               ///< [total_q, num_kv_heads, head_dim]
  TensorView v{};               ///< [total_q, num_kv_heads, head_dim]
  TensorView index_q{};         ///< [total_q, num_kv_heads, index_dim]
  TensorView index_k{};         ///< [total_q, 1, index_dim]
  TensorView q_weight{};        ///< [head_dim], f32, f16 or bf16; optional: q is not normed.
  TensorView k_weight{};        ///< [head_dim]; optional.
  TensorView index_q_weight{};  ///< [index_dim]; optional.
  TensorView index_k_weight{};  ///< [index_dim]; optional.
  float norm_eps = 1e-6f;       ///< Added to the mean of squares.
  float norm_weight_offset = 0.0f;   ///< 1 for weights trained as 1 + weight (Gemma, MiniMax-M3).
  TensorView cos_sin{};              ///< [max_positions, rotary_dim], f32, f16 or bf16: cosines of
                                     ///< rotary_dim / 2 angles, then sines. Optional: no rotation.
  TensorView positions{};            ///< i32 [total_q], rows of cos_sin; optional: the positions at
                                     ///< which tokens are appended.
  TensorView q_out{};                ///< Shaped like q, and may be q itself.
  TensorView index_q_out{};          ///< Shaped like index_q, and may be index_q itself.
  TensorView k_pages{};              ///< [num_pages, num_kv_heads, block_size, head_dim]
  TensorView v_pages{};              ///< [num_pages, num_kv_heads, block_size, head_dim]
  TensorView index_k_pages{};        ///< [num_pages, 1, block_size, index_dim]
  TensorView index_k_codes_pages{};  ///< As in AppendKv.
  TensorView index_k_scales_pages{};  ///< As in AppendKv.
  TensorView k_scale{};  ///< f32 [num_kv_heads], as in SparseAttentionForward: what elements of
                         ///< e4m3 k_pages are later multiplied by, so keys are divided by it.
  TensorView v_scale{};  ///< The same for v_pages.
};

/// A CUDA stream (cudaStream_t) for device tensors; ignored for host tensors.
struct Stream {
  void* handle = nullptr;
};

struct Options {
  /// Name of the implementation to use ("reference", "cpu", ...); null: $MSA_BACKEND, or else the
  /// first of the ordered list that takes the request.
  const char* backend = nullptr;
  /// Results are bitwise repeatable. Paths that cannot promise it decline.
  bool deterministic = true;
};

namespace detail {
template <class Args>
struct Implementation;
}

/// A checked request bound to one implementation. Cheap to make and to copy; needs no device.
template <class Args>
class MSA_API Plan {
 public:
  std::size_t workspace_bytes() const;
  /// Name of the chosen implementation, for example "cpu".
  const char* implementation() const;
  /// Runs on `args`, which must have the shapes, strides and dtypes that were planned; pointers may
  /// differ. `workspace` must hold workspace_bytes(), aligned to 64 bytes (256 on a GPU), and must
  /// not be shared by calls that run at the same time.
  void run(const Args& args, std::span<std::byte> workspace = {}, Stream stream = {}) const;

 private:
  template <class A>
  friend Plan<A> make_plan(const A& args, const Options& options);
  Args planned_{};
  const detail::Implementation<Args>* implementation_ = nullptr;
  std::size_t workspace_bytes_ = 0;
};

[[nodiscard]] MSA_API Plan<IndexerScores> plan(const IndexerScores&, const Options& = {});
[[nodiscard]] MSA_API Plan<SelectTopK> plan(const SelectTopK&, const Options& = {});
[[nodiscard]] MSA_API Plan<Indexer> plan(const Indexer&, const Options& = {});
[[nodiscard]] MSA_API Plan<SparseAttentionForward> plan(const SparseAttentionForward&,
                                                        const Options& = {});
[[nodiscard]] MSA_API Plan<DenseAttentionForward> plan(const DenseAttentionForward&,
                                                       const Options& = {});
[[nodiscard]] MSA_API Plan<SparseAttentionBackward> plan(const SparseAttentionBackward&,
                                                         const Options& = {});
[[nodiscard]] MSA_API Plan<IndexerKlBackward> plan(const IndexerKlBackward&, const Options& = {});
[[nodiscard]] MSA_API Plan<AppendKv> plan(const AppendKv&, const Options& = {});
[[nodiscard]] MSA_API Plan<NormRopeAppendKv> plan(const NormRopeAppendKv&, const Options& = {});

}  // namespace msa
