// SPDX-License-Identifier: Apache-2.0
//
// What a model needs in memory for a given context, known before anything is allocated or read:
// the runtime's own parts give their sizes and then allocate exactly these. docs/model.md has the
// formula.
#pragma once

#include <cstdint>
#include <vector>

#include "model/config.hpp"
#include "model/transformer.hpp"
#include "model/weights.hpp"

namespace msa::model {

/// Caches of all layers of one kind at the full context, in bytes.
struct CacheMemory {
  AttentionKind kind = AttentionKind::dense;
  std::int64_t num_layers = 0;
  std::int64_t k = 0;
  std::int64_t v = 0;
  std::int64_t index_k = 0;  ///< 0 where every layer runs dense
};

struct MemoryPlan {
  std::int64_t max_context = 0;   ///< tokens
  std::int64_t chunk_tokens = 0;  ///< tokens that pass through the layers together, at most
  DType cache_dtype = DType::bf16;
  std::int64_t weights = 0;  ///< bytes; mapped from the checkpoint's files, read as they are used
  std::vector<CacheMemory> caches{};  ///< the kinds that the model has
  WorkingMemory working{};            ///< of one forward call with logits for one token

  std::int64_t cache_total() const;
};

/// Throws Error(invalid_argument) as the Transformer's constructor does. The threads of the CPU
/// backend count as they are now.
MemoryPlan plan_memory(const Config& config, const Weights& weights, const RuntimeOptions& options);

}  // namespace msa::model
