// SPDX-License-Identifier: Apache-2.0
//
// What an exact softmax over a support must satisfy.
#include <gtest/gtest.h>

#include <cmath>

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
          .sequences = {{9, 70}, {3, 40}, {20, 18}}};
}

/// Sums over up to 80 tokens of terms of magnitude `largest`, on both sides of a comparison.
double rounding(double largest) { return 2 * 80 * 0x1p-53 * largest; }

double largest_of(const std::vector<double>& values) {
  double largest = 0.0;
  for (const double x : values) largest = std::max(largest, std::fabs(x));
  return largest;
}

TEST(Softmax, EnoughSlotsForAllBlocksIsDenseAttention) {
  for (const int top_k : {5, 9}) {
    Inputs inputs(small(top_k));
    auto sparse = inputs.args<SparseAttentionForward>();
    const Outputs sparse_outputs(inputs, sparse);
    auto dense = inputs.args<DenseAttentionForward>();
    const Outputs dense_outputs(inputs, dense);
    reference::sparse_attention_forward(sparse);
    reference::dense_attention_forward(dense);
    EXPECT_EQ(sparse_outputs.difference(dense_outputs), "");
  }
}

TEST(Softmax, FewerSlotsAreNot) {
  Inputs inputs(small(2));
  auto sparse = inputs.args<SparseAttentionForward>();
  const Outputs sparse_outputs(inputs, sparse);
  auto dense = inputs.args<DenseAttentionForward>();
  const Outputs dense_outputs(inputs, dense);
  reference::sparse_attention_forward(sparse);
  reference::dense_attention_forward(dense);
  EXPECT_NE(sparse_outputs.difference(dense_outputs), "");
}

TEST(Softmax, ProbabilitiesSumToOne) {
  Inputs inputs(small(3));
  set_values(inputs.v,
             std::vector<double>(static_cast<std::size_t>(inputs.v.view().num_elements()), 1.0));
  auto args = inputs.args<SparseAttentionForward>();
  const Outputs outputs(inputs, args);
  reference::sparse_attention_forward(args);
  const core::Sequences sequences(args);
  for_each_index(args.out, [&](const auto& at) {
    const core::Sequence sequence = sequences.of_query(at[0]);
    const bool empty = sequence.position(at[0] - sequence.q_begin) < 0;
    // Numerator and denominator are the same sum.
    EXPECT_EQ(core::load(args.out, at[0], at[1], at[2]), empty ? 0.0 : 1.0);
  });
}

TEST(Softmax, ScalingVScalesOut) {
  Inputs inputs(small(3));
  auto args = inputs.args<SparseAttentionForward>();
  const Outputs outputs(inputs, args);
  reference::sparse_attention_forward(args);
  std::vector<double> expected = values_of(args.out);
  const std::vector<double> lse = values_of(args.lse);
  std::vector<double> v = values_of(args.v);
  for (double& x : v) x *= -4.0;  // a power of two: exact
  for (double& x : expected) x *= -4.0;
  set_values(args.v, v);
  reference::sparse_attention_forward(args);
  EXPECT_EQ(values_of(args.out), expected);
  EXPECT_EQ(values_of(args.lse), lse);
}

TEST(Softmax, AConstantAddedToAllScoresShiftsTheLseOnly) {
  // Every key gains the same vector u, so every score of a row gains scale * <q, u>.
  Inputs inputs(small(3));
  auto args = inputs.args<SparseAttentionForward>();
  const Outputs outputs(inputs, args);
  reference::sparse_attention_forward(args);
  const std::vector<double> out = values_of(args.out);
  const std::vector<double> lse = values_of(args.lse);
  for_each_index(args.k, [&](const auto& at) {
    core::store(args.k, core::load(args.k, at[0], at[1], at[2]) + 0.5, at[0], at[1], at[2]);
  });
  reference::sparse_attention_forward(args);
  const std::vector<double> shifted = values_of(args.out);
  for (std::size_t i = 0; i < out.size(); ++i) {
    EXPECT_NEAR(shifted[i], out[i], 8 * rounding(largest_of(out)));
  }
  std::size_t row = 0;
  for_each_index(args.lse, [&](const auto& at) {
    double shift = 0.0;
    for (int d = 0; d < 8; ++d) shift += 0.5 * core::load(args.q, at[0], at[1], d) / std::sqrt(8.0);
    const double actual = core::load(args.lse, at[0], at[1]);
    if (std::isinf(lse[row])) {
      EXPECT_EQ(actual, lse[row]);
    } else {
      EXPECT_NEAR(actual, lse[row] + shift, rounding(10.0));
    }
    ++row;
  });
}

// The two halves of a selection, merged by their LSEs, are the whole: what split kernels rely on.
TEST(Softmax, MergingTwoHalvesOfASelection) {
  Inputs inputs(small(4));
  auto whole = inputs.args<SparseAttentionForward>();
  const Outputs whole_outputs(inputs, whole);
  reference::sparse_attention_forward(whole);
  const std::vector<double> ids = values_of(whole.block_ids);
  std::vector<double> out[2];
  std::vector<double> lse[2];
  for (std::size_t half = 0; half < 2; ++half) {
    std::vector<double> part = ids;
    for (std::size_t i = 0; i < part.size(); ++i) part[i] = i % 2 == half ? part[i] : -1.0;
    set_values(inputs.block_ids, part);
    auto args = inputs.args<SparseAttentionForward>();
    const Outputs outputs(inputs, args);
    reference::sparse_attention_forward(args);
    out[half] = values_of(args.out);
    lse[half] = values_of(args.lse);
  }
  const std::vector<double> expected = values_of(whole.out);
  const std::vector<double> expected_lse = values_of(whole.lse);
  for (std::size_t row = 0; row < expected_lse.size(); ++row) {
    if (std::isinf(expected_lse[row])) continue;
    const double top = std::max(lse[0][row], lse[1][row]);
    const double merged = top + std::log(std::exp(lse[0][row] - top) + std::exp(lse[1][row] - top));
    EXPECT_NEAR(merged, expected_lse[row], rounding(10.0));
    for (std::size_t d = 0; d < 8; ++d) {
      const double value = out[0][row * 8 + d] * std::exp(lse[0][row] - merged) +
                           out[1][row * 8 + d] * std::exp(lse[1][row] - merged);
      EXPECT_NEAR(value, expected[row * 8 + d], 8 * rounding(largest_of(expected)));
    }
  }
}

TEST(Softmax, EveryOutputLiesBetweenTheSmallestAndLargestValue) {
  Inputs inputs(small(3));
  auto args = inputs.args<DenseAttentionForward>();
  const Outputs outputs(inputs, args);
  reference::dense_attention_forward(args);
  const double largest = largest_of(values_of(args.v));
  EXPECT_LE(largest_of(values_of(args.out)), largest + rounding(largest));
}

}  // namespace
}  // namespace msa::testing
