// SPDX-License-Identifier: Apache-2.0
//
// The properties of the other files here, on every backend and SIMD target. A query's result comes
// from its own blocks in ascending order, whatever else is in the call, so most hold bit for bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/sequences.hpp"
#include "tests/property/backends.hpp"
#include "tests/support/bounds.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

Case small(int top_k, Keys keys = Keys::ragged) {
  return {.problem = {.num_q_heads = 6,
                      .num_kv_heads = 2,
                      .head_dim = 24,
                      .index_dim = 20,
                      .block_size = 16,
                      .top_k = top_k},
          .dtype = DType::f32,
          .sequences = {{29, 130}, {3, 40}, {20, 18}, {1, 77}},
          .keys = keys};
}

TensorView slice(TensorView view, std::size_t axis, std::int64_t begin, std::int64_t end) {
  view.data = core::address_at(view, begin * view.stride[axis]);
  view.shape[axis] = end - begin;
  return view;
}

/// All forward operations on the inputs as they are.
struct Forward {
  std::vector<double> scores, ids, out, lse, dense_out, dense_lse;
  bool operator==(const Forward&) const = default;
};

Forward run_all(const char* backend, Inputs& inputs) {
  auto scores = inputs.args<IndexerScores>();
  auto indexer = inputs.args<Indexer>();
  auto sparse = inputs.args<SparseAttentionForward>();
  auto dense = inputs.args<DenseAttentionForward>();
  const Outputs scores_outputs(inputs, scores);
  const Outputs indexer_outputs(inputs, indexer);
  const Outputs sparse_outputs(inputs, sparse);
  const Outputs dense_outputs(inputs, dense);
  run_on(backend, scores);
  run_on(backend, indexer);
  run_on(backend, sparse);
  run_on(backend, dense);
  return {values_of(scores.block_scores), values_of(indexer.block_ids), values_of(sparse.out),
          values_of(sparse.lse),          values_of(dense.out),         values_of(dense.lse)};
}

TEST(EveryBackend, EnoughSlotsForAllBlocksIsDenseAttention) {
  for (const int top_k : {9, 12}) {
    Inputs inputs(small(top_k));
    for_each_backend([&](const char* backend) {
      const Forward results = run_all(backend, inputs);
      EXPECT_EQ(results.out, results.dense_out);
      EXPECT_EQ(results.lse, results.dense_lse);
    });
  }
  Inputs fewer(small(2));
  const Forward results = run_all("cpu", fewer);
  EXPECT_NE(results.out, results.dense_out);
}

TEST(EveryBackend, PermutingPagesChangesNothing) {
  for (const Keys keys : {Keys::paged, Keys::shared_pages, Keys::missing_pages}) {
    for_each_backend([&](const char* backend) {
      Inputs inputs(small(3, keys));
      const Forward before = run_all(backend, inputs);
      const auto pages = static_cast<std::int32_t>(inputs.k.view().shape[0]);
      for (const TensorView& cache : {inputs.k.view(), inputs.v.view(), inputs.index_k.view()}) {
        for (std::int64_t p = 0; p < pages / 2; ++p) {
          const TensorView low = slice(cache, 0, p, p + 1);
          const TensorView high = slice(cache, 0, pages - 1 - p, pages - p);
          const std::vector<double> values = values_of(low);
          set_values(low, values_of(high));
          set_values(high, values);
        }
      }
      const TensorView& table = inputs.page_table;
      for_each_index(table, [&](const auto& at) {
        const std::int32_t page = core::load_i32(table, at[0], at[1]);
        if (page >= 0 && page < pages) {
          core::store_i32(table, pages - 1 - page, at[0], at[1]);
        }
      });
      EXPECT_EQ(run_all(backend, inputs), before);
    });
  }
}

TEST(EveryBackend, PagedEqualsRagged) {
  Inputs paged(small(3, Keys::paged));
  Inputs ragged(small(3));
  const std::pair<TensorView, TensorView> queries[] = {
      {paged.q, ragged.q}, {paged.index_q, ragged.index_q}, {paged.block_ids, ragged.block_ids}};
  for (const auto& [from, to] : queries) set_values(to, values_of(from));
  const std::pair<TensorView, TensorView> caches[] = {
      {paged.k, ragged.k}, {paged.v, ragged.v}, {paged.index_k, ragged.index_k}};
  for (const auto& [cache, packed] : caches) {
    std::int64_t row = 0;
    for (std::size_t b = 0; b < paged.spec.sequences.size(); ++b) {
      for (std::int64_t j = 0; j < paged.spec.sequences[b].k; ++j, ++row) {
        const std::int32_t page = core::load_i32(paged.page_table.view(), b, j / 16);
        for (std::int64_t head = 0; head < packed.shape[1]; ++head) {
          for (std::int64_t d = 0; d < packed.shape[2]; ++d) {
            core::store(packed, core::load(cache, page, head, j % 16, d), row, head, d);
          }
        }
      }
    }
  }
  for_each_backend([&](const char* backend) {
    Forward a = run_all(backend, paged);
    Forward b = run_all(backend, ragged);
    a.scores.clear();  // of another number of columns
    b.scores.clear();
    EXPECT_EQ(a, b);
  });
}

// The batch in another order, and each sequence without the others.
TEST(EveryBackend, ASequenceDoesNotSeeTheRestOfTheBatch) {
  Inputs inputs(small(3));
  for_each_backend([&](const char* backend) {
    auto indexer = inputs.args<Indexer>();
    auto sparse = inputs.args<SparseAttentionForward>();
    auto dense = inputs.args<DenseAttentionForward>();
    const Outputs a(inputs, indexer);
    const Outputs b(inputs, sparse);
    const Outputs c(inputs, dense);
    run_on(backend, indexer);
    run_on(backend, sparse);
    run_on(backend, dense);
    const core::Sequences sequences(sparse);
    for (std::int64_t n = 0; n < sequences.size(); ++n) {
      SCOPED_TRACE(n);
      const core::Sequence s = sequences[n];
      const auto rows = [&](const TensorView& view, std::size_t axis = 0) {
        return slice(view, axis, s.q_begin, s.q_begin + s.q_len);
      };
      const auto keys = [&](const TensorView& view) {
        return slice(view, 0, s.k_begin, s.k_begin + s.k_len);
      };
      const Problem& p = inputs.spec.problem;
      const core::Tensor ids(DType::i32, {p.num_kv_heads, s.q_len, p.top_k});
      const core::Tensor out(DType::f32, {s.q_len, p.num_q_heads, p.head_dim});
      const core::Tensor lse(DType::f32, {s.q_len, p.num_q_heads});
      run_on(backend, Indexer{.problem = p,
                              .index_q = rows(indexer.index_q),
                              .index_k = keys(indexer.index_k),
                              .block_ids = ids});
      EXPECT_EQ(values_of(ids), values_of(rows(indexer.block_ids, 1)));
      run_on(backend, SparseAttentionForward{.problem = p,
                                             .q = rows(sparse.q),
                                             .k = keys(sparse.k),
                                             .v = keys(sparse.v),
                                             .block_ids = rows(sparse.block_ids, 1),
                                             .out = out,
                                             .lse = lse});
      EXPECT_EQ(values_of(out), values_of(rows(sparse.out)));
      EXPECT_EQ(values_of(lse), values_of(rows(sparse.lse)));
      run_on(backend, DenseAttentionForward{.problem = p,
                                            .q = rows(dense.q),
                                            .k = keys(dense.k),
                                            .v = keys(dense.v),
                                            .out = out,
                                            .lse = lse});
      EXPECT_EQ(values_of(out), values_of(rows(dense.out)));
      EXPECT_EQ(values_of(lse), values_of(rows(dense.lse)));
    }
  });
}

TEST(EveryBackend, ChunksAndFutureTokensChangeNothing) {
  Case spec = small(3);
  spec.sequences = {{90, 120}};
  spec.give_offsets = false;
  for_each_backend([&](const char* backend) {
    Inputs inputs(spec);
    // Rows [begin, end) as the last queries of a shorter prompt, of a context that ends with them
    // or goes on: positions are aligned at the end, so later keys are cut off.
    const auto run_piece = [&](std::int64_t begin, std::int64_t end) {
      auto indexer = inputs.args<Indexer>();
      auto sparse = inputs.args<SparseAttentionForward>();
      const Outputs a(inputs, indexer);
      const Outputs b(inputs, sparse);
      indexer.index_q = slice(indexer.index_q, 0, begin, end);
      indexer.index_k = slice(indexer.index_k, 0, 0, 30 + end);
      indexer.block_ids = slice(indexer.block_ids, 1, begin, end);
      run_on(backend, indexer);
      sparse.q = slice(sparse.q, 0, begin, end);
      sparse.k = slice(sparse.k, 0, 0, 30 + end);
      sparse.v = slice(sparse.v, 0, 0, 30 + end);
      sparse.block_ids = indexer.block_ids;
      sparse.out = slice(sparse.out, 0, begin, end);
      sparse.lse = slice(sparse.lse, 0, begin, end);
      run_on(backend, sparse);
      return std::pair(values_of(indexer.block_ids), values_of(sparse.out));
    };
    const auto whole = run_piece(0, 90);
    const std::size_t row = whole.second.size() / 90;
    for (const std::int64_t size : {1, 7, 32, 64}) {
      std::vector<double> out;
      for (std::int64_t begin = 0; begin < 90; begin += size) {
        const auto piece = run_piece(begin, std::min<std::int64_t>(begin + size, 90));
        out.insert(out.end(), piece.second.begin(), piece.second.end());
      }
      EXPECT_EQ(out, whole.second) << size;
    }
    // Rows of the first 60 queries, whatever the 30 tokens behind them are.
    const TensorView caches[] = {inputs.k, inputs.v, inputs.index_k};
    for (const TensorView& cache : caches) {
      const TensorView future = slice(cache, 0, 90, 120);
      set_values(future,
                 std::vector<double>(static_cast<std::size_t>(future.num_elements()), 1e30));
    }
    const auto after = run_piece(0, 90);
    EXPECT_TRUE(std::equal(whole.second.begin(),
                           whole.second.begin() + static_cast<std::ptrdiff_t>(60 * row),
                           after.second.begin()));
    EXPECT_NE(after.second, whole.second);
  });
}

TEST(EveryBackend, ScalingVScalesOut) {
  Inputs inputs(small(3));
  for_each_backend([&](const char* backend) {
    std::vector<double> v = values_of(inputs.v);
    const Forward before = run_all(backend, inputs);
    for (double& x : v) x *= -4.0;  // a power of two: exact
    set_values(inputs.v, v);
    const Forward after = run_all(backend, inputs);
    for (double& x : v) x *= -0.25;
    set_values(inputs.v, v);
    Forward expected = before;
    for (double& x : expected.out) x *= -4.0;
    for (double& x : expected.dense_out) x *= -4.0;
    EXPECT_EQ(after, expected);
  });
}

TEST(EveryBackend, ProbabilitiesSumToOne) {
  Inputs inputs(small(3));
  set_values(inputs.v,
             std::vector<double>(static_cast<std::size_t>(inputs.v.view().num_elements()), 1.0));
  const auto sequences = core::Sequences(inputs.args<SparseAttentionForward>());
  for_each_backend([&](const char* backend) {
    const Forward results = run_all(backend, inputs);
    // Numerator and denominator are two sums of the same terms, up to 130 of them: each is within
    // 130 roundings of the exact sum, then the quotient's two. f32 has unit roundoff 2^-24.
    const double tolerance = (2 * 130 + 2) * 1.01 * 0x1p-24;
    const std::int64_t row_size = 6 * 24;
    for (const auto* out : {&results.out, &results.dense_out}) {
      for (std::size_t i = 0; i < out->size(); ++i) {
        const std::int64_t row = static_cast<std::int64_t>(i) / row_size;
        const core::Sequence s = sequences.of_query(row);
        if (s.position(row - s.q_begin) < 0) {
          EXPECT_EQ((*out)[i], 0.0);
        } else {
          EXPECT_NEAR((*out)[i], 1.0, tolerance);
        }
      }
    }
  });
}

// The two halves of a selection, merged by their LSEs, are the whole: what split kernels rely on.
TEST(EveryBackend, MergingTwoHalvesOfASelection) {
  Inputs inputs(small(4));
  const std::vector<double> ids = values_of(inputs.block_ids);
  double largest = 0.0;
  for (const double x : values_of(inputs.v)) largest = std::max(largest, std::fabs(x));
  struct Part {
    std::vector<double> out, lse;
    AttentionBounds bounds;
  };
  for_each_backend([&](const char* backend) {
    const auto attend = [&](const std::vector<double>& selection) {
      set_values(inputs.block_ids, selection);
      auto args = inputs.args<SparseAttentionForward>();
      const Outputs outputs(inputs, args);
      run_on(backend, args);
      return Part{values_of(args.out), values_of(args.lse), attention_bounds(args)};
    };
    const Part whole = attend(ids);
    std::vector<double> even = ids;
    std::vector<double> odd = ids;
    for (std::size_t i = 0; i < ids.size(); ++i) (i % 2 == 0 ? odd : even)[i] = -1.0;
    const Part halves[2] = {attend(even), attend(odd)};
    set_values(inputs.block_ids, ids);
    int merged_rows = 0;
    for (std::size_t row = 0; row < whole.lse.size(); ++row) {
      if (std::isinf(whole.lse[row])) continue;
      merged_rows += std::isinf(halves[0].lse[row]) || std::isinf(halves[1].lse[row]) ? 0 : 1;
      const double top = std::max(halves[0].lse[row], halves[1].lse[row]);
      const double merged =
          top + std::log(std::exp(halves[0].lse[row] - top) + std::exp(halves[1].lse[row] - top));
      // Each of the three is within its bound of the exact one, plus its rounding to f32; weights
      // of the halves move by no more than the errors of their exponents.
      double lse_error = whole.bounds.lse[row] + 0x1p-23 * (std::fabs(merged) + 1.0);
      for (const Part& half : halves) {
        if (std::isinf(half.lse[row])) continue;
        lse_error += half.bounds.lse[row] + 0x1p-23 * std::fabs(half.lse[row]);
      }
      EXPECT_NEAR(merged, whole.lse[row], lse_error);
      for (std::size_t d = 0; d < 24; ++d) {
        const std::size_t i = row * 24 + d;
        double value = 0.0;
        double error = whole.bounds.out[i] + (4.0 * lse_error + 3 * 0x1p-23) * largest;
        for (const Part& half : halves) {
          value += half.out[i] * std::exp(half.lse[row] - merged);
          error += half.bounds.out[i];
        }
        EXPECT_NEAR(value, whole.out[i], error);
      }
    }
    EXPECT_GT(merged_rows, 100);
  });
}

}  // namespace
}  // namespace msa::testing
