// SPDX-License-Identifier: Apache-2.0
//
// What the backend takes and declines, which SIMD target it uses, and that run() allocates nothing.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "core/tensor.hpp"
#include "msa/msa.hpp"
#include "tests/cpu/allocations.hpp"
#include "tests/cpu/targets.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

using core::HostBuffer;
using core::Tensor;

template <class Args>
void expect_run_allocates_nothing(Inputs& inputs) {
  auto args = inputs.args<Args>();
  const Outputs outputs(inputs, args);
  const auto plan = msa::plan(args, {.backend = "cpu"});
  const HostBuffer workspace(plan.workspace_bytes());
  plan.run(args, workspace.span());  // starts the pool's threads
  const std::int64_t before = num_allocations();
  plan.run(args, workspace.span());
  EXPECT_EQ(num_allocations() - before, 0) << core::operation_name(args);
}

TEST(CpuBackend, RunAllocatesNothing) {
  Inputs inputs({.sequences = {{90, 200}, {40, 40}}, .keys = Keys::paged});
  expect_run_allocates_nothing<IndexerScores>(inputs);
  expect_run_allocates_nothing<SelectTopK>(inputs);
  expect_run_allocates_nothing<Indexer>(inputs);
  expect_run_allocates_nothing<SparseAttentionForward>(inputs);
  expect_run_allocates_nothing<DenseAttentionForward>(inputs);
  expect_run_allocates_nothing<AppendKv>(inputs);
  Inputs ragged({.sequences = {{90, 200}, {40, 40}}});
  expect_run_allocates_nothing<SparseAttentionBackward>(ragged);
  expect_run_allocates_nothing<IndexerKlBackward>(ragged);
}

/// The reason for which the CPU backend declines `args`; "" where it takes them.
std::string refusal(const DenseAttentionForward& args) {
  try {
    static_cast<void>(msa::plan(args, {.backend = "cpu"}));
    return "";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::unsupported);
    return error.what();
  }
}

DenseAttentionForward dense_args() {
  const auto view = [](std::int64_t heads) {
    return TensorView::contiguous(nullptr, DType::f32, {}, {8, heads, 32});
  };
  return {.problem = {.num_q_heads = 4, .num_kv_heads = 2, .head_dim = 32},
          .q = view(4),
          .k = view(2),
          .v = view(2),
          .out = view(4)};
}

TEST(CpuBackend, DeclinesWithAReason) {
  EXPECT_EQ(refusal(dense_args()), "");
  DenseAttentionForward args = dense_args();
  args.q.dtype = DType::f64;
  EXPECT_NE(refusal(args).find("cpu: q is f64, not f32, f16 or bf16"), std::string::npos)
      << refusal(args);
  EXPECT_STREQ(msa::plan(args).implementation(), "reference");

  args = dense_args();
  args.k.dtype = DType::e4m3;
  EXPECT_NE(refusal(args).find("cpu: k is e4m3"), std::string::npos) << refusal(args);

  args = dense_args();
  args.v.stride = {128, 64, 2};
  EXPECT_NE(refusal(args).find("cpu: v has stride 2 in its last dimension, expected 1"),
            std::string::npos)
      << refusal(args);
  EXPECT_STREQ(msa::plan(args).implementation(), "reference");

  args = dense_args();
  for (TensorView* view : {&args.q, &args.k, &args.v, &args.out}) view->device = {DeviceType::cuda};
  EXPECT_NE(refusal(args).find("cpu: tensors are on cuda:0"), std::string::npos) << refusal(args);
}

TEST(CpuBackend, IsFirstChoiceForHostTensors) {
  EXPECT_STREQ(msa::plan(dense_args()).implementation(), "cpu");
}

#if defined(__x86_64__)
/// Ends the process with 0 where MSA_CPU_TARGET = kTargets[limit] is obeyed: that target, or the
/// best of the CPU if it is worse. The variable is read once per process, hence death tests.
constexpr std::array<const char*, 4> kTargets = {"AVX3", "AVX2", "SSE4", "SCALAR"};
[[noreturn]] void exit_with_target_below(std::size_t limit) {
  ::setenv("MSA_CPU_TARGET", kTargets[limit], 1);
  const std::string used = cpu::simd_target();
  const auto found =
      std::find(kTargets.begin() + static_cast<std::ptrdiff_t>(limit), kTargets.end(), used);
  if (found == kTargets.end()) std::exit(1);
  // Any x86-64 CPU that runs these tests in reasonable time has AVX2.
  std::exit(limit > 0 && used != kTargets[limit] ? 2 : 0);
}

TEST(CpuTargetDeathTest, EnvironmentNamesTheBestAllowedTarget) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  for (std::size_t limit = 0; limit < kTargets.size(); ++limit) {
    EXPECT_EXIT(exit_with_target_below(limit), ::testing::ExitedWithCode(0), "") << kTargets[limit];
  }
}
#endif

TEST(CpuTargetDeathTest, UnknownTargetIsAnErrorOfThePlan) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        ::setenv("MSA_CPU_TARGET", "AVX9", 1);
        try {
          static_cast<void>(msa::plan(dense_args()));
        } catch (const Error& error) {
          std::fputs(error.what(), stderr);
          std::exit(3);
        }
      },
      ::testing::ExitedWithCode(3), "MSA_CPU_TARGET is 'AVX9', expected one of ");
}

}  // namespace
}  // namespace msa::testing
