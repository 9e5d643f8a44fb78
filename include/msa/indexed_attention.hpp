// SPDX-License-Identifier: Apache-2.0
//
// A whole decode step as one operation, under the conventions of ops.hpp.
#pragma once

#include "msa/ops.hpp"

namespace msa {

/// Indexer, and then SparseAttentionForward on the blocks that it selects. A backend may do both in
/// one launch, which counts where a step is short; selection and attention are those of the two
/// operations.
struct IndexedAttentionForward {
  Problem problem{};
  Batch batch{};
  TensorView index_q{};         ///< As in Indexer, and the next three.
  TensorView index_k{};         ///< As many pages or tokens as k.
  TensorView index_k_codes{};   ///< Optional.
  TensorView index_k_scales{};  ///< With index_k_codes.
  TensorView q{};               ///< As in SparseAttentionForward, and the next two.
  TensorView k{};
  TensorView v{};
  float softmax_scale = 0.0f;  ///< 0 means 1 / sqrt(head_dim).
  TensorView block_ids{};      ///< Written: i32 [num_kv_heads, total_q, top_k], ascending, then -1.
  TensorView out{};            ///< [total_q, num_q_heads, head_dim]; must not overlap an input.
  TensorView lse{};            ///< f32 [total_q, num_q_heads]; optional.
  TensorView k_scale{};        ///< As in SparseAttentionForward.
  TensorView v_scale{};        ///< As in SparseAttentionForward.
};

[[nodiscard]] MSA_API Plan<IndexedAttentionForward> plan(const IndexedAttentionForward&,
                                                         const Options& = {});

}  // namespace msa
