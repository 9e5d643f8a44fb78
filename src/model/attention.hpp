// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "core/tensor.hpp"
#include "model/cache.hpp"
#include "model/config.hpp"
#include "model/layers.hpp"
#include "model/linear.hpp"
#include "model/timing.hpp"
#include "model/weights.hpp"
#include "model/working_memory.hpp"
#include "msa/ops.hpp"

namespace msa::model {

/// `dense`: every layer attends all of its context, for comparison.
enum class AttentionMode : std::uint8_t { msa, dense };

/// Sees the blocks that a sparse layer chose for a chunk, the first of whose tokens stands at
/// `first_position`: block_ids is i32 [num_kv_heads, tokens, top_k], valid during the call.
using SelectionHook = std::function<void(std::int64_t layer, std::int64_t first_position,
                                         const TensorView& block_ids)>;

/// The tensors of one chunk in one layer; null pointers where only shapes matter.
struct ChunkTensors {
  Problem problem{};
  Batch batch{};
  bool sparse = false;
  TensorView q{};              // f32 [tokens, num_q_heads, head_dim]
  TensorView k{};              // f32 [tokens, num_kv_heads, head_dim]
  TensorView v{};              // like k
  TensorView out{};            // like q
  TensorView k_pages{};        // [pages, num_kv_heads, block_size, head_dim]
  TensorView v_pages{};        // like k_pages
  TensorView index_q{};        // f32 [tokens, num_kv_heads, index_dim]; from here on sparse only
  TensorView index_k{};        // f32 [tokens, 1, index_dim]
  TensorView index_k_pages{};  // [pages, 1, block_size, index_dim]
  TensorView scores{};         // f32 [num_kv_heads, tokens, blocks]
  TensorView block_ids{};      // i32 [num_kv_heads, tokens, top_k]

  AppendKv append() const;
  IndexerScores score() const;
  SelectTopK select() const;
  SparseAttentionForward attend_sparse() const;
  DenseAttentionForward attend_dense() const;
};

struct AttentionOptions {
  std::int64_t max_context = 0;  ///< tokens
  std::int64_t max_tokens = 0;   ///< of a chunk
  AttentionMode mode = AttentionMode::msa;
  DType cache_dtype = DType::bf16;
  /// Bytes of block scores held at a time, unless one token's need more: longer contexts get
  /// shorter chunks.
  std::int64_t max_score_bytes = std::int64_t{64} << 20;
};

/// The attention half of the decoder layers: projections, norms, rotation, cache, attention itself.
/// Its memory is bounded by max_tokens and max_score_bytes, however long the context is.
class Attention {
 public:
  Attention(const Config& config, const Weights& weights, const AttentionOptions& options);

  /// What the constructor allocates beside the cache's pages; no call after it allocates more.
  static WorkingMemory memory(const Config& config, const AttentionOptions& options);

  /// Workspace of the operations for a chunk of `tokens` tokens that ends a context of `context`.
  static std::int64_t chunk_workspace(const Config& config, const AttentionOptions& options,
                                      std::int64_t context, std::int64_t tokens);

  /// Tokens that the next chunk may have when it starts at `first_position`, at most `wanted`.
  std::int64_t chunk_limit(std::int64_t first_position, std::int64_t wanted) const;

  /// Makes the cache, the rotations and the plans ready for a chunk. Not done until end_chunk().
  void begin_chunk(std::int64_t first_position, std::int64_t tokens);

  /// out [tokens, hidden] = o_proj(attention(x)), x [tokens, hidden] already normalised.
  void run(std::int64_t layer, const LayerWeights& weights, std::span<const float> x,
           std::span<float> out, LinearScratch& scratch, PhaseTimes& times);

  /// Appends random keys, values and index keys of unit variance in every layer, as the chunk that
  /// begin_chunk() announced: a long context to time, not to read.
  void fill_chunk(std::uint64_t seed);

  void set_selection_hook(SelectionHook hook) { selection_hook_ = std::move(hook); }
  const KvCache& cache() const { return cache_; }

 private:
  struct Norms {
    std::vector<float> q, k, index_q, index_k;
  };
  struct Sizes {          // elements, but for the two of bytes
    std::int64_t q = 0;   // q_, out_
    std::int64_t kv = 0;  // k_, v_
    std::int64_t index_q = 0;
    std::int64_t index_k = 0;
    std::int64_t block_ids = 0;
    std::int64_t score_bytes = 0;
    std::int64_t workspace_bytes = 0;
    std::int64_t norms = 0;  // of all layers
  };
  static Sizes sizes_of(const Config& config, const AttentionOptions& options);
  bool is_sparse(std::int64_t layer) const;
  void plan_chunk(std::int64_t layer);
  void project(std::int64_t layer, const LayerWeights& weights, std::span<const float> x,
               LinearScratch& scratch);
  void attend_sparse(const ChunkTensors& tensors, std::int64_t layer, PhaseTimes& times);
  ChunkTensors tensors_of(std::int64_t layer);

  Problem problem_{};
  double eps_ = 0.0;
  AttentionMode mode_ = AttentionMode::msa;
  std::vector<AttentionKind> kinds_;
  std::vector<Norms> norms_;
  KvCache cache_;
  std::int64_t max_context_ = 0;
  RotaryEmbedding rope_;
  SelectionHook selection_hook_;

  std::int64_t first_position_ = 0;
  std::int64_t tokens_ = 0;
  std::optional<Plan<AppendKv>> append_plan_[2];  // dense, sparse layers
  std::optional<Plan<IndexerScores>> score_plan_;
  std::optional<Plan<SelectTopK>> select_plan_;
  std::optional<Plan<SparseAttentionForward>> sparse_plan_;
  std::optional<Plan<DenseAttentionForward>> dense_plan_;

  std::vector<float> q_;                 // [tokens, num_q_heads, head_dim]
  std::vector<float> k_;                 // [tokens, num_kv_heads, head_dim]
  std::vector<float> v_;                 // like k
  std::vector<float> index_q_;           // [tokens, num_kv_heads, index_dim]
  std::vector<float> index_k_;           // [tokens, 1, index_dim]
  std::vector<float> out_;               // like q
  core::HostBuffer scores_;              // f32 [num_kv_heads, tokens, blocks]
  std::vector<std::int32_t> block_ids_;  // [num_kv_heads, tokens, top_k]
  core::HostBuffer workspace_;
};

}  // namespace msa::model
