// SPDX-License-Identifier: Apache-2.0
//
// Gradients of sparse and dense attention. P is computed from q and k again, its softmax statistics
// too: scores that come out a little different from the forward pass's would be wrong by orders of
// magnitude against its LSE where they are large. Two walks, each adding in an order that depends
// on shapes and ids alone:
//  * tiles of queries over their blocks, twice: first the statistics of each row and
//    delta = sum(P dP), dP = dO V^T; then dQ += dS K with dS = P (dP - delta);
//  * KV blocks over their queries: dV += P^T dO and dK += dS^T Q.
// Softmax is in base 2: q is scaled by softmax_scale * log2(e), which the stored gradients undo.
#include <cmath>
#include <limits>

#include "core/scalar.hpp"
#include "core/sequences.hpp"
#include "cpu/query_lists.hpp"
#include "cpu/support.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/sparse_attention_bwd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as Highway requires.
#include <hwy/highway.h>

#include "cpu/backward-inl.hpp"

#ifndef MSA_CPU_SPARSE_ATTENTION_BWD_ONCE
#define MSA_CPU_SPARSE_ATTENTION_BWD_ONCE
namespace msa::cpu {
namespace {

/// Rows (query, query head) that are multiplied with a block at a time, if a group is not larger:
/// their probabilities and the block's panels stay in the L2 cache.
constexpr std::int64_t kMaxRows = 128;

std::int64_t queries_per_tile(const Problem& p) {
  return std::clamp<std::int64_t>(kMaxRows / p.group_size(), 1, 32);
}

/// What all workers share, in the workspace.
struct AttentionGradients {
  const SparseAttentionBackward& args;
  const QueryLists& lists;
  float scale;        ///< of scores in base 2
  float* maximum;     ///< [total_q][num_q_heads], of each row's scores
  float* reciprocal;  ///< [total_q][num_q_heads], of the sum of 2^(score - maximum)
  float* delta;       ///< [total_q][num_q_heads]

  std::int64_t statistic(std::int64_t query, std::int64_t head) const {
    return query * args.problem.num_q_heads + head;
  }
};

/// One worker's memory. `rows` are (query, head of the group), heads fastest.
struct GradientScratch {
  float* q;           ///< [rows][padded_dim], scaled
  float* dout;        ///< [rows][padded_dim]
  float* sums;        ///< [rows or tokens of a block][padded_dim], of dQ or dK
  float* value_sums;  ///< [tokens][padded_dim], of dV
  float* p;           ///< [rows][block_size], scores and then probabilities
  float* ds;          ///< [rows][block_size], dP and then dS
  float* transposed;  ///< [block_size][rows]
  float* k_columns;   ///< panel of depth head_dim
  float* v_columns;   ///< panel of depth head_dim
  float* rows_panel;  ///< panel of padded_dim columns: K, or dO and Q
  float* pack;
};

GradientScratch lay_out(const Problem& p, core::WorkspaceLayout& layout) {
  const std::int64_t rows = queries_per_tile(p) * p.group_size();
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  const std::int64_t longest = std::max<std::int64_t>(rows, p.block_size);
  GradientScratch scratch;
  scratch.q = layout.take<float>(rows * padded_dim);
  scratch.dout = layout.take<float>(rows * padded_dim);
  scratch.sums = layout.take<float>(longest * padded_dim);
  scratch.value_sums = layout.take<float>(p.block_size * padded_dim);
  scratch.p = layout.take<float>(rows * p.block_size);
  scratch.ds = layout.take<float>(rows * p.block_size);
  scratch.transposed = layout.take<float>(p.block_size * round_up(rows, kMaxLanes));
  scratch.k_columns = layout.take<float>(std::int64_t{p.block_size} * p.head_dim);
  scratch.v_columns = layout.take<float>(std::int64_t{p.block_size} * p.head_dim);
  scratch.rows_panel = layout.take<float>(longest * padded_dim);
  scratch.pack = layout.take<float>(pack_scratch(p.head_dim));
  return scratch;
}

AttentionGradients shared(const SparseAttentionBackward& args, const QueryLists& lists,
                          core::WorkspaceLayout& layout) {
  const std::int64_t rows = args.q.shape[0] * args.problem.num_q_heads;
  const double scale = args.softmax_scale != 0.0f
                           ? static_cast<double>(args.softmax_scale)
                           : 1.0 / std::sqrt(static_cast<double>(args.problem.head_dim));
  return {.args = args,
          .lists = lists,
          .scale = static_cast<float>(scale * 1.4426950408889634074),
          .maximum = layout.take<float>(rows),
          .reciprocal = layout.take<float>(rows),
          .delta = layout.take<float>(rows)};
}

}  // namespace
}  // namespace msa::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

constexpr float kLn2 = 0.69314718055994530942f;

/// Packs tokens [0, num_tokens) of a block of `keys` as columns.
void pack_columns(const TensorView& keys, const core::BlockRows& rows, std::int64_t num_tokens,
                  const GradientScratch& scratch, float* panel) {
  with_elements(keys, rows.offset, [&](const auto* from) {
    pack_keys(from, rows.token_stride, num_tokens, keys.shape[2], NextRows{}, scratch.pack, panel);
  });
}

/// Row r of the request is (query(r), head(r)): p = scores and ds = dP for tokens
/// [0, packed) of the panels.
template <class RowIndex>
void multiply_block(const GradientScratch& scratch, const Problem& p, std::int64_t num_rows,
                    std::int64_t packed, RowIndex row) {
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  const std::int64_t num_vectors = core::ceil_div(packed, lanes());
  multiply_rows(
      num_rows, Panel{scratch.k_columns, p.head_dim, num_vectors}, /*add=*/false,
      [&](std::int64_t r) { return scratch.q + row(r) * padded_dim; },
      [&](std::int64_t r) { return scratch.p + r * p.block_size; });
  multiply_rows(
      num_rows, Panel{scratch.v_columns, p.head_dim, num_vectors}, /*add=*/false,
      [&](std::int64_t r) { return scratch.dout + row(r) * padded_dim; },
      [&](std::int64_t r) { return scratch.ds + r * p.block_size; });
}

/// p = P and ds = P (dP - delta) of row r, whose statistics are at `statistic`.
void finish_row(const AttentionGradients& g, const GradientScratch& scratch, std::int64_t r,
                std::int64_t limit, std::int64_t statistic) {
  const FloatTag d;
  float* const p = scratch.p + r * g.args.problem.block_size;
  float* const ds = scratch.ds + r * g.args.problem.block_size;
  const auto delta = hn::Set(d, g.delta[statistic]);
  for (std::int64_t i = 0; i < limit; i += lanes()) {
    const auto probability =
        probability_of(hn::LoadU(d, p + i), g.maximum[statistic], g.reciprocal[statistic]);
    hn::StoreU(probability, d, p + i);
    hn::StoreU(hn::Mul(probability, hn::Sub(hn::LoadU(d, ds + i), delta)), d, ds + i);
  }
}

/// Statistics, delta and dQ of the tile's rows.
void walk_queries(const AttentionGradients& g, const QueryTile& tile, std::byte* memory) {
  const SparseAttentionBackward& args = g.args;
  const Problem& p = args.problem;
  core::WorkspaceLayout layout(memory);
  const GradientScratch scratch = lay_out(p, layout);
  const TileBlocks blocks(p, queries_per_tile(p), layout);
  const std::int64_t group = p.group_size();
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  const std::int64_t first_head = tile.head * group;
  const auto statistic = [&](std::int64_t row) {
    return g.statistic(tile.row(row / group), first_head + row % group);
  };
  for (std::int64_t row = 0; row < tile.count * group; ++row) {
    const std::int64_t query = tile.row(row / group);
    const std::int64_t head = first_head + row % group;
    load_row(args.q, query, head, g.scale, scratch.q + row * padded_dim);
    load_row(args.dout, query, head, 1.0f, scratch.dout + row * padded_dim);
    g.maximum[statistic(row)] = -std::numeric_limits<float>::infinity();
    g.reciprocal[statistic(row)] = 0.0f;  // the sum, until it is complete
    g.delta[statistic(row)] = 0.0f;
  }
  const auto visit_blocks = [&](const auto& visit) {
    blocks.for_each(
        tile, args.block_ids,
        [&](std::int64_t block, const std::int32_t* active, std::int64_t count,
            std::int64_t limit) {
          const core::BlockRows keys =
              core::block_rows(args.k, args.batch, p.block_size, tile.sequence, tile.head, block);
          const core::BlockRows values =
              core::block_rows(args.v, args.batch, p.block_size, tile.sequence, tile.head, block);
          pack_columns(args.k, keys, limit, scratch, scratch.k_columns);
          pack_columns(args.v, values, limit, scratch, scratch.v_columns);
          const auto row = [&](std::int64_t r) { return active[r / group] * group + r % group; };
          multiply_block(scratch, p, count * group, limit, row);
          visit(keys, row, count * group, limit);
        });
  };
  const FloatTag d;
  visit_blocks([&](const core::BlockRows&, const auto& row, std::int64_t count,
                   std::int64_t limit) {
    for (std::int64_t r = 0; r < count; ++r) {
      const std::int64_t at = statistic(row(r));
      const float* const dp = scratch.ds + r * p.block_size;
      SoftmaxRow softmax{g.maximum[at], g.reciprocal[at]};
      auto weighted = hn::Zero(d);
      const float correction = take_scores(
          softmax, scratch.p + r * p.block_size, limit, [&](std::int64_t i, auto power) HWY_ATTR {
            weighted = hn::MulAdd(power, load_visible(dp, i, limit, hn::Zero(d)), weighted);
          });
      g.maximum[at] = softmax.maximum;
      g.reciprocal[at] = softmax.sum;
      g.delta[at] = g.delta[at] * correction + hn::GetLane(hn::SumOfLanes(d, weighted));
    }
  });
  for (std::int64_t row = 0; row < tile.count * group; ++row) {
    const std::int64_t at = statistic(row);
    g.reciprocal[at] = reciprocal_of({g.maximum[at], g.reciprocal[at]});
    g.delta[at] *= g.reciprocal[at];
  }
  std::fill_n(scratch.sums, tile.count * group * padded_dim, 0.0f);
  visit_blocks(
      [&](const core::BlockRows& keys, const auto& row, std::int64_t count, std::int64_t limit) {
        for (std::int64_t r = 0; r < count; ++r)
          finish_row(g, scratch, r, limit, statistic(row(r)));
        with_elements(args.k, keys.offset, [&](const auto* from) {
          pack_values(from, keys.token_stride, limit, p.head_dim, NextRows{}, scratch.rows_panel);
        });
        multiply_rows(
            count, Panel{scratch.rows_panel, limit, core::ceil_div(p.head_dim, lanes())},
            /*add=*/true, [&](std::int64_t r) { return scratch.ds + r * p.block_size; },
            [&](std::int64_t r) { return scratch.sums + row(r) * padded_dim; });
      });
  for (std::int64_t row = 0; row < tile.count * group; ++row) {
    store_gradient(args.dq, tile.row(row / group), first_head + row % group,
                   scratch.sums + row * padded_dim, g.scale * kLn2);
  }
}

/// sums[j] += sum over rows r of weights[r][j] * x[r], j in [0, limit).
void add_transposed(const GradientScratch& scratch, const Problem& p, const float* weights,
                    const float* x, std::int64_t num_rows, std::int64_t limit, float* sums) {
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  const std::int64_t stride = round_up(queries_per_tile(p) * p.group_size(), kMaxLanes);
  transpose(weights, p.block_size, num_rows, limit, scratch.transposed, stride);
  pack_values(x, padded_dim, num_rows, p.head_dim, NextRows{}, scratch.rows_panel);
  multiply_rows(
      limit, Panel{scratch.rows_panel, num_rows, core::ceil_div(p.head_dim, lanes())}, /*add=*/true,
      [&](std::int64_t j) { return scratch.transposed + j * stride; },
      [&](std::int64_t j) { return sums + j * padded_dim; });
}

/// dK and dV of one KV block of one head.
void walk_block(const AttentionGradients& g, std::int64_t head, std::int64_t index,
                std::byte* memory) {
  const SparseAttentionBackward& args = g.args;
  const Problem& p = args.problem;
  core::WorkspaceLayout layout(memory);
  const GradientScratch scratch = lay_out(p, layout);
  const KeyBlock key_block = g.lists.block(index);
  const core::Sequence& sequence = key_block.sequence;
  const QueryList queries = g.lists.queries(head, index);
  const std::int64_t num_tokens = key_block.num_tokens(p.block_size);
  const std::int64_t group = p.group_size();
  const std::int64_t padded_dim = round_up(p.head_dim, kMaxLanes);
  const auto limit_of = [&](std::int64_t i) { return key_block.limit(p.block_size, queries[i]); };
  std::fill_n(scratch.sums, num_tokens * padded_dim, 0.0f);
  std::fill_n(scratch.value_sums, num_tokens * padded_dim, 0.0f);
  const std::int64_t seen = queries.count == 0 ? 0 : limit_of(queries.count - 1);  // limits ascend
  if (queries.count > 0) {
    pack_columns(
        args.k, core::block_rows(args.k, args.batch, p.block_size, sequence, head, key_block.block),
        seen, scratch, scratch.k_columns);
    pack_columns(
        args.v, core::block_rows(args.v, args.batch, p.block_size, sequence, head, key_block.block),
        seen, scratch, scratch.v_columns);
  }
  for (std::int64_t begin = 0; begin < queries.count;) {
    // Queries that see equally many tokens: of another's tokens P is 0, but dO may be NaN.
    const std::int64_t limit = limit_of(begin);
    const std::int64_t most = std::min(begin + queries_per_tile(p), queries.count);
    std::int64_t end = begin + 1;
    while (end < most && limit_of(end) == limit) ++end;
    const std::int64_t num_rows = (end - begin) * group;
    for (std::int64_t r = 0; r < num_rows; ++r) {
      const std::int64_t query = queries[begin + r / group];
      const std::int64_t q_head = head * group + r % group;
      load_row(args.q, query, q_head, g.scale, scratch.q + r * padded_dim);
      load_row(args.dout, query, q_head, 1.0f, scratch.dout + r * padded_dim);
    }
    multiply_block(scratch, p, num_rows, seen, [](std::int64_t r) { return r; });
    for (std::int64_t r = 0; r < num_rows; ++r) {
      finish_row(g, scratch, r, limit,
                 g.statistic(queries[begin + r / group], head * group + r % group));
    }
    add_transposed(scratch, p, scratch.p, scratch.dout, num_rows, limit, scratch.value_sums);
    add_transposed(scratch, p, scratch.ds, scratch.q, num_rows, limit, scratch.sums);
    begin = end;
  }
  for (std::int64_t j = 0; j < num_tokens; ++j) {
    const std::int64_t token = sequence.k_begin + key_block.block * p.block_size + j;
    store_gradient(args.dk, token, head, scratch.sums + j * padded_dim, kLn2);
    store_gradient(args.dv, token, head, scratch.value_sums + j * padded_dim, 1.0f);
  }
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace msa::cpu {
HWY_EXPORT(walk_queries);
HWY_EXPORT(walk_block);

namespace {

std::size_t slice_bytes(const SparseAttentionBackward& args) {
  core::WorkspaceLayout layout;
  lay_out(args.problem, layout);
  const TileBlocks blocks(args.problem, queries_per_tile(args.problem), layout);
  return layout.bytes();
}

std::size_t shared_bytes(const SparseAttentionBackward& args) {
  core::WorkspaceLayout layout;
  const QueryLists lists(args, nullptr, layout);
  shared(args, lists, layout);
  return layout.bytes();
}

void run(const SparseAttentionBackward& args, std::span<std::byte> workspace, Stream) {
  const core::Sequences sequences(args);
  core::WorkspaceLayout layout(workspace.data());
  QueryLists lists(args, &sequences, layout);
  const AttentionGradients gradients = shared(args, lists, layout);
  lists.build();
  const std::span<std::byte> slices = workspace.subspan(layout.bytes());
  const std::int64_t heads = args.problem.num_kv_heads;
  for_each_query_tile(sequences, args.q.shape[0], heads, queries_per_tile(args.problem), slices,
                      slice_bytes(args), [&](const QueryTile& tile, std::byte* memory) {
                        HWY_DYNAMIC_DISPATCH(walk_queries)(gradients, tile, memory);
                      });
  for_each_item(lists.num_blocks() * heads, slices, slice_bytes(args),
                [&](std::int64_t item, std::byte* memory) {
                  HWY_DYNAMIC_DISPATCH(walk_block)(gradients, item % heads, item / heads, memory);
                });
}

}  // namespace

const detail::Implementation<SparseAttentionBackward> kSparseAttentionBackward = {
    .name = "cpu",
    .dtypes = "f32 f16 bf16",
    .declines = declines<SparseAttentionBackward>,
    .workspace_bytes =
        [](const SparseAttentionBackward& args) {
          return shared_bytes(args) + workspace_of_slices(slice_bytes(args));
        },
    .run = run};

}  // namespace msa::cpu
#endif
