// SPDX-License-Identifier: Apache-2.0
#include "model/memory.hpp"

#include <algorithm>

namespace msa::model {

std::int64_t MemoryPlan::cache_total() const {
  std::int64_t total = 0;
  for (const CacheMemory& cache : caches) total += cache.k + cache.v + cache.index_k;
  return total;
}

MemoryPlan plan_memory(const Config& config, const Weights& weights,
                       const RuntimeOptions& options) {
  const AttentionOptions resolved = Transformer::resolve(config, weights, options);
  const Problem& p = config.attention;
  MemoryPlan plan{.max_context = resolved.max_context,
                  .chunk_tokens = resolved.max_tokens,
                  .cache_dtype = resolved.cache_dtype,
                  .weights = weights.num_bytes,
                  .working = Transformer::memory(config, weights, resolved)};
  const std::int64_t pages = (resolved.max_context + p.block_size - 1) / p.block_size;
  for (const AttentionKind kind : {AttentionKind::dense, AttentionKind::sparse}) {
    const std::int64_t num_layers =
        std::count(config.attention_kinds.begin(), config.attention_kinds.end(), kind);
    if (num_layers == 0) continue;
    const std::int64_t tokens = num_layers * pages * p.block_size;
    const auto element = static_cast<std::int64_t>(size_of(resolved.cache_dtype));
    const std::int64_t kv = tokens * p.num_kv_heads * p.head_dim * element;
    const bool indexed = kind == AttentionKind::sparse && resolved.mode == AttentionMode::msa;
    plan.caches.push_back({.kind = kind,
                           .num_layers = num_layers,
                           .k = kv,
                           .v = kv,
                           .index_k = indexed ? tokens * p.index_dim * element : 0});
  }
  return plan;
}

}  // namespace msa::model
