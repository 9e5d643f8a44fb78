// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace msa::model {

/// Memory of a model beside weights and caches, in bytes by purpose.
struct WorkingMemory {
  std::int64_t activations = 0;       ///< of one chunk: residual stream, projections, MLP, logits
  std::int64_t block_scores = 0;      ///< the only part that grows with the context; bounded
  std::int64_t expanded_weights = 0;  ///< bands of bf16 and f16 matrices as f32, one per thread
  std::int64_t workspaces = 0;        ///< of the library's operations
  std::int64_t tables = 0;            ///< norms, rotations, page ids

  std::int64_t total() const {
    return activations + block_scores + expanded_weights + workspaces + tables;
  }
};

}  // namespace msa::model
