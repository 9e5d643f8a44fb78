// SPDX-License-Identifier: Apache-2.0
//
// The executable specification: double precision, loops in the order of the paper's equations.
// Runs any valid request on host tensors. It specifies results, not costs: unlike every other
// backend its run() allocates.
#pragma once

#include "core/implementation.hpp"

namespace msa::reference {

/// Where intermediate values are rounded. `bf16` rounds where a bf16 kernel has to (the softmax
/// probabilities before they multiply V, say): its distance from `exact` is the error budget that
/// tests grant to a kernel.
enum class Rounding { exact, bf16 };

void indexer_scores(const IndexerScores&);
void select_top_k(const SelectTopK&);
void indexer(const Indexer&);
void sparse_attention_forward(const SparseAttentionForward&, Rounding = Rounding::exact);
void dense_attention_forward(const DenseAttentionForward&, Rounding = Rounding::exact);
void sparse_attention_backward(const SparseAttentionBackward&);
void indexer_kl_backward(const IndexerKlBackward&);
void append_kv(const AppendKv&);

extern const detail::Implementation<IndexerScores> kIndexerScores;
extern const detail::Implementation<SelectTopK> kSelectTopK;
extern const detail::Implementation<Indexer> kIndexer;
extern const detail::Implementation<SparseAttentionForward> kSparseAttentionForward;
extern const detail::Implementation<DenseAttentionForward> kDenseAttentionForward;
extern const detail::Implementation<SparseAttentionBackward> kSparseAttentionBackward;
extern const detail::Implementation<IndexerKlBackward> kIndexerKlBackward;
extern const detail::Implementation<AppendKv> kAppendKv;
extern const detail::Implementation<NormRopeAppendKv> kNormRopeAppendKv;

}  // namespace msa::reference
