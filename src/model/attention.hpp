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
#include "msa/ops.hpp"

namespace msa::model {

/// `dense`: every layer attends all of its context, for comparison.
enum class AttentionMode : std::uint8_t { msa, dense };

/// Sees the blocks that a sparse layer chose for a chunk, the first of whose tokens stands at
/// `first_position`: block_ids is i32 [num_kv_heads, tokens, top_k], valid during the call.
using SelectionHook = std::function<void(std::int64_t layer, std::int64_t first_position,
                                         const TensorView& block_ids)>;

/// The attention half of the decoder layers: projections, norms, rotation, cache, attention itself.
/// Its memory is bounded by the chunk and kMaxScoreBytes, however long the context is.
class Attention {
 public:
  /// Block scores held at a time; longer contexts get shorter chunks.
  static constexpr std::int64_t kMaxScoreBytes = std::int64_t{64} << 20;

  Attention(const Config& config, const Weights& weights, std::int64_t max_context,
            std::int64_t max_tokens, AttentionMode mode, DType cache_dtype);

  /// Tokens that the next chunk may have when it starts at `first_position`, at most `wanted`.
  std::int64_t chunk_limit(std::int64_t first_position, std::int64_t wanted) const;

  /// Makes the cache, the rotations and the plans ready for a chunk. Not done until end_chunk().
  void begin_chunk(std::int64_t first_position, std::int64_t tokens);

  /// out [tokens, hidden] = o_proj(attention(x)), x [tokens, hidden] already normalised.
  void run(std::int64_t layer, const LayerWeights& weights, std::span<const float> x,
           std::span<float> out, LinearScratch& scratch, PhaseTimes& times);

  void set_selection_hook(SelectionHook hook) { selection_hook_ = std::move(hook); }
  const KvCache& cache() const { return cache_; }

 private:
  struct Norms {
    std::vector<float> q, k, index_q, index_k;
  };
  bool is_sparse(std::int64_t layer) const;
  TensorView rows(std::vector<float>& buffer, std::int64_t heads, std::int64_t dim) const;
  core::HostBuffer& workspace(std::size_t bytes);
  void plan_chunk(std::int64_t layer);
  void append(std::int64_t layer);
  void attend_sparse(std::int64_t layer, PhaseTimes& times);
  void attend_dense(std::int64_t layer, PhaseTimes& times);
  AppendKv append_args(std::int64_t layer);
  IndexerScores score_args(std::int64_t layer);
  SelectTopK select_args();
  SparseAttentionForward sparse_args(std::int64_t layer);
  DenseAttentionForward dense_args(std::int64_t layer);

  Problem problem_{};
  double eps_ = 0.0;
  AttentionMode mode_ = AttentionMode::msa;
  std::vector<AttentionKind> kinds_;
  std::vector<Norms> norms_;
  KvCache cache_;
  RotaryEmbedding rope_;
  SelectionHook selection_hook_;

  std::int64_t first_position_ = 0;
  std::int64_t tokens_ = 0;
  Batch batch_{};
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
