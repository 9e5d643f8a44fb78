// SPDX-License-Identifier: Apache-2.0
//
// What ops.hpp promises of the index branch, on values that can be checked by hand.
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

/// One index head of dimension 1 and query 1, so that a token's key is its score.
struct OneHead {
  Problem problem{.num_q_heads = 1,
                  .num_kv_heads = 1,
                  .head_dim = 1,
                  .index_dim = 1,
                  .block_size = 16,
                  .top_k = 3};
};

std::vector<double> scores_of(const std::vector<double>& keys, std::int64_t num_queries,
                              float scale = 1.0f) {
  const auto size = static_cast<std::int64_t>(keys.size());
  const core::Tensor index_q(DType::f64, {num_queries, 1, 1});
  const core::Tensor index_k(DType::f64, {size, 1, 1});
  const core::Tensor block_scores(DType::f64, {1, num_queries, (size + 15) / 16 + 1});
  set_values(index_q, std::vector<double>(static_cast<std::size_t>(num_queries), 1.0));
  set_values(index_k, keys);
  reference::indexer_scores({.problem = OneHead{}.problem,
                             .index_q = index_q,
                             .index_k = index_k,
                             .index_scale = scale,
                             .block_scores = block_scores});
  return values_of(block_scores);
}

TEST(IndexerScores, MaximumOverVisibleTokensOfEachBlock) {
  std::vector<double> keys(20, -5.0);
  keys[3] = 2.0;
  keys[17] = 1.0;
  keys[19] = 9.0;  // seen by the last query only
  EXPECT_EQ(scores_of(keys, 2), (std::vector<double>{2.0, 1.0, -kInf, 2.0, 9.0, -kInf}));
}

TEST(IndexerScores, BlocksBehindTheQueryAreMinusInfinity) {
  std::vector<double> keys(40, 1.0);
  const std::vector<double> scores = scores_of(keys, 40);
  for (std::size_t i = 0; i < 40; ++i) {
    for (std::size_t b = 0; b < 4; ++b) {
      EXPECT_EQ(scores[i * 4 + b], b <= i / 16 ? 1.0 : -kInf) << i << ' ' << b;
    }
  }
}

TEST(IndexerScores, NanNeverWins) {
  std::vector<double> keys(32, kNan);
  keys[5] = -3.0;
  EXPECT_EQ(scores_of(keys, 1), (std::vector<double>{-3.0, -kInf, -kInf}));
}

TEST(IndexerScores, InfinitiesAreScores) {
  std::vector<double> keys(32, -kInf);
  keys[20] = kInf;
  EXPECT_EQ(scores_of(keys, 1), (std::vector<double>{-kInf, kInf, -kInf}));
}

TEST(IndexerScores, ScaleAndItsDefault) {
  EXPECT_EQ(scores_of({3.0}, 1, 0.5f)[0], 1.5);
  EXPECT_EQ(scores_of({3.0}, 1, 0.0f)[0], 3.0);  // 1 / sqrt(1)
  Inputs inputs(Case{.dtype = DType::f64, .sequences = {{4, 40}}});
  auto by_default = inputs.args<IndexerScores>();
  const Outputs a(inputs, by_default);
  auto given = inputs.args<IndexerScores>();
  given.index_scale = 0.125f;  // 1 / sqrt(64), exactly
  const Outputs b(inputs, given);
  reference::indexer_scores(by_default);
  reference::indexer_scores(given);
  EXPECT_EQ(a.difference(b), "");
}

TEST(IndexerScores, QueriesBeforeTheFirstKeySeeNothing) {
  const std::vector<double> scores = scores_of({7.0, 8.0}, 4);
  EXPECT_EQ(scores, (std::vector<double>{-kInf, -kInf, -kInf, -kInf, 7.0, -kInf, 8.0, -kInf}));
}

TEST(IndexerScores, HeadsUseTheirOwnQueryAndOneKey) {
  const Problem problem{.num_q_heads = 2,
                        .num_kv_heads = 2,
                        .head_dim = 1,
                        .index_dim = 2,
                        .block_size = 16,
                        .top_k = 1};
  const core::Tensor index_q(DType::f64, {1, 2, 2});
  const core::Tensor index_k(DType::f64, {1, 1, 2});
  const core::Tensor block_scores(DType::f64, {2, 1, 1});
  set_values(index_q, {1.0, 0.0, 0.0, -2.0});
  set_values(index_k, {5.0, 7.0});
  reference::indexer_scores({.problem = problem,
                             .index_q = index_q,
                             .index_k = index_k,
                             .index_scale = 1.0f,
                             .block_scores = block_scores});
  EXPECT_EQ(values_of(block_scores), (std::vector<double>{5.0, -14.0}));
}

/// Ids of one query at the end of `num_tokens` keys.
std::vector<double> select(const std::vector<double>& scores, std::int32_t num_tokens,
                           Problem problem) {
  const core::Tensor block_scores(DType::f64, {1, 1, static_cast<std::int64_t>(scores.size())});
  const core::Tensor lengths(DType::i32, {1});
  const core::Tensor block_ids(DType::i32, {1, 1, problem.top_k});
  set_values(block_scores, scores);
  core::store_i32(lengths, num_tokens, 0);
  reference::select_top_k({.problem = problem,
                           .batch = {.seq_lens_k = lengths},
                           .block_scores = block_scores,
                           .block_ids = block_ids});
  return values_of(block_ids);
}

using Ids = std::vector<double>;

TEST(SelectTopK, BestBlocksAscendingWithTheLocalOne) {
  EXPECT_EQ(select({1, 9, 3, 8, -100}, 5 * 16, OneHead{}.problem), (Ids{1, 3, 4}));
}

TEST(SelectTopK, LocalBlockTakesASlotEvenIfItIsBest) {
  EXPECT_EQ(select({1, 9, 3, 8, 100}, 5 * 16, OneHead{}.problem), (Ids{1, 3, 4}));
}

TEST(SelectTopK, FewBlocksThenMinusOne) {
  EXPECT_EQ(select({1, 2}, 17, OneHead{}.problem), (Ids{0, 1, -1}));
  EXPECT_EQ(select({1, 2}, 16, OneHead{}.problem), (Ids{0, -1, -1}));
  EXPECT_EQ(select({1, 2}, 0, OneHead{}.problem), (Ids{-1, -1, -1}));
}

TEST(SelectTopK, OnlyVisibleBlocksAreTaken) {
  EXPECT_EQ(select({1, 2, 3, kInf, kInf}, 2 * 16, OneHead{}.problem), (Ids{0, 1, -1}));
}

TEST(SelectTopK, TiesGoToTheLowestId) {
  EXPECT_EQ(select({4, 4, 4, 4, 4}, 5 * 16, OneHead{}.problem), (Ids{0, 1, 4}));
  EXPECT_EQ(select({-0.0, 0.0, -0.0, 0.0, 0}, 5 * 16, OneHead{}.problem), (Ids{0, 1, 4}));
  EXPECT_EQ(select({-kInf, kInf, kInf, kInf, 0}, 5 * 16, OneHead{}.problem), (Ids{1, 2, 4}));
}

TEST(SelectTopK, NanRanksBelowMinusInfinityButBeforeAnEmptySlot) {
  EXPECT_EQ(select({kNan, -kInf, kNan, -1, 0}, 5 * 16, OneHead{}.problem), (Ids{1, 3, 4}));
  EXPECT_EQ(select({kNan, kNan, -kInf, kNan, kNan}, 5 * 16, OneHead{}.problem), (Ids{0, 2, 4}));
  EXPECT_EQ(select({kNan, -kInf, 0}, 3 * 16, OneHead{}.problem), (Ids{0, 1, 2}));
}

TEST(SelectTopK, InitBlocksAreForced) {
  Problem problem = OneHead{}.problem;
  problem.num_init_blocks = 1;
  EXPECT_EQ(select({-kInf, 1, 2, 3, 0}, 5 * 16, problem), (Ids{0, 3, 4}));
  problem.num_init_blocks = 2;
  EXPECT_EQ(select({kNan, kNan, 2, 3, 0}, 5 * 16, problem), (Ids{0, 1, 4}));
}

TEST(SelectTopK, LocalBlocksAreForcedAndMayOverlapInitBlocks) {
  Problem problem = OneHead{}.problem;
  problem.num_local_blocks = 2;
  EXPECT_EQ(select({5, 9, 7, -kInf, 0}, 5 * 16, problem), (Ids{1, 3, 4}));
  problem.num_init_blocks = 1;
  EXPECT_EQ(select({-1, 3, 2}, 3 * 16, problem), (Ids{0, 1, 2}));
  EXPECT_EQ(select({-1, 3, 2}, 1, problem), (Ids{0, -1, -1}));
}

TEST(SelectTopK, TopKOfOneIsTheLocalBlock) {
  Problem problem = OneHead{}.problem;
  problem.top_k = 1;
  EXPECT_EQ(select({9, 8, 0}, 3 * 16, problem), (Ids{2}));
}

TEST(Indexer, TiesAreTiesOfF32Scores) {
  // Block 1 is better by less than f32 tells apart, as block_scores in between would not either.
  const core::Tensor index_q(DType::f64, {1, 1, 1});
  const core::Tensor index_k(DType::f64, {48, 1, 1});
  const core::Tensor block_ids(DType::i32, {1, 1, 2});
  set_values(index_q, {1.0});
  core::store(index_k.view(), 1.0, 0, 0, 0);
  core::store(index_k.view(), 1.0 + 1e-12, 16, 0, 0);
  Problem problem = OneHead{}.problem;
  problem.top_k = 2;
  const Indexer args{
      .problem = problem, .index_q = index_q, .index_k = index_k, .block_ids = block_ids};
  reference::indexer(args);
  EXPECT_EQ(values_of(block_ids), (Ids{0, 2}));
  core::store(index_k.view(), 1.0 + 1e-6, 16, 0, 0);
  reference::indexer(args);
  EXPECT_EQ(values_of(block_ids), (Ids{1, 2}));
}

class IndexerCase : public ::testing::TestWithParam<Case> {};

TEST_P(IndexerCase, EqualsScoresThenSelection) {
  Inputs inputs(GetParam());
  ASSERT_TRUE(inputs.supports<SelectTopK>());
  auto scores = inputs.args<IndexerScores>();
  const Outputs score_outputs(inputs, scores);
  reference::indexer_scores(scores);
  auto selection = inputs.args<SelectTopK>();
  selection.block_scores = scores.block_scores;
  const Outputs two_steps(inputs, selection);
  reference::select_top_k(selection);
  auto indexer = inputs.args<Indexer>();
  const Outputs one_step(inputs, indexer);
  reference::indexer(indexer);
  EXPECT_EQ(one_step.difference(two_steps), "");
}

INSTANTIATE_TEST_SUITE_P(Table, IndexerCase, ::testing::ValuesIn([] {
                           std::vector<Case> cases = all_cases();
                           std::erase_if(cases, [](const Case& c) {
                             return !c.give_offsets && c.keys == Keys::ragged;
                           });
                           return cases;
                         }()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace msa::testing
