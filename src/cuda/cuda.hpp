// SPDX-License-Identifier: Apache-2.0
//
// The rows of the CUDA backends, for dispatch/lists.cpp.
#pragma once

#include "core/implementation.hpp"

namespace msa::cuda::sm90 {
extern const msa::detail::Implementation<IndexerScores> kIndexerScores;
extern const msa::detail::Implementation<Indexer> kIndexerDecodeScreened;
extern const msa::detail::Implementation<Indexer> kIndexerDecode;
extern const msa::detail::Implementation<Indexer> kIndexer;
extern const msa::detail::Implementation<SparseAttentionForward> kSparseAttentionDecode;
extern const msa::detail::Implementation<SparseAttentionForward> kSparseAttentionForward;
extern const msa::detail::Implementation<SparseAttentionForward> kSparseAttentionForwardKvOuter;
extern const msa::detail::Implementation<SparseAttentionBackward> kSparseAttentionBackward;
extern const msa::detail::Implementation<IndexerKlBackward> kIndexerKlBackward;
extern const msa::detail::Implementation<IndexerKlBackward> kIndexerKlBackwardKeyRows;
}  // namespace msa::cuda::sm90
namespace msa::cuda::generic {
extern const msa::detail::Implementation<IndexerScores> kIndexerScores;
extern const msa::detail::Implementation<SelectTopK> kSelectTopK;
extern const msa::detail::Implementation<Indexer> kIndexer;
extern const msa::detail::Implementation<SparseAttentionForward> kSparseAttentionForward;
extern const msa::detail::Implementation<DenseAttentionForward> kDenseAttentionForward;
extern const msa::detail::Implementation<SparseAttentionBackward> kSparseAttentionBackward;
extern const msa::detail::Implementation<IndexerKlBackward> kIndexerKlBackward;
extern const msa::detail::Implementation<AppendKv> kAppendKv;
extern const msa::detail::Implementation<NormRopeAppendKv> kNormRopeAppendKv;
}  // namespace msa::cuda::generic
