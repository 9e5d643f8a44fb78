// SPDX-License-Identifier: Apache-2.0
//
// What the gradients of a sparse softmax must satisfy.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "core/sequences.hpp"
#include "reference/reference.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

Case small(int top_k) {
  return {.problem = {.num_q_heads = 4,
                      .num_kv_heads = 2,
                      .head_dim = 8,
                      .index_dim = 6,
                      .block_size = 16,
                      .top_k = top_k},
          .dtype = DType::f64,
          .sequences = {{5, 130}, {3, 40}, {4, 2}}};
}

/// (KV head, packed key) pairs that some query attends.
std::set<std::pair<std::int64_t, std::int64_t>> attended(const TensorView& block_ids,
                                                         const core::Sequences& sequences,
                                                         const Problem& p) {
  std::set<std::pair<std::int64_t, std::int64_t>> pairs;
  for_each_index(block_ids, [&](const auto& at) {
    const std::int32_t id = core::load_i32(block_ids, at[0], at[1], at[2]);
    const core::Sequence s = sequences.of_query(at[1]);
    const std::int64_t position = s.position(at[1] - s.q_begin);
    for (std::int64_t j = id * p.block_size; id >= 0 && j < (id + 1) * p.block_size; ++j) {
      if (j <= position) pairs.emplace(at[0], s.k_begin + j);
    }
  });
  return pairs;
}

TEST(Gradients, AreExactlyZeroWhereNothingIsAttended) {
  Inputs inputs(small(2));
  auto args = inputs.args<SparseAttentionBackward>();
  const Outputs outputs(inputs, args);
  reference::sparse_attention_backward(args);
  auto kl = inputs.args<IndexerKlBackward>();
  const Outputs kl_outputs(inputs, kl);
  reference::indexer_kl_backward(kl);
  const auto pairs = attended(args.block_ids, core::Sequences(args), args.problem);
  int zeros = 0;
  for_each_index(args.dk, [&](const auto& at) {
    const bool is_attended = pairs.contains({at[1], at[0]});
    EXPECT_EQ(core::load(args.dk, at[0], at[1], at[2]) != 0.0, is_attended) << at[0];
    EXPECT_EQ(core::load(args.dv, at[0], at[1], at[2]) != 0.0, is_attended) << at[0];
    zeros += is_attended ? 0 : 1;
  });
  EXPECT_GT(zeros, 0);
  for_each_index(kl.dindex_k, [&](const auto& at) {
    const bool is_attended = pairs.contains({0, at[0]}) || pairs.contains({1, at[0]});
    EXPECT_EQ(core::load(kl.dindex_k, at[0], 0, at[2]) != 0.0, is_attended) << at[0];
  });
  // Queries before the first key: the third sequence's first two.
  for (std::int64_t row = 8; row < 10; ++row) {
    for (std::int64_t h = 0; h < 4; ++h) {
      for (std::int64_t d = 0; d < 8; ++d) EXPECT_EQ(core::load(args.dq, row, h, d), 0.0);
    }
  }
}

TEST(Gradients, DenseSupportEqualsSelectingEveryBlock) {
  Inputs inputs(small(9));
  auto selected = inputs.args<SparseAttentionBackward>();
  const Outputs a(inputs, selected);
  auto dense = inputs.args<SparseAttentionBackward>();
  dense.block_ids = {};
  const Outputs b(inputs, dense);
  reference::sparse_attention_backward(selected);
  reference::sparse_attention_backward(dense);
  EXPECT_EQ(a.difference(b), "");
  auto kl_selected = inputs.args<IndexerKlBackward>();
  const Outputs c(inputs, kl_selected);
  auto kl_dense = inputs.args<IndexerKlBackward>();
  kl_dense.block_ids = {};
  const Outputs d(inputs, kl_dense);
  reference::indexer_kl_backward(kl_selected);
  reference::indexer_kl_backward(kl_dense);
  EXPECT_EQ(c.difference(d), "");
}

struct Grads {
  std::vector<double> dq, dk, dv;
};

Grads backward(Inputs& inputs, const std::vector<double>& dout) {
  auto args = inputs.args<SparseAttentionBackward>();
  const Outputs outputs(inputs, args);
  set_values(args.dout, dout);
  reference::sparse_attention_backward(args);
  return {values_of(args.dq), values_of(args.dk), values_of(args.dv)};
}

TEST(Gradients, OfZeroAreZero) {
  Inputs inputs(small(3));
  const auto size = static_cast<std::size_t>(inputs.dout.view().num_elements());
  const Grads grads = backward(inputs, std::vector<double>(size, 0.0));
  for (const auto* gradient : {&grads.dq, &grads.dk, &grads.dv}) {
    for (const double x : *gradient) EXPECT_EQ(x, 0.0);
  }
}

TEST(Gradients, AreLinearInDout) {
  Inputs inputs(small(3));
  const std::vector<double> x = values_of(inputs.dout);
  std::vector<double> y(x.size());
  std::vector<double> sum(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    y[i] = x[(7 * i + 3) % x.size()];
    sum[i] = 2.0 * x[i] - 0.5 * y[i];
  }
  const Grads of_x = backward(inputs, x);
  const Grads of_y = backward(inputs, y);
  const Grads of_sum = backward(inputs, sum);
  const auto expect = [&](const std::vector<double>& a, const std::vector<double>& b,
                          const std::vector<double>& c) {
    double largest = 0.0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      largest = std::max({largest, std::fabs(2.0 * a[i]), std::fabs(0.5 * b[i])});
    }
    // Sums over at most 130 tokens or 12 queries of 2 heads, of dot products of 8; each of the
    // three runs is within that many roundings of terms which `largest` stands for, 8 times over
    // for terms that cancel.
    const double tolerance = 3 * 8 * (130 + 12 * 2 + 8) * 0x1p-53 * largest;
    for (std::size_t i = 0; i < a.size(); ++i) {
      EXPECT_NEAR(c[i], 2.0 * a[i] - 0.5 * b[i], tolerance);
    }
  };
  expect(of_x.dq, of_y.dq, of_sum.dq);
  expect(of_x.dk, of_y.dk, of_sum.dk);
  expect(of_x.dv, of_y.dv, of_sum.dv);
}

// Scores may shift by a constant per row without effect, so the gradients of the scores sum to 0
// over a row; with a key of ones in one dimension that sum is the query's gradient there.
TEST(Gradients, OfScoresSumToZero) {
  Inputs inputs(small(3));
  const TensorView& k = inputs.k;
  for_each_index(k, [&](const auto& at) {
    if (at[2] == 0) core::store(k, 1.0, at[0], at[1], at[2]);
  });
  const Grads grads = backward(inputs, values_of(inputs.dout));
  double largest = 0.0;
  for (const double x : grads.dq) largest = std::max(largest, std::fabs(x));
  for (std::size_t i = 0; i < grads.dq.size(); i += 8) {
    // As above: up to 48 attended tokens of dot products of 8, and 8 times for cancelling terms.
    EXPECT_NEAR(grads.dq[i], 0.0, 8 * (48 + 8) * 0x1p-53 * largest);
  }
}

}  // namespace
}  // namespace msa::testing
