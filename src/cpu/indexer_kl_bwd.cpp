// SPDX-License-Identifier: Apache-2.0
//
// The KL loss of the Index Branch and its gradients (paper eqs 9-11). With P the teacher, the mean
// over a group's heads of their softmax, and P_idx the student's softmax, dS_idx = P_idx - P. Two
// walks as in sparse_attention_bwd.cpp: tiles of queries over their blocks, twice (statistics of
// all softmaxes, then loss and dindex_q), and KV blocks over their queries (dindex_k, which all KV
// heads share: their parts are added head by head).
#include <cmath>
#include <limits>

#include "core/scalar.hpp"
#include "core/sequences.hpp"
#include "cpu/query_lists.hpp"
#include "cpu/support.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/indexer_kl_bwd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as Highway requires.
#include <hwy/highway.h>

#include "cpu/backward-inl.hpp"

#ifndef MSA_CPU_INDEXER_KL_BWD_ONCE
#define MSA_CPU_INDEXER_KL_BWD_ONCE
namespace msa::cpu {
namespace {

constexpr double kLog2E = 1.4426950408889634074;

/// Rows (query, query head) that are multiplied with a block at a time, if a group is not larger.
constexpr std::int64_t kMaxRows = 128;

std::int64_t queries_per_tile(const Problem& p) {
  return std::clamp<std::int64_t>(kMaxRows / p.group_size(), 1, 32);
}

/// What all workers share, in the workspace.
struct KlGradients {
  const IndexerKlBackward& args;
  const QueryLists& lists;
  float teacher_scale;        ///< of scores in base 2
  float student_scale;        ///< the same
  double weight;              ///< of each (query, KV head)
  float* teacher_maximum;     ///< [total_q][num_q_heads]
  float* teacher_reciprocal;  ///< [total_q][num_q_heads], of the sum of 2^(score - maximum)
  float* student_maximum;     ///< [total_q][num_kv_heads]
  float* student_reciprocal;  ///< [total_q][num_kv_heads]
  double* loss;               ///< [total_q][num_kv_heads], without its weight

  std::int64_t teacher(std::int64_t query, std::int64_t head) const {
    return query * args.problem.num_q_heads + head;
  }
  std::int64_t student(std::int64_t query, std::int64_t head) const {
    return query * args.problem.num_kv_heads + head;
  }
};

/// One worker's memory. `rows` are (query, head of the group), heads fastest.
struct KlScratch {
  float* q;              ///< [rows][padded head_dim], scaled
  float* index_q;        ///< [queries][padded index_dim], scaled
  float* p;              ///< [rows][block_size], the teacher's scores
  float* s;              ///< [queries][block_size], the student's scores and then dS_idx
  float* sums;           ///< [queries or tokens of a block][padded index_dim]
  float* transposed;     ///< [block_size][padded queries]
  float* k_columns;      ///< panel of depth head_dim
  float* index_columns;  ///< panel of depth index_dim
  float* rows_panel;     ///< panel of padded index_dim columns: index keys or index queries
  float* pack;
};

KlScratch lay_out(const Problem& p, core::WorkspaceLayout& layout) {
  const std::int64_t queries = queries_per_tile(p);
  const std::int64_t rows = queries * p.group_size();
  const std::int64_t padded_index = round_up(p.index_dim, kMaxLanes);
  const std::int64_t longest = std::max<std::int64_t>(queries, p.block_size);
  KlScratch scratch;
  scratch.q = layout.take<float>(rows * round_up(p.head_dim, kMaxLanes));
  scratch.index_q = layout.take<float>(queries * padded_index);
  scratch.p = layout.take<float>(rows * p.block_size);
  scratch.s = layout.take<float>(queries * p.block_size);
  scratch.sums = layout.take<float>(longest * padded_index);
  scratch.transposed = layout.take<float>(p.block_size * round_up(queries, kMaxLanes));
  scratch.k_columns = layout.take<float>(std::int64_t{p.block_size} * p.head_dim);
  scratch.index_columns = layout.take<float>(std::int64_t{p.block_size} * p.index_dim);
  scratch.rows_panel = layout.take<float>(longest * padded_index);
  scratch.pack = layout.take<float>(pack_scratch(std::max(p.head_dim, p.index_dim)));
  return scratch;
}

double scale_or_default(float scale, int dim) {
  return scale != 0.0f ? static_cast<double>(scale) : 1.0 / std::sqrt(static_cast<double>(dim));
}

KlGradients shared(const IndexerKlBackward& args, const QueryLists& lists,
                   core::WorkspaceLayout& layout) {
  const Problem& p = args.problem;
  const std::int64_t total_q = args.q.shape[0];
  const std::int64_t most = std::max<std::int64_t>(total_q, 1);
  return {
      .args = args,
      .lists = lists,
      .teacher_scale =
          static_cast<float>(scale_or_default(args.softmax_scale, p.head_dim) * kLog2E),
      .student_scale = static_cast<float>(scale_or_default(args.index_scale, p.index_dim) * kLog2E),
      .weight =
          static_cast<double>(args.loss_coefficient) / (static_cast<double>(most) * p.num_kv_heads),
      .teacher_maximum = layout.take<float>(total_q * p.num_q_heads),
      .teacher_reciprocal = layout.take<float>(total_q * p.num_q_heads),
      .student_maximum = layout.take<float>(total_q * p.num_kv_heads),
      .student_reciprocal = layout.take<float>(total_q * p.num_kv_heads),
      .loss = layout.take<double>(total_q * p.num_kv_heads)};
}

}  // namespace
}  // namespace msa::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

constexpr float kLn2 = 0.69314718055994530942f;

void pack_columns(const TensorView& keys, const core::BlockRows& rows, std::int64_t num_tokens,
                  const KlScratch& scratch, float* panel) {
  with_elements(keys, rows.offset, [&](const auto* from) {
    pack_keys(from, rows.token_stride, num_tokens, keys.shape[2], NextRows{}, scratch.pack, panel);
  });
}

/// p and s = scores of queries 0 .. count of a request, query(i) of the scratch, for tokens
/// [0, packed) of the panels.
template <class QueryIndex>
void multiply_block(const KlScratch& scratch, const Problem& p, std::int64_t count,
                    std::int64_t packed, QueryIndex query) {
  const std::int64_t group = p.group_size();
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  const std::int64_t padded_index = round_up(p.index_dim, kMaxLanes);
  const std::int64_t num_vectors = core::ceil_div(packed, lanes());
  multiply_rows(
      count * group, Panel{scratch.k_columns, p.head_dim, num_vectors}, /*add=*/false,
      [&](std::int64_t r) {
        return scratch.q + (query(r / group) * group + r % group) * padded_dim;
      },
      [&](std::int64_t r) { return scratch.p + r * p.block_size; });
  multiply_rows(
      count, Panel{scratch.index_columns, p.index_dim, num_vectors}, /*add=*/false,
      [&](std::int64_t i) { return scratch.index_q + query(i) * padded_index; },
      [&](std::int64_t i) { return scratch.s + i * p.block_size; });
}

/// Adds tokens [0, limit) to the loss of query i of the request, packed query `query`: P and the
/// student's scores are in the scratch.
double loss_of(const KlGradients& g, const float* teacher, const float* scores, std::int64_t limit,
               std::int64_t student) {
  // log P_idx = (s - maximum) ln 2 + log(reciprocal) stays finite where P_idx underflows.
  const double maximum = static_cast<double>(g.student_maximum[student]);
  const double log_reciprocal = std::log(static_cast<double>(g.student_reciprocal[student]));
  double sum = 0.0;
  for (std::int64_t t = 0; t < limit; ++t) {
    if (teacher[t] == 0.0f) continue;
    const double p = static_cast<double>(teacher[t]);
    const double log_student = (static_cast<double>(scores[t]) - maximum) / kLog2E + log_reciprocal;
    sum += p * (std::log(p) - log_student);
  }
  return sum;
}

/// s = P_idx - P for query i of the request; its loss where `add_loss`.
void finish_query(const KlGradients& g, const KlScratch& scratch, std::int64_t i,
                  std::int64_t limit, std::int64_t query, std::int64_t head, bool add_loss) {
  const FloatTag d;
  const Problem& p = g.args.problem;
  const std::int64_t group = p.group_size();
  float* const scores = scratch.s + i * p.block_size;
  float* const teacher = scratch.p + i * group * p.block_size;
  const auto share = hn::Set(d, 1.0f / static_cast<float>(group));
  for (std::int64_t t = 0; t < limit; t += lanes()) {
    auto sum = hn::Zero(d);
    for (std::int64_t h = 0; h < group; ++h) {
      const std::int64_t at = g.teacher(query, head * group + h);
      sum = hn::Add(sum, probability_of(hn::LoadU(d, teacher + h * p.block_size + t),
                                        g.teacher_maximum[at], g.teacher_reciprocal[at]));
    }
    hn::StoreU(hn::Mul(sum, share), d, teacher + t);  // all heads' scores were read
  }
  const std::int64_t student = g.student(query, head);
  if (add_loss) g.loss[student] += loss_of(g, teacher, scores, limit, student);
  for (std::int64_t t = 0; t < limit; t += lanes()) {
    const auto probability = probability_of(hn::LoadU(d, scores + t), g.student_maximum[student],
                                            g.student_reciprocal[student]);
    hn::StoreU(hn::Sub(probability, hn::LoadU(d, teacher + t)), d, scores + t);
  }
}

void load_queries(const KlGradients& g, const KlScratch& scratch, std::int64_t i,
                  std::int64_t query, std::int64_t head) {
  const Problem& p = g.args.problem;
  const std::int64_t group = p.group_size();
  for (std::int64_t h = 0; h < group; ++h) {
    load_row(g.args.q, query, head * group + h, g.teacher_scale,
             scratch.q + (i * group + h) * round_up(p.head_dim, kMaxLanes));
  }
  load_row(g.args.index_q, query, head, g.student_scale,
           scratch.index_q + i * round_up(p.index_dim, kMaxLanes));
}

void take_row(float& maximum, float& sum, const float* scores, std::int64_t limit) {
  SoftmaxRow row{maximum, sum};
  take_scores(row, scores, limit, [](std::int64_t, auto) {});
  maximum = row.maximum;
  sum = row.sum;
}

/// Statistics, loss and dindex_q of the tile's queries.
void walk_queries(const KlGradients& g, const QueryTile& tile, std::byte* memory) {
  const IndexerKlBackward& args = g.args;
  const Problem& p = args.problem;
  core::WorkspaceLayout layout(memory);
  const KlScratch scratch = lay_out(p, layout);
  const TileBlocks blocks(p, queries_per_tile(p), layout);
  const std::int64_t group = p.group_size();
  const std::int64_t padded_index = round_up(p.index_dim, kMaxLanes);
  const auto for_each_row = [&](std::int64_t query, const auto& visit) {
    for (std::int64_t h = 0; h < group; ++h) {
      const std::int64_t at = g.teacher(tile.row(query), tile.head * group + h);
      visit(g.teacher_maximum[at], g.teacher_reciprocal[at], h);
    }
    const std::int64_t at = g.student(tile.row(query), tile.head);
    visit(g.student_maximum[at], g.student_reciprocal[at], group);
  };
  for (std::int64_t query = 0; query < tile.count; ++query) {
    load_queries(g, scratch, query, tile.row(query), tile.head);
    g.loss[g.student(tile.row(query), tile.head)] = 0.0;
    for_each_row(query, [](float& maximum, float& sum, std::int64_t) {
      maximum = -std::numeric_limits<float>::infinity();
      sum = 0.0f;
    });
  }
  const auto visit_blocks = [&](const auto& visit) {
    blocks.for_each(
        tile, args.block_ids,
        [&](std::int64_t block, const std::int32_t* active, std::int64_t count,
            std::int64_t limit) {
          const core::BlockRows index_keys =
              core::block_rows(args.index_k, args.batch, p.block_size, tile.sequence, 0, block);
          pack_columns(
              args.k,
              core::block_rows(args.k, args.batch, p.block_size, tile.sequence, tile.head, block),
              limit, scratch, scratch.k_columns);
          pack_columns(args.index_k, index_keys, limit, scratch, scratch.index_columns);
          multiply_block(scratch, p, count, limit, [&](std::int64_t i) { return active[i]; });
          visit(index_keys, active, count, limit);
        });
  };
  visit_blocks([&](const core::BlockRows&, const std::int32_t* active, std::int64_t count,
                   std::int64_t limit) {
    for (std::int64_t i = 0; i < count; ++i) {
      for_each_row(active[i], [&](float& maximum, float& sum, std::int64_t h) {
        const float* const scores =
            h < group ? scratch.p + (i * group + h) * p.block_size : scratch.s + i * p.block_size;
        take_row(maximum, sum, scores, limit);
      });
    }
  });
  for (std::int64_t query = 0; query < tile.count; ++query) {
    for_each_row(query, [](float& maximum, float& sum, std::int64_t) {
      sum = reciprocal_of({maximum, sum});
    });
  }
  std::fill_n(scratch.sums, tile.count * padded_index, 0.0f);
  visit_blocks([&](const core::BlockRows& index_keys, const std::int32_t* active,
                   std::int64_t count, std::int64_t limit) {
    for (std::int64_t i = 0; i < count; ++i) {
      finish_query(g, scratch, i, limit, tile.row(active[i]), tile.head, args.loss.given());
    }
    if (!args.dindex_q.given()) return;
    with_elements(args.index_k, index_keys.offset, [&](const auto* from) {
      pack_values(from, index_keys.token_stride, limit, p.index_dim, NextRows{},
                  scratch.rows_panel);
    });
    multiply_rows(
        count, Panel{scratch.rows_panel, limit, core::ceil_div(p.index_dim, lanes())},
        /*add=*/true, [&](std::int64_t i) { return scratch.s + i * p.block_size; },
        [&](std::int64_t i) { return scratch.sums + active[i] * padded_index; });
  });
  if (!args.dindex_q.given()) return;
  const auto factor = static_cast<float>(g.weight * static_cast<double>(g.student_scale) / kLog2E);
  for (std::int64_t query = 0; query < tile.count; ++query) {
    store_gradient(args.dindex_q, tile.row(query), tile.head, scratch.sums + query * padded_index,
                   factor);
  }
}

/// The part of one KV head in the sums of a KV block.
void add_head(const KlGradients& g, const KlScratch& scratch, std::int64_t head,
              std::int64_t index) {
  const IndexerKlBackward& args = g.args;
  const Problem& p = args.problem;
  const KeyBlock key_block = g.lists.block(index);
  const QueryList queries = g.lists.queries(head, index);
  const std::int64_t padded_index = round_up(p.index_dim, kMaxLanes);
  const std::int64_t stride = round_up(queries_per_tile(p), kMaxLanes);
  if (queries.count == 0) return;
  const auto limit_of = [&](std::int64_t i) { return key_block.limit(p.block_size, queries[i]); };
  const std::int64_t seen = limit_of(queries.count - 1);  // limits ascend
  pack_columns(
      args.k,
      core::block_rows(args.k, args.batch, p.block_size, key_block.sequence, head, key_block.block),
      seen, scratch, scratch.k_columns);
  pack_columns(args.index_k,
               core::block_rows(args.index_k, args.batch, p.block_size, key_block.sequence, 0,
                                key_block.block),
               seen, scratch, scratch.index_columns);
  for (std::int64_t begin = 0; begin < queries.count;) {
    // Queries that see equally many tokens, as in sparse_attention_bwd.cpp.
    const std::int64_t limit = limit_of(begin);
    const std::int64_t most = std::min(begin + queries_per_tile(p), queries.count);
    std::int64_t end = begin + 1;
    while (end < most && limit_of(end) == limit) ++end;
    const std::int64_t count = end - begin;
    for (std::int64_t i = 0; i < count; ++i) {
      load_queries(g, scratch, i, queries[begin + i], head);
    }
    multiply_block(scratch, p, count, seen, [](std::int64_t i) { return i; });
    for (std::int64_t i = 0; i < count; ++i) {
      finish_query(g, scratch, i, limit, queries[begin + i], head, /*add_loss=*/false);
    }
    transpose(scratch.s, p.block_size, count, limit, scratch.transposed, stride);
    pack_values(scratch.index_q, padded_index, count, p.index_dim, NextRows{}, scratch.rows_panel);
    multiply_rows(
        limit, Panel{scratch.rows_panel, count, core::ceil_div(p.index_dim, lanes())},
        /*add=*/true, [&](std::int64_t j) { return scratch.transposed + j * stride; },
        [&](std::int64_t j) { return scratch.sums + j * padded_index; });
    begin = end;
  }
}

/// dindex_k of one KV block.
void walk_block(const KlGradients& g, std::int64_t index, std::byte* memory) {
  const Problem& p = g.args.problem;
  core::WorkspaceLayout layout(memory);
  const KlScratch scratch = lay_out(p, layout);
  const KeyBlock key_block = g.lists.block(index);
  const std::int64_t num_tokens = key_block.num_tokens(p.block_size);
  const std::int64_t padded_index = round_up(p.index_dim, kMaxLanes);
  std::fill_n(scratch.sums, num_tokens * padded_index, 0.0f);
  for (std::int64_t head = 0; head < p.num_kv_heads; ++head) add_head(g, scratch, head, index);
  const float factor = static_cast<float>(g.weight) * kLn2;
  for (std::int64_t j = 0; j < num_tokens; ++j) {
    store_gradient(g.args.dindex_k, key_block.sequence.k_begin + key_block.block * p.block_size + j,
                   0, scratch.sums + j * padded_index, factor);
  }
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace msa::cpu {
HWY_EXPORT(walk_queries);
HWY_EXPORT(walk_block);

namespace {

std::size_t slice_bytes(const IndexerKlBackward& args) {
  core::WorkspaceLayout layout;
  lay_out(args.problem, layout);
  const TileBlocks blocks(args.problem, queries_per_tile(args.problem), layout);
  return layout.bytes();
}

std::size_t shared_bytes(const IndexerKlBackward& args) {
  core::WorkspaceLayout layout;
  const QueryLists lists(args, nullptr, layout);
  shared(args, lists, layout);
  return layout.bytes();
}

void run(const IndexerKlBackward& args, std::span<std::byte> workspace, Stream) {
  const core::Sequences sequences(args);
  core::WorkspaceLayout layout(workspace.data());
  QueryLists lists(args, &sequences, layout);
  const KlGradients gradients = shared(args, lists, layout);
  lists.build();
  const std::span<std::byte> slices = workspace.subspan(layout.bytes());
  const std::int64_t heads = args.problem.num_kv_heads;
  const std::int64_t total_q = args.q.shape[0];
  for_each_query_tile(sequences, total_q, heads, queries_per_tile(args.problem), slices,
                      slice_bytes(args), [&](const QueryTile& tile, std::byte* memory) {
                        HWY_DYNAMIC_DISPATCH(walk_queries)(gradients, tile, memory);
                      });
  if (args.loss.given()) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < total_q * heads; ++i) sum += gradients.loss[i];
    core::store(args.loss, gradients.weight * sum, 0);
  }
  if (!args.dindex_k.given()) return;
  for_each_item(lists.num_blocks(), slices, slice_bytes(args),
                [&](std::int64_t item, std::byte* memory) {
                  HWY_DYNAMIC_DISPATCH(walk_block)(gradients, item, memory);
                });
}

}  // namespace

const detail::Implementation<IndexerKlBackward> kIndexerKlBackward = {
    .name = "cpu",
    .dtypes = "f32 f16 bf16",
    .declines = declines<IndexerKlBackward>,
    .workspace_bytes =
        [](const IndexerKlBackward& args) {
          return shared_bytes(args) + workspace_of_slices(slice_bytes(args));
        },
    .run = run};

}  // namespace msa::cpu
#endif
