// SPDX-License-Identifier: Apache-2.0
#include "model/attention.hpp"

#include <algorithm>

#include "core/check.hpp"

namespace msa::model {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// The shapes of a chunk of `tokens` tokens that ends a context of `context` tokens, without data.
ChunkTensors shapes_of(const Problem& p, DType cache_dtype, std::int64_t max_context,
                       std::int64_t context, std::int64_t tokens, bool sparse) {
  const auto f32 = [](std::initializer_list<std::int64_t> shape) {
    return TensorView::contiguous(nullptr, DType::f32, {}, shape);
  };
  const auto i32 = [](std::initializer_list<std::int64_t> shape) {
    return TensorView::contiguous(nullptr, DType::i32, {}, shape);
  };
  const auto pages = [&](std::int64_t heads, std::int64_t dim) {
    return TensorView::contiguous(nullptr, cache_dtype, {},
                                  {ceil_div(max_context, p.block_size), heads, p.block_size, dim});
  };
  const std::int64_t blocks = ceil_div(context, p.block_size);
  ChunkTensors t;
  t.problem = p;
  t.batch = {.page_table = i32({1, blocks}),
             .seq_lens_k = i32({1}),
             .max_seq_len_q = tokens,
             .max_seq_len_k = context};
  t.sparse = sparse;
  t.q = t.out = f32({tokens, p.num_q_heads, p.head_dim});
  t.k = t.v = f32({tokens, p.num_kv_heads, p.head_dim});
  t.k_pages = t.v_pages = pages(p.num_kv_heads, p.head_dim);
  if (!sparse) return t;
  t.index_q = f32({tokens, p.num_kv_heads, p.index_dim});
  t.index_k = f32({tokens, 1, p.index_dim});
  t.index_k_pages = pages(1, p.index_dim);
  t.scores = f32({p.num_kv_heads, tokens, blocks});
  t.block_ids = i32({p.num_kv_heads, tokens, p.top_k});
  return t;
}

std::int64_t workspace_of(const ChunkTensors& t) {
  std::size_t bytes = plan(t.append()).workspace_bytes();
  if (t.sparse) {
    bytes = std::max({bytes, plan(t.score()).workspace_bytes(), plan(t.select()).workspace_bytes(),
                      plan(t.attend_sparse()).workspace_bytes()});
  } else {
    bytes = std::max(bytes, plan(t.attend_dense()).workspace_bytes());
  }
  return static_cast<std::int64_t>(bytes);
}

/// Layers that attend sparsely, or those that do not.
std::int64_t num_layers_of(const Config& config, const AttentionOptions& options, bool sparse) {
  const std::int64_t num_sparse =
      options.mode == AttentionMode::dense
          ? 0
          : std::count(config.attention_kinds.begin(), config.attention_kinds.end(),
                       AttentionKind::sparse);
  return sparse ? num_sparse : config.num_layers - num_sparse;
}

/// Bytes of block scores of one token at the end of `context` tokens.
std::int64_t score_row_bytes(const Problem& p, std::int64_t context) {
  return static_cast<std::int64_t>(sizeof(float)) * p.num_kv_heads *
         ceil_div(context, p.block_size);
}

/// xorshift64*: the quality of the numbers matters little, their number a lot.
class FastUniform {
 public:
  explicit FastUniform(std::uint64_t seed) : state_(seed * 2 + 1) {}

  /// Uniform with mean 0 and variance 1.
  void fill(std::span<float> values) {
    constexpr float kHalfWidth = 1.7320508f;  // sqrt(3)
    for (float& value : values) {
      state_ ^= state_ >> 12;
      state_ ^= state_ << 25;
      state_ ^= state_ >> 27;
      const auto bits = static_cast<std::int32_t>(state_ * 0x2545F4914F6CDD1DULL >> 32);
      value = static_cast<float>(bits) * (kHalfWidth * 0x1p-31f);
    }
  }

 private:
  std::uint64_t state_;
};

}  // namespace

AppendKv ChunkTensors::append() const {
  return {.problem = problem,
          .batch = batch,
          .k = k,
          .v = v,
          .index_k = index_k,
          .k_pages = k_pages,
          .v_pages = v_pages,
          .index_k_pages = index_k_pages};
}

IndexerScores ChunkTensors::score() const {
  return {.problem = problem,
          .batch = batch,
          .index_q = index_q,
          .index_k = index_k_pages,
          .block_scores = scores};
}

SelectTopK ChunkTensors::select() const {
  // The selection reads no pages: lengths alone.
  Batch lengths = batch;
  lengths.page_table = {};
  return {.problem = problem, .batch = lengths, .block_scores = scores, .block_ids = block_ids};
}

SparseAttentionForward ChunkTensors::attend_sparse() const {
  return {.problem = problem,
          .batch = batch,
          .q = q,
          .k = k_pages,
          .v = v_pages,
          .block_ids = block_ids,
          .out = out};
}

DenseAttentionForward ChunkTensors::attend_dense() const {
  return {.problem = problem, .batch = batch, .q = q, .k = k_pages, .v = v_pages, .out = out};
}

std::int64_t Attention::chunk_workspace(const Config& config, const AttentionOptions& options,
                                        std::int64_t context, std::int64_t tokens) {
  std::int64_t bytes = 0;
  for (const bool sparse : {false, true}) {
    if (num_layers_of(config, options, sparse) == 0) continue;
    bytes = std::max(bytes, workspace_of(shapes_of(config.attention, options.cache_dtype,
                                                   options.max_context, context, tokens, sparse)));
  }
  return bytes;
}

Attention::Sizes Attention::sizes_of(const Config& config, const AttentionOptions& options) {
  const Problem& p = config.attention;
  const std::int64_t tokens = options.max_tokens;
  const std::int64_t context = options.max_context;
  const std::int64_t num_sparse = num_layers_of(config, options, true);
  Sizes sizes;
  sizes.q = tokens * p.num_q_heads * p.head_dim;
  sizes.kv = tokens * p.num_kv_heads * p.head_dim;
  sizes.norms = 2 * (config.num_layers * p.head_dim + num_sparse * p.index_dim);
  if (num_sparse > 0) {
    sizes.index_q = tokens * p.num_kv_heads * p.index_dim;
    sizes.index_k = tokens * p.index_dim;
    sizes.block_ids = tokens * p.num_kv_heads * p.top_k;
    const std::int64_t row = score_row_bytes(p, context);
    sizes.score_bytes = std::min(tokens * row, std::max(options.max_score_bytes, row));
  }
  // An operation may divide its work by the number of tokens or of blocks, so several of each are
  // planned; tests/model/memory_test.cpp holds all others against their largest.
  const auto consider = [&](std::int64_t end, std::int64_t count) {
    sizes.workspace_bytes =
        std::max(sizes.workspace_bytes, chunk_workspace(config, options, end, count));
  };
  for (std::int64_t count = 1; count < tokens; count *= 2) consider(context, count);
  consider(context, tokens);
  consider(tokens, tokens);
  return sizes;
}

WorkingMemory Attention::memory(const Config& config, const AttentionOptions& options) {
  constexpr auto kFloat = static_cast<std::int64_t>(sizeof(float));
  const Sizes sizes = sizes_of(config, options);
  WorkingMemory memory;
  memory.activations = kFloat * (2 * sizes.q + 2 * sizes.kv + sizes.index_q + sizes.index_k) +
                       static_cast<std::int64_t>(sizeof(std::int32_t)) * sizes.block_ids;
  memory.block_scores = sizes.score_bytes;
  memory.workspaces = sizes.workspace_bytes;
  memory.tables = kFloat * sizes.norms +
                  RotaryEmbedding::bytes(config.rotary_dim, options.max_tokens) +
                  KvCache::table_bytes(config, options.max_context);
  return memory;
}

Attention::Attention(const Config& config, const Weights& weights, const AttentionOptions& options)
    : problem_(config.attention),
      eps_(config.rms_norm_eps),
      mode_(options.mode),
      kinds_(config.attention_kinds),
      cache_(config, options.max_context, options.cache_dtype, options.mode == AttentionMode::msa),
      max_context_(options.max_context),
      rope_(config.rotary_dim, config.rope_theta, options.max_tokens) {
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    const LayerWeights& w = weights.layers[size(layer)];
    Norms& norms = norms_.emplace_back();
    norms.q = norm_scale(w.q_norm);
    norms.k = norm_scale(w.k_norm);
    if (!is_sparse(layer)) continue;
    norms.index_q = norm_scale(w.index_q_norm);
    norms.index_k = norm_scale(w.index_k_norm);
  }
  const Sizes sizes = sizes_of(config, options);
  q_.resize(size(sizes.q));
  k_.resize(size(sizes.kv));
  v_.resize(size(sizes.kv));
  out_.resize(size(sizes.q));
  index_q_.resize(size(sizes.index_q));
  index_k_.resize(size(sizes.index_k));
  block_ids_.resize(size(sizes.block_ids));
  if (sizes.score_bytes > 0) scores_ = core::HostBuffer(size(sizes.score_bytes));
  workspace_ = core::HostBuffer(size(sizes.workspace_bytes));
}

bool Attention::is_sparse(std::int64_t layer) const {
  return mode_ == AttentionMode::msa && kinds_[size(layer)] == AttentionKind::sparse;
}

std::int64_t Attention::chunk_limit(std::int64_t first_position, std::int64_t wanted) const {
  if (scores_.size() == 0) return wanted;
  const std::int64_t rows = static_cast<std::int64_t>(scores_.size()) /
                            score_row_bytes(problem_, first_position + wanted);
  return std::clamp<std::int64_t>(rows, 1, wanted);
}

ChunkTensors Attention::tensors_of(std::int64_t layer) {
  ChunkTensors t = shapes_of(problem_, cache_.dtype(), max_context_, first_position_ + tokens_,
                             tokens_, is_sparse(layer));
  t.batch.page_table = cache_.page_table();
  t.batch.seq_lens_k = cache_.seq_lens_k();
  t.q.data = q_.data();
  t.k.data = k_.data();
  t.v.data = v_.data();
  t.out.data = out_.data();
  t.k_pages = cache_.k_pages(layer);
  t.v_pages = cache_.v_pages(layer);
  if (!t.sparse) return t;
  t.index_q.data = index_q_.data();
  t.index_k.data = index_k_.data();
  t.index_k_pages = cache_.index_k_pages(layer);
  t.scores.data = scores_.data();
  t.block_ids.data = block_ids_.data();
  return t;
}

void Attention::begin_chunk(std::int64_t first_position, std::int64_t tokens) {
  first_position_ = first_position;
  tokens_ = tokens;
  cache_.set_length(first_position + tokens);
  rope_.prepare(first_position, tokens);
  // Shapes are the same in every layer of a kind, so each kind is planned once per chunk.
  append_plan_[0].reset();
  append_plan_[1].reset();
  sparse_plan_.reset();
  dense_plan_.reset();
}

void Attention::plan_chunk(std::int64_t layer) {
  auto& append = append_plan_[is_sparse(layer) ? 1 : 0];
  if (append) return;
  const ChunkTensors t = tensors_of(layer);
  append = plan(t.append());
  std::size_t bytes = append->workspace_bytes();
  if (t.sparse) {
    score_plan_ = plan(t.score());
    select_plan_ = plan(t.select());
    sparse_plan_ = plan(t.attend_sparse());
    bytes = std::max({bytes, score_plan_->workspace_bytes(), select_plan_->workspace_bytes(),
                      sparse_plan_->workspace_bytes()});
  } else {
    dense_plan_ = plan(t.attend_dense());
    bytes = std::max(bytes, dense_plan_->workspace_bytes());
  }
  // Only where there are more threads now than when the model was made.
  if (bytes > workspace_.size()) {
    workspace_ = {};
    workspace_ = core::HostBuffer(bytes);
  }
}

void Attention::attend_sparse(const ChunkTensors& tensors, std::int64_t layer, PhaseTimes& times) {
  {
    const Stopwatch watch(times.indexer);
    score_plan_->run(tensors.score(), workspace_.span());
  }
  {
    const Stopwatch watch(times.selection);
    select_plan_->run(tensors.select(), workspace_.span());
  }
  {
    const Stopwatch watch(times.attention);
    sparse_plan_->run(tensors.attend_sparse(), workspace_.span());
  }
  if (selection_hook_) selection_hook_(layer, first_position_, tensors.block_ids);
}

void Attention::project(std::int64_t layer, const LayerWeights& weights, std::span<const float> x,
                        LinearScratch& scratch) {
  const Problem& p = problem_;
  const Norms& norms = norms_[size(layer)];
  const Product products[] = {{weights.q_proj, q_},
                              {weights.k_proj, k_},
                              {weights.v_proj, v_},
                              {weights.index_q_proj, index_q_},
                              {weights.index_k_proj, index_k_}};
  linear(std::span(products).first(is_sparse(layer) ? 5 : 3), x, tokens_, scratch);
  norm_and_rotate(q_, tokens_, p.num_q_heads, norms.q, eps_, rope_);
  norm_and_rotate(k_, tokens_, p.num_kv_heads, norms.k, eps_, rope_);
  if (!is_sparse(layer)) return;
  norm_and_rotate(index_q_, tokens_, p.num_kv_heads, norms.index_q, eps_, rope_);
  norm_and_rotate(index_k_, tokens_, 1, norms.index_k, eps_, rope_);
}

void Attention::run(std::int64_t layer, const LayerWeights& weights, std::span<const float> x,
                    std::span<float> out, LinearScratch& scratch, PhaseTimes& times) {
  project(layer, weights, x, scratch);
  plan_chunk(layer);
  const ChunkTensors tensors = tensors_of(layer);
  append_plan_[tensors.sparse ? 1 : 0]->run(tensors.append(), workspace_.span());
  if (tensors.sparse) {
    attend_sparse(tensors, layer, times);
  } else {
    const Stopwatch watch(times.attention);
    dense_plan_->run(tensors.attend_dense(), workspace_.span());
  }
  linear(weights.o_proj, out_, tokens_, out, scratch);
}

void Attention::fill_chunk(std::uint64_t seed) {
  FastUniform uniform(seed);
  for (std::int64_t layer = 0; layer < static_cast<std::int64_t>(kinds_.size()); ++layer) {
    for (std::vector<float>* buffer : {&k_, &v_, &index_k_}) uniform.fill(*buffer);
    plan_chunk(layer);
    const ChunkTensors tensors = tensors_of(layer);
    append_plan_[tensors.sparse ? 1 : 0]->run(tensors.append(), workspace_.span());
  }
}

}  // namespace msa::model
