// SPDX-License-Identifier: Apache-2.0
//
// What plan() and Plan::run() check, and how an implementation is chosen.
#include <gtest/gtest.h>

#include "core/operation.hpp"
#include "dispatch/lists.hpp"
#include "msa/backend.hpp"
#include "msa/error.hpp"
#include "tests/support/inputs.hpp"

namespace msa {
namespace {

using testing::Case;
using testing::Inputs;
using testing::Outputs;

class PlanTest : public ::testing::Test {
 protected:
  Inputs inputs_{Case{.sequences = {{3, 20}}, .row_gap = 0}};
  DenseAttentionForward args_ = inputs_.args<DenseAttentionForward>();
  Outputs outputs_{inputs_, args_};
};

template <class Call>
void expect_error(ErrorCode code, const std::string& text, Call call) {
  try {
    call();
    ADD_FAILURE() << "no error; expected: " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code);
    EXPECT_EQ(std::string(error.what()), text);
  }
}

TEST_F(PlanTest, ForcedBackend) {
  const auto plan = msa::plan(args_, {.backend = "reference"});
  EXPECT_STREQ(plan.implementation(), "reference");
  EXPECT_EQ(plan.workspace_bytes(), 0u);
  EXPECT_NO_THROW(plan.run(args_));
}

TEST_F(PlanTest, UnknownBackendListsTheNames) {
  try {
    (void)msa::plan(args_, {.backend = "abacus"});
    ADD_FAILURE();
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_TRUE(text.starts_with(
        "plan(DenseAttentionForward): no implementation is named 'abacus', there are: "))
        << text;
    EXPECT_TRUE(text.ends_with("cpu, reference")) << text;
  }
}

TEST_F(PlanTest, RefusalsOfAllImplementationsAreListed) {
  DenseAttentionForward args = args_;
  core::for_each_tensor(args, [&](const char*, const TensorView& view, core::Use) {
    if (view.given()) const_cast<TensorView&>(view).device = {DeviceType::cuda, 1};
  });
  try {
    (void)msa::plan(args);
    ADD_FAILURE();
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    EXPECT_NE(text.find("reference: tensors are on cuda:1"), std::string::npos) << text;
    EXPECT_NE(text.find("cpu: "), std::string::npos) << text;
  }
}

TEST_F(PlanTest, RunRefusesMisalignedElements) {
  const auto plan = msa::plan(args_, {.backend = "reference"});
  DenseAttentionForward args = args_;
  args.k.data = static_cast<std::byte*>(args.k.data) + 2;
  expect_error(ErrorCode::invalid_argument,
               "run(DenseAttentionForward): k is not aligned to its elements of 4 bytes",
               [&] { plan.run(args); });
}

TEST_F(PlanTest, InvalidIsNotUnsupported) {
  args_.out.shape[2] = 7;
  expect_error(ErrorCode::invalid_argument,
               "DenseAttentionForward: out has shape [3, 4, 7], expected [total_q=3, "
               "num_q_heads=4, head_dim=64]",
               [&] { (void)msa::plan(args_); });
}

TEST_F(PlanTest, RunRefusesWhatWasNotPlanned) {
  const auto plan = msa::plan(args_, {.backend = "reference"});
  DenseAttentionForward changed = args_;
  changed.k.stride[0] += 1;
  expect_error(ErrorCode::invalid_argument,
               "run(DenseAttentionForward): k is f32[20, 2, 64], planned was f32[20, 2, 64] (or "
               "its strides differ)",
               [&] { plan.run(changed); });
  changed = args_;
  changed.lse = {};
  expect_error(ErrorCode::invalid_argument,
               "run(DenseAttentionForward): lse is f32[], planned was f32[3, 4] (or its strides "
               "differ)",
               [&] { plan.run(changed); });
  changed = args_;
  changed.v.data = nullptr;
  expect_error(ErrorCode::invalid_argument, "run(DenseAttentionForward): v has a null pointer",
               [&] { plan.run(changed); });
  changed = args_;
  changed.problem.num_init_blocks = 1;
  expect_error(ErrorCode::invalid_argument,
               "run(DenseAttentionForward): problem differs from the planned one",
               [&] { plan.run(changed); });
}

TEST_F(PlanTest, EmptyPlan) {
  const Plan<DenseAttentionForward> plan;
  EXPECT_STREQ(plan.implementation(), "none");
  EXPECT_EQ(plan.workspace_bytes(), 0u);
  expect_error(ErrorCode::invalid_argument,
               "run(DenseAttentionForward): the plan is empty; make it with plan()",
               [&] { plan.run(args_); });
}

TEST(SupportMatrix, EndsEveryListWithTheReference) {
  dispatch::for_each_operation([]<class Args>(const Args& args) {
    const auto list = dispatch::implementations_of<Args>();
    ASSERT_FALSE(list.empty()) << core::operation_name(args);
    EXPECT_STREQ(list.back()->name, "reference");
  });
  EXPECT_GE(implementations().size(), 8u);
  bool found = false;
  for (const ImplementationInfo& row : implementations()) {
    found = found || (std::string(row.operation) == "IndexerKlBackward" &&
                      std::string(row.implementation) == "reference");
  }
  EXPECT_TRUE(found);
}

TEST(Backends, ReferenceIsThereAlways) {
  for (const BackendInfo& backend : backends()) {
    if (std::string(backend.name) == "reference") {
      EXPECT_TRUE(backend.available);
    }
    EXPECT_FALSE(backend.detail.empty()) << backend.name;
  }
}

}  // namespace
}  // namespace msa
