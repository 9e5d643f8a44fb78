// SPDX-License-Identifier: Apache-2.0
//
// Where tensors lie and how work is divided changes nothing, bit for bit.
#include <gtest/gtest.h>

#include <numeric>

#include "core/sequences.hpp"
#include "reference/reference.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

TensorView slice(TensorView view, std::size_t axis, std::int64_t begin, std::int64_t end) {
  view.data = core::address_at(view, begin * view.stride[axis]);
  view.shape[axis] = end - begin;
  return view;
}

const Problem kProblem{.num_q_heads = 4,
                       .num_kv_heads = 2,
                       .head_dim = 8,
                       .index_dim = 6,
                       .block_size = 16,
                       .top_k = 3};

/// Ids, sparse and dense output of rows [begin, end) when they are run as a prompt's last queries.
struct Forward {
  std::vector<double> ids, out, lse, dense_out;
  bool operator==(const Forward&) const = default;
};

Forward run_piece(Inputs& inputs, std::int64_t begin, std::int64_t end) {
  const std::int64_t prefix = inputs.total_k - inputs.total_q;
  auto indexer = inputs.args<Indexer>();
  auto sparse = inputs.args<SparseAttentionForward>();
  auto dense = inputs.args<DenseAttentionForward>();
  const Outputs indexer_outputs(inputs, indexer);
  const Outputs sparse_outputs(inputs, sparse);
  const Outputs dense_outputs(inputs, dense);
  indexer.index_q = slice(indexer.index_q, 0, begin, end);
  indexer.index_k = slice(indexer.index_k, 0, 0, prefix + end);
  indexer.block_ids = slice(indexer.block_ids, 1, begin, end);
  reference::indexer(indexer);
  sparse.q = slice(sparse.q, 0, begin, end);
  sparse.k = slice(sparse.k, 0, 0, prefix + end);
  sparse.v = slice(sparse.v, 0, 0, prefix + end);
  sparse.block_ids = indexer.block_ids;
  sparse.out = slice(sparse.out, 0, begin, end);
  sparse.lse = slice(sparse.lse, 0, begin, end);
  reference::sparse_attention_forward(sparse);
  dense.q = sparse.q;
  dense.k = sparse.k;
  dense.v = sparse.v;
  dense.out = slice(dense.out, 0, begin, end);
  dense.lse = {};
  reference::dense_attention_forward(dense);
  return {values_of(indexer.block_ids), values_of(sparse.out), values_of(sparse.lse),
          values_of(dense.out)};
}

/// Rows [begin, end) of a whole run, in the layout of run_piece.
Forward rows_of(const Forward& whole, std::int64_t total_q, std::int64_t begin, std::int64_t end) {
  const auto take = [&](const std::vector<double>& values, std::int64_t outer) {
    const std::int64_t inner = static_cast<std::int64_t>(values.size()) / (outer * total_q);
    std::vector<double> rows;
    for (std::int64_t o = 0; o < outer; ++o) {
      rows.insert(rows.end(), values.begin() + (o * total_q + begin) * inner,
                  values.begin() + (o * total_q + end) * inner);
    }
    return rows;
  };
  return {take(whole.ids, kProblem.num_kv_heads), take(whole.out, 1), take(whole.lse, 1),
          take(whole.dense_out, 1)};
}

// A prompt in one piece equals any chunking; with it, tokens to come change no earlier row.
TEST(Layout, ChunkedPromptEqualsOnePiece) {
  for (const std::int64_t prefix : {0, 21}) {
    Inputs inputs(Case{.problem = kProblem,
                       .dtype = DType::f64,
                       .sequences = {{50, 50 + prefix}},
                       .give_offsets = false});
    const Forward whole = run_piece(inputs, 0, 50);
    for (const std::int64_t size : {1, 7, 16, 33}) {
      for (std::int64_t begin = 0; begin < 50; begin += size) {
        const std::int64_t end = std::min<std::int64_t>(begin + size, 50);
        ASSERT_EQ(run_piece(inputs, begin, end), rows_of(whole, 50, begin, end))
            << prefix << ' ' << size << ' ' << begin;
      }
    }
  }
}

TEST(Layout, FutureTokensChangeNoEarlierRow) {
  Inputs inputs(Case{
      .problem = kProblem, .dtype = DType::f64, .sequences = {{50, 50}}, .give_offsets = false});
  const Forward before = run_piece(inputs, 0, 50);
  const TensorView tensors[] = {inputs.k, inputs.v, inputs.index_k};
  for (const TensorView& keys : tensors) {
    const TensorView future = slice(keys, 0, 30, 50);
    set_values(future, std::vector<double>(static_cast<std::size_t>(future.num_elements()), 1e30));
  }
  const Forward after = run_piece(inputs, 0, 50);
  EXPECT_EQ(rows_of(after, 50, 0, 30), rows_of(before, 50, 0, 30));
  EXPECT_NE(rows_of(after, 50, 30, 50), rows_of(before, 50, 30, 50));
}

/// All forward operations on the inputs as they are.
Forward run_all(Inputs& inputs) {
  auto indexer = inputs.args<Indexer>();
  auto sparse = inputs.args<SparseAttentionForward>();
  auto dense = inputs.args<DenseAttentionForward>();
  const Outputs indexer_outputs(inputs, indexer);
  const Outputs sparse_outputs(inputs, sparse);
  const Outputs dense_outputs(inputs, dense);
  reference::indexer(indexer);
  reference::sparse_attention_forward(sparse);
  reference::dense_attention_forward(dense);
  return {values_of(indexer.block_ids), values_of(sparse.out), values_of(sparse.lse),
          values_of(dense.out)};
}

TEST(Layout, PermutingPagesChangesNothing) {
  for (const Keys keys : {Keys::paged, Keys::shared_pages}) {
    Inputs inputs(Case{
        .problem = kProblem, .dtype = DType::f64, .sequences = {{9, 70}, {3, 40}}, .keys = keys});
    const Forward before = run_all(inputs);
    const TensorView& table = inputs.page_table;
    const std::int64_t pages = inputs.k.view().shape[0];
    // Page p moves to pages - 1 - p.
    const TensorView tensors[] = {inputs.k, inputs.v, inputs.index_k};
    for (const TensorView& cache : tensors) {
      for (std::int64_t p = 0; p < pages / 2; ++p) {
        const TensorView low = slice(cache, 0, p, p + 1);
        const TensorView high = slice(cache, 0, pages - 1 - p, pages - p);
        const std::vector<double> values = values_of(low);
        set_values(low, values_of(high));
        set_values(high, values);
      }
    }
    for_each_index(table, [&](const auto& at) {
      const std::int32_t page = core::load_i32(table, at[0], at[1]);
      if (page < pages) {
        core::store_i32(table, static_cast<std::int32_t>(pages) - 1 - page, at[0], at[1]);
      }
    });
    EXPECT_EQ(run_all(inputs), before);
  }
}

TEST(Layout, PagedEqualsRagged) {
  const Case spec{.problem = kProblem,
                  .dtype = DType::f64,
                  .sequences = {{9, 70}, {0, 5}, {3, 40}},
                  .keys = Keys::paged};
  Inputs paged(spec);
  Case other = spec;
  other.keys = Keys::ragged;
  Inputs ragged(other);
  const std::pair<TensorView, TensorView> queries[] = {
      {paged.q, ragged.q}, {paged.index_q, ragged.index_q}, {paged.block_ids, ragged.block_ids}};
  for (const auto& [from, to] : queries) set_values(to, values_of(from));
  const std::pair<TensorView, TensorView> caches[] = {
      {paged.k, ragged.k}, {paged.v, ragged.v}, {paged.index_k, ragged.index_k}};
  for (const auto& [cache, packed] : caches) {
    std::int64_t row = 0;
    for (std::size_t b = 0; b < spec.sequences.size(); ++b) {
      for (std::int64_t j = 0; j < spec.sequences[b].k; ++j, ++row) {
        const std::int32_t page = core::load_i32(paged.page_table.view(), b, j / 16);
        for (std::int64_t head = 0; head < packed.shape[1]; ++head) {
          for (std::int64_t d = 0; d < packed.shape[2]; ++d) {
            core::store(packed, core::load(cache, page, head, j % 16, d), row, head, d);
          }
        }
      }
    }
  }
  EXPECT_EQ(run_all(ragged), run_all(paged));
}

TEST(Layout, StridesChangeNothing) {
  Case spec{.problem = kProblem, .dtype = DType::f64, .sequences = {{9, 70}, {3, 40}}};
  spec.row_gap = 0;
  Inputs contiguous(spec);
  spec.row_gap = 5;
  Inputs strided(spec);
  EXPECT_EQ(run_all(strided), run_all(contiguous));
}

TEST(Layout, OrderOfTheBatchDoesNotMatter) {
  const std::vector<Lengths> lengths = {{9, 70}, {3, 40}, {0, 8}, {5, 5}};
  Inputs inputs(Case{.problem = kProblem, .dtype = DType::f64, .sequences = lengths});
  auto whole = inputs.args<SparseAttentionForward>();
  const Outputs whole_outputs(inputs, whole);
  reference::sparse_attention_forward(whole);
  // Each sequence alone gives the rows that it gives among the others.
  const core::Sequences sequences(whole);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence s = sequences[n];
    SparseAttentionForward alone = whole;
    alone.batch = {};
    const core::Tensor out(DType::f64, {s.q_len, 4, 8});
    const core::Tensor lse(DType::f64, {s.q_len, 4});
    alone.q = slice(whole.q, 0, s.q_begin, s.q_begin + s.q_len);
    alone.k = slice(whole.k, 0, s.k_begin, s.k_begin + s.k_len);
    alone.v = slice(whole.v, 0, s.k_begin, s.k_begin + s.k_len);
    alone.block_ids = slice(whole.block_ids, 1, s.q_begin, s.q_begin + s.q_len);
    alone.out = out;
    alone.lse = lse;
    reference::sparse_attention_forward(alone);
    EXPECT_EQ(values_of(out), values_of(slice(whole.out, 0, s.q_begin, s.q_begin + s.q_len)));
    EXPECT_EQ(values_of(lse), values_of(slice(whole.lse, 0, s.q_begin, s.q_begin + s.q_len)));
  }
}

TEST(Layout, OrderOfBlockIdsDoesNotMatter) {
  Inputs inputs(Case{.problem = kProblem, .dtype = DType::f64, .sequences = {{9, 70}, {3, 40}}});
  const Forward before = run_all(inputs);
  const TensorView& ids = inputs.block_ids;
  for (std::int64_t r = 0; r < 2; ++r) {
    for (std::int64_t row = 0; row < inputs.total_q; ++row) {
      const std::int32_t first = core::load_i32(ids, r, row, 0);
      core::store_i32(ids, core::load_i32(ids, r, row, 2), r, row, 0);
      core::store_i32(ids, first, r, row, 2);
    }
  }
  EXPECT_EQ(run_all(inputs), before);
}

}  // namespace
}  // namespace msa::testing
