// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/implementation.hpp"

namespace msa::cpu {

/// The SIMD target in use, for example "AVX3".
const char* simd_target();

extern const detail::Implementation<IndexerScores> kIndexerScores;
extern const detail::Implementation<SelectTopK> kSelectTopK;
extern const detail::Implementation<Indexer> kIndexer;
extern const detail::Implementation<SparseAttentionForward> kSparseAttentionForward;
extern const detail::Implementation<DenseAttentionForward> kDenseAttentionForward;
extern const detail::Implementation<AppendKv> kAppendKv;

}  // namespace msa::cpu
