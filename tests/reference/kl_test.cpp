// SPDX-License-Identifier: Apache-2.0
//
// What ops.hpp promises of the KL alignment loss, on values that can be checked by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "core/scalar.hpp"
#include "reference/reference.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

/// One query at the end of two tokens, heads of dimension 1: keys are logits.
struct Alignment {
  explicit Alignment(int group_size)
      : problem{.num_q_heads = group_size,
                .num_kv_heads = 1,
                .head_dim = 1,
                .index_dim = 1,
                .block_size = 16,
                .top_k = 1},
        q(DType::f64, {1, group_size, 1}),
        block_ids(DType::i32, {1, 1, 1}) {
    set_values(q, std::vector<double>(static_cast<std::size_t>(group_size), 1.0));
    set_values(index_q, {1.0});
  }

  IndexerKlBackward run(float coefficient = 1.0f) {
    IndexerKlBackward args{.problem = problem,
                           .q = q,
                           .k = k,
                           .index_q = index_q,
                           .index_k = index_k,
                           .block_ids = block_ids,
                           .softmax_scale = 1.0f,
                           .index_scale = 1.0f,
                           .loss_coefficient = coefficient,
                           .loss = loss,
                           .dindex_q = dindex_q,
                           .dindex_k = dindex_k};
    reference::indexer_kl_backward(args);
    return args;
  }

  Problem problem;
  core::Tensor q;
  core::Tensor k{DType::f64, {2, 1, 1}};
  core::Tensor index_q{DType::f64, {1, 1, 1}};
  core::Tensor index_k{DType::f64, {2, 1, 1}};
  core::Tensor block_ids;
  core::Tensor loss{DType::f64, {1}};
  core::Tensor dindex_q{DType::f64, {1, 1, 1}};
  core::Tensor dindex_k{DType::f64, {2, 1, 1}};
};

/// A few operations on numbers near 1, each within 2^-53.
constexpr double kFewRoundings = 16 * 0x1p-53;

TEST(IndexerKl, OneHeadByHand) {
  Alignment alignment(1);
  set_values(alignment.k, {0.0, std::log(3.0)});        // teacher 1/4, 3/4
  set_values(alignment.index_k, {0.0, std::log(1.0)});  // student 1/2, 1/2
  alignment.run();
  EXPECT_NEAR(core::load(alignment.loss.view(), 0), 0.25 * std::log(0.5) + 0.75 * std::log(1.5),
              kFewRoundings);
  // dS = student - teacher = {1/4, -1/4}; the query is 1 and so are the keys' factors.
  EXPECT_NEAR(core::load(alignment.dindex_k.view(), 0, 0, 0), 0.25, kFewRoundings);
  EXPECT_NEAR(core::load(alignment.dindex_k.view(), 1, 0, 0), -0.25, kFewRoundings);
  EXPECT_NEAR(core::load(alignment.dindex_q.view(), 0, 0, 0), 0.0, kFewRoundings);
}

TEST(IndexerKl, TeacherIsTheMeanOfTheHeadsSoftmaxes) {
  Alignment alignment(2);
  set_values(alignment.q, {0.0, 1.0});            // the first head is uniform
  set_values(alignment.k, {0.0, std::log(3.0)});  // mean of {1/2, 1/2} and {1/4, 3/4}
  set_values(alignment.index_k, {0.0, std::log(5.0 / 3.0)});
  alignment.run();
  EXPECT_NEAR(core::load(alignment.loss.view(), 0), 0.0, kFewRoundings);  // the student agrees
  EXPECT_NEAR(core::load(alignment.dindex_k.view(), 0, 0, 0), 0.0, kFewRoundings);
}

TEST(IndexerKl, ATeacherWithoutMassOnATokenAddsNothingThere) {
  Alignment alignment(1);
  set_values(alignment.k, {-1e9, 0.0});  // exp underflows to exactly 0
  set_values(alignment.index_k, {0.0, 0.0});
  alignment.run();
  EXPECT_NEAR(core::load(alignment.loss.view(), 0), std::log(2.0), kFewRoundings);
}

TEST(IndexerKl, RowsWithoutSupportAddNothing) {
  Alignment alignment(1);
  set_values(alignment.k, {1.0, 2.0});
  set_values(alignment.index_k, {2.0, 1.0});
  core::store_i32(alignment.block_ids.view(), -1, 0, 0, 0);
  alignment.run();
  EXPECT_EQ(core::load(alignment.loss.view(), 0), 0.0);
  EXPECT_EQ(core::load(alignment.dindex_q.view(), 0, 0, 0), 0.0);
  EXPECT_EQ(core::load(alignment.dindex_k.view(), 1, 0, 0), 0.0);
}

TEST(IndexerKl, ScalesWithTheCoefficient) {
  Alignment alignment(1);
  set_values(alignment.k, {0.0, 1.0});
  set_values(alignment.index_k, {1.0, 0.0});
  alignment.run(1.0f);
  const double loss = core::load(alignment.loss.view(), 0);
  const double gradient = core::load(alignment.dindex_k.view(), 0, 0, 0);
  alignment.run(0.25f);  // a power of two: exact
  EXPECT_EQ(core::load(alignment.loss.view(), 0), 0.25 * loss);
  EXPECT_EQ(core::load(alignment.dindex_k.view(), 0, 0, 0), 0.25 * gradient);
}

TEST(IndexerKl, LossAndGradientsAreOptional) {
  Inputs inputs(Case{.dtype = DType::f64, .sequences = {{4, 40}}});
  auto both = inputs.args<IndexerKlBackward>();
  const Outputs outputs(inputs, both);
  reference::indexer_kl_backward(both);
  const double loss = core::load(both.loss, 0);
  const std::vector<double> gradient = values_of(both.dindex_k);
  auto one = inputs.args<IndexerKlBackward>();
  const Outputs other_outputs(inputs, one);
  IndexerKlBackward only_loss = one;
  only_loss.dindex_q = only_loss.dindex_k = {};
  reference::indexer_kl_backward(only_loss);
  EXPECT_EQ(core::load(one.loss, 0), loss);
  IndexerKlBackward only_gradients = one;
  only_gradients.loss = {};
  reference::indexer_kl_backward(only_gradients);
  EXPECT_EQ(values_of(one.dindex_k), gradient);
}

TEST(IndexerKl, NoQueriesAtAll) {
  Inputs inputs(Case{.dtype = DType::f64, .sequences = {{0, 17}}});
  auto args = inputs.args<IndexerKlBackward>();
  const Outputs outputs(inputs, args);
  reference::indexer_kl_backward(args);
  EXPECT_EQ(core::load(args.loss, 0), 0.0);
  for (const double x : values_of(args.dindex_k)) EXPECT_EQ(x, 0.0);
}

/// The loss is never negative, beyond the rounding of a sum of terms that cancel: at most
/// total_q * heads * support terms of magnitude p * |log p| <= 1/e, divided by the row count.
TEST(IndexerKl, IsNotNegative) {
  for (const Case& spec : all_cases()) {
    if (spec.dtype != DType::f16 || spec.keys != Keys::ragged || spec.values != Values::normal) {
      continue;
    }
    Inputs inputs(spec);
    auto args = inputs.args<IndexerKlBackward>();
    const Outputs outputs(inputs, args, /*wide=*/true);
    args.dindex_q = args.dindex_k = {};
    reference::indexer_kl_backward(args);
    const double tokens = static_cast<double>(spec.problem.top_k * spec.problem.block_size);
    EXPECT_GE(core::load(args.loss, 0), -2 * tokens * tokens * 0x1p-53) << spec;
  }
}

}  // namespace
}  // namespace msa::testing
