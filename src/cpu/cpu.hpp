// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "core/implementation.hpp"

namespace msa::cpu {

/// The SIMD target in use, for example "AVX3". Throws Error(invalid_argument) where MSA_CPU_TARGET
/// names none of the compiled targets.
const char* simd_target();

/// Targets that are compiled in and that this CPU has, best first.
std::vector<const char*> simd_targets();

/// Uses exactly this target from now on; null: the best again. For tests; not during a run.
void use_simd_target(const char* name);

/// y[i] = 2^x[i] for x <= 0 as the attention kernels compute it, for tests.
void exp2_nonpositive(const float* x, float* y, std::int64_t count);

extern const detail::Implementation<IndexerScores> kIndexerScores;
extern const detail::Implementation<SelectTopK> kSelectTopK;
extern const detail::Implementation<Indexer> kIndexer;
extern const detail::Implementation<SparseAttentionForward> kSparseAttentionForward;
extern const detail::Implementation<DenseAttentionForward> kDenseAttentionForward;
extern const detail::Implementation<SparseAttentionBackward> kSparseAttentionBackward;
extern const detail::Implementation<IndexerKlBackward> kIndexerKlBackward;
extern const detail::Implementation<AppendKv> kAppendKv;
extern const detail::Implementation<NormRopeAppendKv> kNormRopeAppendKv;

}  // namespace msa::cpu
