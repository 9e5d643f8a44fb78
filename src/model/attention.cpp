// SPDX-License-Identifier: Apache-2.0
#include "model/attention.hpp"

#include <algorithm>

#include "core/check.hpp"

namespace msa::model {
namespace {

std::size_t size(std::int64_t count) { return static_cast<std::size_t>(count); }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

Attention::Attention(const Config& config, const Weights& weights, std::int64_t max_context,
                     std::int64_t max_tokens, AttentionMode mode, DType cache_dtype)
    : problem_(config.attention),
      eps_(config.rms_norm_eps),
      mode_(mode),
      kinds_(config.attention_kinds),
      cache_(config, max_context, cache_dtype, mode == AttentionMode::msa),
      rope_(config.rotary_dim, config.rope_theta) {
  const Problem& p = problem_;
  bool any_sparse = false;
  for (std::int64_t layer = 0; layer < config.num_layers; ++layer) {
    const LayerWeights& w = weights.layers[size(layer)];
    Norms& norms = norms_.emplace_back();
    norms.q = norm_scale(w.q_norm);
    norms.k = norm_scale(w.k_norm);
    if (!is_sparse(layer)) continue;
    any_sparse = true;
    norms.index_q = norm_scale(w.index_q_norm);
    norms.index_k = norm_scale(w.index_k_norm);
  }
  q_.resize(size(max_tokens * p.num_q_heads * p.head_dim));
  k_.resize(size(max_tokens * p.num_kv_heads * p.head_dim));
  v_.resize(k_.size());
  out_.resize(q_.size());
  if (!any_sparse) return;
  index_q_.resize(size(max_tokens * p.num_kv_heads * p.index_dim));
  index_k_.resize(size(max_tokens * p.index_dim));
  block_ids_.resize(size(max_tokens * p.num_kv_heads * p.top_k));
  const std::int64_t row_bytes = 4 * p.num_kv_heads * ceil_div(max_context, p.block_size);
  scores_ =
      core::HostBuffer(size(std::min(max_tokens * row_bytes, std::max(kMaxScoreBytes, row_bytes))));
}

bool Attention::is_sparse(std::int64_t layer) const {
  return mode_ == AttentionMode::msa && kinds_[size(layer)] == AttentionKind::sparse;
}

std::int64_t Attention::chunk_limit(std::int64_t first_position, std::int64_t wanted) const {
  if (scores_.size() == 0) return wanted;
  const std::int64_t row_bytes =
      4 * problem_.num_kv_heads * ceil_div(first_position + wanted, problem_.block_size);
  const std::int64_t rows = static_cast<std::int64_t>(scores_.size()) / row_bytes;
  return std::clamp<std::int64_t>(rows, 1, wanted);
}

TensorView Attention::rows(std::vector<float>& buffer, std::int64_t heads, std::int64_t dim) const {
  return TensorView::contiguous(buffer.data(), DType::f32, {}, {tokens_, heads, dim});
}

core::HostBuffer& Attention::workspace(std::size_t bytes) {
  if (workspace_.size() < bytes) {
    workspace_ = {};
    workspace_ = core::HostBuffer(bytes);
  }
  return workspace_;
}

AppendKv Attention::append_args(std::int64_t layer) {
  const Problem& p = problem_;
  AppendKv args{.problem = p,
                .batch = batch_,
                .k = rows(k_, p.num_kv_heads, p.head_dim),
                .v = rows(v_, p.num_kv_heads, p.head_dim),
                .k_pages = cache_.k_pages(layer),
                .v_pages = cache_.v_pages(layer)};
  if (is_sparse(layer)) {
    args.index_k = rows(index_k_, 1, p.index_dim);
    args.index_k_pages = cache_.index_k_pages(layer);
  }
  return args;
}

IndexerScores Attention::score_args(std::int64_t layer) {
  return {
      .problem = problem_,
      .batch = batch_,
      .index_q = rows(index_q_, problem_.num_kv_heads, problem_.index_dim),
      .index_k = cache_.index_k_pages(layer),
      .block_scores = TensorView::contiguous(
          scores_.data(), DType::f32, {}, {problem_.num_kv_heads, tokens_, cache_.num_blocks()})};
}

SelectTopK Attention::select_args() {
  // The selection reads no pages: lengths alone.
  Batch batch = batch_;
  batch.page_table = {};
  return {
      .problem = problem_,
      .batch = batch,
      .block_scores = TensorView::contiguous(scores_.data(), DType::f32, {},
                                             {problem_.num_kv_heads, tokens_, cache_.num_blocks()}),
      .block_ids = TensorView::contiguous(block_ids_.data(), DType::i32, {},
                                          {problem_.num_kv_heads, tokens_, problem_.top_k})};
}

SparseAttentionForward Attention::sparse_args(std::int64_t layer) {
  return {.problem = problem_,
          .batch = batch_,
          .q = rows(q_, problem_.num_q_heads, problem_.head_dim),
          .k = cache_.k_pages(layer),
          .v = cache_.v_pages(layer),
          .block_ids = TensorView::contiguous(block_ids_.data(), DType::i32, {},
                                              {problem_.num_kv_heads, tokens_, problem_.top_k}),
          .out = rows(out_, problem_.num_q_heads, problem_.head_dim)};
}

DenseAttentionForward Attention::dense_args(std::int64_t layer) {
  return {.problem = problem_,
          .batch = batch_,
          .q = rows(q_, problem_.num_q_heads, problem_.head_dim),
          .k = cache_.k_pages(layer),
          .v = cache_.v_pages(layer),
          .out = rows(out_, problem_.num_q_heads, problem_.head_dim)};
}

void Attention::begin_chunk(std::int64_t first_position, std::int64_t tokens) {
  first_position_ = first_position;
  tokens_ = tokens;
  cache_.set_length(first_position + tokens);
  rope_.prepare(first_position, tokens);
  batch_ = {.page_table = cache_.page_table(),
            .seq_lens_k = cache_.seq_lens_k(),
            .max_seq_len_q = tokens,
            .max_seq_len_k = cache_.length()};
  // Shapes are the same in every layer of a kind, so each kind is planned once per chunk.
  append_plan_[0].reset();
  append_plan_[1].reset();
  sparse_plan_.reset();
  dense_plan_.reset();
}

void Attention::plan_chunk(std::int64_t layer) {
  const bool sparse = is_sparse(layer);
  auto& append = append_plan_[sparse ? 1 : 0];
  if (append) return;
  append = plan(append_args(layer));
  std::size_t bytes = append->workspace_bytes();
  if (sparse) {
    score_plan_ = plan(score_args(layer));
    select_plan_ = plan(select_args());
    sparse_plan_ = plan(sparse_args(layer));
    bytes = std::max({bytes, score_plan_->workspace_bytes(), select_plan_->workspace_bytes(),
                      sparse_plan_->workspace_bytes()});
  } else {
    dense_plan_ = plan(dense_args(layer));
    bytes = std::max(bytes, dense_plan_->workspace_bytes());
  }
  workspace(bytes);
}

void Attention::attend_sparse(std::int64_t layer, PhaseTimes& times) {
  {
    const Stopwatch watch(times.indexer);
    score_plan_->run(score_args(layer), workspace_.span());
  }
  const SelectTopK select = select_args();
  {
    const Stopwatch watch(times.selection);
    select_plan_->run(select, workspace_.span());
  }
  {
    const Stopwatch watch(times.attention);
    sparse_plan_->run(sparse_args(layer), workspace_.span());
  }
  if (selection_hook_) selection_hook_(layer, first_position_, select.block_ids);
}

void Attention::attend_dense(std::int64_t layer, PhaseTimes& times) {
  const Stopwatch watch(times.attention);
  dense_plan_->run(dense_args(layer), workspace_.span());
}

void Attention::run(std::int64_t layer, const LayerWeights& weights, std::span<const float> x,
                    std::span<float> out, LinearScratch& scratch, PhaseTimes& times) {
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
  if (is_sparse(layer)) {
    norm_and_rotate(index_q_, tokens_, p.num_kv_heads, norms.index_q, eps_, rope_);
    norm_and_rotate(index_k_, tokens_, 1, norms.index_k, eps_, rope_);
  }
  plan_chunk(layer);
  append_plan_[is_sparse(layer) ? 1 : 0]->run(append_args(layer), workspace_.span());
  if (is_sparse(layer)) {
    attend_sparse(layer, times);
  } else {
    attend_dense(layer, times);
  }
  linear(weights.o_proj, out_, tokens_, out, scratch);
}

}  // namespace msa::model
