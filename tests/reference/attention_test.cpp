// SPDX-License-Identifier: Apache-2.0
//
// What ops.hpp promises of the attention operations, on values that can be checked by hand.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/scalar.hpp"
#include "reference/reference.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

/// One head of dimension 1 and queries of 1: a token's key is its score, its value what it adds.
struct Attention {
  Attention(const std::vector<double>& keys, const std::vector<double>& values,
            std::int64_t num_queries, DType dtype = DType::f64)
      : total_k(static_cast<std::int64_t>(keys.size())),
        q(dtype, {num_queries, 1, 1}),
        k(dtype, {total_k, 1, 1}),
        v(dtype, {total_k, 1, 1}),
        block_ids(DType::i32, {1, num_queries, 4}),
        out(DType::f64, {num_queries, 1, 1}),
        lse(DType::f64, {num_queries, 1}) {
    set_values(q, std::vector<double>(static_cast<std::size_t>(num_queries), 1.0));
    set_values(k, keys);
    set_values(v, values);
    set_values(out, std::vector<double>(static_cast<std::size_t>(num_queries), 77.0));
    set_values(lse, std::vector<double>(static_cast<std::size_t>(num_queries), 77.0));
  }

  void run(const std::vector<double>& ids, float scale = 1.0f,
           reference::Rounding rounding = reference::Rounding::exact) {
    set_values(block_ids, ids);
    reference::sparse_attention_forward({.problem = problem,
                                         .q = q,
                                         .k = k,
                                         .v = v,
                                         .block_ids = block_ids,
                                         .softmax_scale = scale,
                                         .out = out,
                                         .lse = lse},
                                        rounding);
  }

  double out_of(std::int64_t i) const { return core::load(out.view(), i, 0, 0); }
  double lse_of(std::int64_t i) const { return core::load(lse.view(), i, 0); }

  Problem problem{.num_q_heads = 1,
                  .num_kv_heads = 1,
                  .head_dim = 1,
                  .index_dim = 1,
                  .block_size = 16,
                  .top_k = 4};
  std::int64_t total_k;
  core::Tensor q, k, v, block_ids, out, lse;
};

std::vector<double> constant(std::size_t count, double value) {
  return std::vector<double>(count, value);
}

/// A few operations on numbers near 1, each within 2^-53.
constexpr double kFewRoundings = 8 * 0x1p-53;

TEST(Attention, SoftmaxOfTwoTokens) {
  Attention attention({0.0, std::log(3.0)}, {1.0, 5.0}, 1);
  attention.run({0, -1, -1, -1});
  EXPECT_NEAR(attention.out_of(0), (1.0 + 3.0 * 5.0) / 4.0, 4 * kFewRoundings);
  EXPECT_NEAR(attention.lse_of(0), std::log(4.0), kFewRoundings);  // natural log
}

TEST(Attention, ScaleAndItsDefault) {
  Attention attention({0.0, 2.0 * std::log(3.0)}, {1.0, 5.0}, 1);
  attention.run({0, -1, -1, -1}, 0.5f);
  EXPECT_NEAR(attention.out_of(0), 4.0, 4 * kFewRoundings);
  Inputs inputs(Case{.dtype = DType::f64, .sequences = {{4, 40}}});
  auto by_default = inputs.args<SparseAttentionForward>();
  const Outputs a(inputs, by_default);
  auto given = inputs.args<SparseAttentionForward>();
  given.softmax_scale = 0.125f;  // 1 / sqrt(64), exactly
  const Outputs b(inputs, given);
  reference::sparse_attention_forward(by_default);
  reference::sparse_attention_forward(given);
  EXPECT_EQ(a.difference(b), "");
}

TEST(Attention, CausalWithinTheLocalBlock) {
  Attention attention(constant(3, 0.0), {1.0, 2.0, 6.0}, 3);
  attention.run({0, -1, -1, -1, 0, -1, -1, -1, 0, -1, -1, -1});
  EXPECT_EQ(attention.out_of(0), 1.0);
  EXPECT_EQ(attention.out_of(1), 1.5);
  EXPECT_EQ(attention.out_of(2), 3.0);
}

TEST(Attention, EmptyRowsAreZeroWithLseMinusInfinity) {
  Attention attention(constant(20, 0.0), constant(20, 5.0), 20);
  attention.run(constant(80, -1.0));
  for (std::int64_t i = 0; i < 20; ++i) {
    EXPECT_EQ(attention.out_of(i), 0.0);
    EXPECT_FALSE(std::signbit(attention.out_of(i)));
    EXPECT_EQ(attention.lse_of(i), -kInf);
  }
}

TEST(Attention, QueriesBeforeTheFirstKeyAreEmptyRows) {
  Attention attention({0.0}, {5.0}, 3);
  attention.run(constant(12, 0.0));
  EXPECT_EQ(attention.out_of(0), 0.0);
  EXPECT_EQ(attention.lse_of(1), -kInf);
  Attention none({}, {}, 2);
  none.run(constant(8, -1.0));
  EXPECT_EQ(none.out_of(1), 0.0);
}

TEST(Attention, IdsThatTheQueryCannotSeeAreSkipped) {
  std::vector<double> values(48);
  for (std::size_t j = 0; j < values.size(); ++j) values[j] = j < 16 ? 1.0 : j < 32 ? 2.0 : kNan;
  Attention attention(constant(48, 0.0), values, 17);  // the first query stands at 31
  attention.problem.top_k = 4;
  std::vector<double> ids(17 * 4, -1.0);
  ids[0] = 2;  // not yet visible
  ids[1] = 0;
  ids[2] = std::numeric_limits<std::int32_t>::max();
  ids[3] = std::numeric_limits<std::int32_t>::min();
  attention.run(ids);
  EXPECT_EQ(attention.out_of(0), 1.0);
}

TEST(Attention, TheLocalBlockIsNotAddedToWhatIsGiven) {
  std::vector<double> values(32, 2.0);
  std::fill(values.begin(), values.begin() + 16, 1.0);
  Attention attention(constant(32, 0.0), values, 1);
  attention.run({0, -1, -1, -1});
  EXPECT_EQ(attention.out_of(0), 1.0);
}

TEST(Attention, KeysWithScoreMinusInfinityWeighNothing) {
  Attention attention({-kInf, 0.0, -kInf}, {9.0, 4.0, 9.0}, 3);
  attention.run({0, -1, -1, -1, 0, -1, -1, -1, 0, -1, -1, -1});
  EXPECT_EQ(attention.out_of(0), 0.0);  // a row of only such keys is an empty row
  EXPECT_EQ(attention.lse_of(0), -kInf);
  EXPECT_EQ(attention.out_of(1), 4.0);
  EXPECT_EQ(attention.out_of(2), 4.0);
  EXPECT_EQ(attention.lse_of(2), 0.0);
}

TEST(Attention, NanAndPlusInfinityScoresMakeTheRowNan) {
  for (const double score : {kNan, kInf}) {
    Attention attention({0.0, 1.0, score}, {1.0, 2.0, 3.0}, 2);
    attention.run({0, -1, -1, -1, 0, -1, -1, -1});
    EXPECT_TRUE(std::isfinite(attention.out_of(0)));
    EXPECT_TRUE(std::isnan(attention.out_of(1)));
    EXPECT_TRUE(std::isnan(attention.lse_of(1)));
  }
}

TEST(Attention, HugeScoresDoNotOverflow) {
  Attention attention({1e20, 3e20, -1e20}, {1.0, 2.0, 3.0}, 1);
  attention.run({0, -1, -1, -1});
  EXPECT_EQ(attention.out_of(0), 2.0);
  EXPECT_EQ(attention.lse_of(0), 3e20);
}

TEST(Attention, LseIsOptional) {
  Attention attention({0.0, 0.0}, {1.0, 3.0}, 1);
  set_values(attention.block_ids, {0, -1, -1, -1});
  reference::sparse_attention_forward({.problem = attention.problem,
                                       .q = attention.q,
                                       .k = attention.k,
                                       .v = attention.v,
                                       .block_ids = attention.block_ids,
                                       .out = attention.out});
  EXPECT_EQ(attention.out_of(0), 2.0);
  reference::dense_attention_forward({.problem = attention.problem,
                                      .q = attention.q,
                                      .k = attention.k,
                                      .v = attention.v,
                                      .out = attention.out});
  EXPECT_EQ(attention.out_of(0), 2.0);
}

TEST(Attention, ReadsE4m3Keys) {
  Attention attention({1.0, -0.5}, {0.25, 448.0}, 1);
  const core::Tensor k(DType::e4m3, {2, 1, 1});
  const core::Tensor v(DType::e4m3, {2, 1, 1});
  set_values(k, values_of(attention.k));
  set_values(v, values_of(attention.v));
  attention.run({0, -1, -1, -1});
  const double expected = attention.out_of(0);
  reference::sparse_attention_forward({.problem = attention.problem,
                                       .q = attention.q,
                                       .k = k,
                                       .v = v,
                                       .block_ids = attention.block_ids,
                                       .softmax_scale = 1.0f,
                                       .out = attention.out});
  EXPECT_EQ(attention.out_of(0), expected);
}

TEST(Attention, MultipliesE4m3ByTheScaleOfItsHead) {
  const Problem problem{.num_q_heads = 2,
                        .num_kv_heads = 2,
                        .head_dim = 1,
                        .index_dim = 1,
                        .block_size = 16,
                        .top_k = 1};
  const core::Tensor q(DType::f64, {1, 2, 1});
  const core::Tensor k(DType::e4m3, {1, 2, 1});
  const core::Tensor v(DType::e4m3, {1, 2, 1});
  const core::Tensor block_ids(DType::i32, {2, 1, 1});
  const core::Tensor k_scale(DType::f32, {2});
  const core::Tensor v_scale(DType::f32, {1});
  const core::Tensor out(DType::f64, {1, 2, 1});
  const core::Tensor lse(DType::f64, {1, 2});
  set_values(q, {1.0, 1.0});
  set_values(k, {1.0, 1.0});
  set_values(v, {3.0, -5.0});
  set_values(k_scale, {0.25, 8.0});
  set_values(v_scale, {0.5});
  core::store_i32(block_ids, 0, 0, 0, 0);
  core::store_i32(block_ids, 0, 1, 0, 0);
  TensorView one_scale = v_scale;  // of all heads
  one_scale.shape[0] = 2;
  one_scale.stride[0] = 0;
  reference::sparse_attention_forward({.problem = problem,
                                       .q = q,
                                       .k = k,
                                       .v = v,
                                       .block_ids = block_ids,
                                       .softmax_scale = 1.0f,
                                       .out = out,
                                       .lse = lse,
                                       .k_scale = k_scale,
                                       .v_scale = one_scale});
  EXPECT_EQ(values_of(out), (std::vector<double>{1.5, -2.5}));
  EXPECT_EQ(values_of(lse), (std::vector<double>{0.25, 8.0}));
}

TEST(Attention, GroupsOfHeadsShareOneKvHead) {
  const Problem problem{.num_q_heads = 4,
                        .num_kv_heads = 2,
                        .head_dim = 1,
                        .index_dim = 1,
                        .block_size = 16,
                        .top_k = 1};
  const core::Tensor q(DType::f64, {1, 4, 1});
  const core::Tensor k(DType::f64, {1, 2, 1});
  const core::Tensor v(DType::f64, {1, 2, 1});
  const core::Tensor out(DType::f64, {1, 4, 1});
  const core::Tensor block_ids(DType::i32, {2, 1, 1});
  set_values(v, {3.0, 8.0});
  set_values(block_ids, {0, -1});
  reference::dense_attention_forward({.problem = problem, .q = q, .k = k, .v = v, .out = out});
  EXPECT_EQ(values_of(out), (std::vector<double>{3.0, 3.0, 8.0, 8.0}));
  // Each KV head has its own selection.
  reference::sparse_attention_forward(
      {.problem = problem, .q = q, .k = k, .v = v, .block_ids = block_ids, .out = out});
  EXPECT_EQ(values_of(out), (std::vector<double>{3.0, 3.0, 0.0, 0.0}));
}

TEST(Attention, Bf16RoundingRoundsProbabilitiesButNotTheirSum) {
  // p = {1, exp(-1)}; rounded to bf16, exp(-1) = 0.36787... becomes 0.3671875.
  Attention attention({0.0, -1.0}, {0.0, 1.0}, 1);
  attention.run({0, -1, -1, -1}, 1.0f, reference::Rounding::bf16);
  const double expected = 0.3671875 / (1.0 + std::exp(-1.0));
  EXPECT_EQ(attention.out_of(0), static_cast<double>(static_cast<float>(expected)));
  attention.run({0, -1, -1, -1});
  EXPECT_NEAR(attention.out_of(0), std::exp(-1.0) / (1.0 + std::exp(-1.0)), kFewRoundings);
}

TEST(SparseAttentionBackward, OutAndLseAreNotRead) {
  Inputs inputs(Case{.dtype = DType::f64, .sequences = {{4, 40}}});
  auto args = inputs.args<SparseAttentionBackward>();
  const Outputs a(inputs, args);
  reference::sparse_attention_backward(args);
  auto poisoned = inputs.args<SparseAttentionBackward>();
  const Outputs b(inputs, poisoned);
  set_values(poisoned.out, constant(static_cast<std::size_t>(args.out.num_elements()), kNan));
  set_values(poisoned.lse, constant(static_cast<std::size_t>(args.lse.num_elements()), kNan));
  reference::sparse_attention_backward(poisoned);
  EXPECT_EQ(a.difference(b), "");
}

}  // namespace
}  // namespace msa::testing
