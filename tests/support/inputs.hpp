// SPDX-License-Identifier: Apache-2.0
//
// From a case to the tensors and argument structs of every operation.
#pragma once

#include <deque>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "core/indexed_attention.hpp"
#include "core/operation.hpp"
#include "tests/cases.hpp"
#include "tests/support/guarded_tensor.hpp"

namespace msa::testing {

/// Every input tensor of a case, rounded to its dtype. What no operation may read is NaN: pages of
/// nobody, page tails beyond a sequence's keys, gaps between rows. Entries of the page table that
/// no sequence needs name such pages or are out of range.
class Inputs {
 public:
  explicit Inputs(const Case& spec);

  /// Backward operations need ragged keys, AppendKv and NormRopeAppendKv need pages that sequences
  /// don't share; only the latter and forward operations take e4m3, and it takes no f64.
  template <class Args>
  bool supports() const;

  /// The operation's arguments with all inputs given and no output.
  template <class Args>
  Args args();

  /// "" or which input was written to.
  std::string changed();
  /// The whole memory of every tensor.
  std::vector<std::span<std::byte>> buffers();

  Case spec;
  Batch batch{};
  GuardedTensor cu_seqlens_q, cu_seqlens_k, page_table, seq_lens_k;
  GuardedTensor q;                              ///< [total_q, num_q_heads, head_dim]
  GuardedTensor k, v;                           ///< ragged or paged
  GuardedTensor index_q;                        ///< [total_q, num_kv_heads, index_dim]
  GuardedTensor index_k;                        ///< ragged or paged
  GuardedTensor index_k_codes, index_k_scales;  ///< of index_k, where spec.index_codes
  GuardedTensor k_scale, v_scale;               ///< f32 [num_kv_heads], as spec.fp8 says
  GuardedTensor block_scores;                   ///< What no selection may read is +inf.
  GuardedTensor block_ids;
  GuardedTensor dout;
  GuardedTensor out, lse;  ///< The reference's; made when SparseAttentionBackward is asked for.
  GuardedTensor dense_out, dense_lse;       ///< The same for warm_up.
  GuardedTensor new_k, new_v, new_index_k;  ///< [total_q, ...], for both appends
  GuardedTensor new_q, new_index_q;         ///< [total_q, ...], for NormRopeAppendKv, as the rest
  GuardedTensor q_weight, k_weight;         ///< [head_dim], the second f32
  GuardedTensor index_q_weight, index_k_weight;  ///< [index_dim], the first f32
  GuardedTensor cos_sin;     ///< f32 [longest sequence or a little less, rotary_dim], unless a dim
                             ///< is 1
  GuardedTensor positions;   ///< i32 [total_q], a few beyond cos_sin; only for odd seeds
  bool warm_up = false;      ///< Backward operations get no block_ids.
  bool teacher_lse = false;  ///< IndexerKlBackward gets lse; with warm_up the other way round. Some
                             ///< seeds start with true.
  std::int64_t total_q = 0;
  std::int64_t total_k = 0;     ///< Of ragged keys.
  std::int64_t num_blocks = 0;  ///< Columns of block_scores.

 private:
  void make_batch();
  void make_keys();
  void make_scales();
  TensorView of_all_heads(const GuardedTensor& scales) const;
  void make_index_codes();
  void make_queries();
  void make_norm_rope();
  void plant_special_values();
  void make_largest_values();
  void make_block_scores();
  void make_block_ids();
  template <class Forward>
  void make_forward_results(GuardedTensor& out_tensor, GuardedTensor& lse_tensor);
  /// Too large for the reference: the CPU backend makes scores and ids, and there is no dout.
  bool is_large() const;
  GuardedTensor filled(DType dtype, const std::vector<std::int64_t>& shape, double scale = 1.0);
  DType key_dtype() const { return spec.fp8 == Fp8::none ? spec.dtype : DType::e4m3; }
  /// Elements behind each row: as many bytes in 8 bits an element as in 16.
  int gap_of(DType dtype) const { return size_of(dtype) == 1 ? 2 * spec.row_gap : spec.row_gap; }
  GuardedTensor keys_tensor(std::int64_t heads, std::int64_t dim, double scale);
  double coarse_scale() const;
  double value(double scale);
  template <class Visit>
  void for_each_tensor(Visit visit);

  std::mt19937 random_;
  std::int64_t num_pages_ = 0;
};

template <>
IndexerScores Inputs::args();
template <>
SelectTopK Inputs::args();
template <>
Indexer Inputs::args();
template <>
SparseAttentionForward Inputs::args();
template <>
IndexedAttentionForward Inputs::args();
template <>
DenseAttentionForward Inputs::args();
template <>
SparseAttentionBackward Inputs::args();
template <>
IndexerKlBackward Inputs::args();
template <>
AppendKv Inputs::args();
template <>
NormRopeAppendKv Inputs::args();

/// Guarded output tensors for one run. Dtypes: floats as the case; block_scores and lse f32, or f64
/// where the case is f64; `wide` makes all floats f64, to hold what the reference computes. Pages
/// have the dtype of their contents, and index_q_out theirs.
class Outputs {
 public:
  /// Gives `args` its outputs. Both appends get copies of the pages.
  template <class Args>
  Outputs(const Inputs& inputs, Args& args, bool wide = false);

  /// "" or which guard band was written to.
  std::string damaged() const;
  /// "" or the first difference in any byte.
  std::string difference(const Outputs& other) const;
  /// The whole memory of every tensor.
  std::vector<std::span<std::byte>> buffers() const;
  /// Gives every NaN among the elements the same bits.
  void unify_nans();

 private:
  struct Named {
    const char* name;
    GuardedTensor tensor;
  };
  std::deque<Named> tensors_;
};

}  // namespace msa::testing
