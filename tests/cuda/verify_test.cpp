// SPDX-License-Identifier: Apache-2.0
//
// Every case on both GPU backends, judged by the reference: values, guard bands, NaN poison in
// everything that must not be read, repeated runs and a graph replay bitwise equal. A backend may
// decline a request, with a reason that is printed and counted; what it has promised to take
// (must_take) is a failure if declined.
#include "tests/support/verify.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>

#include "core/check.hpp"
#include "core/env.hpp"
#include "tests/cuda/gpu_cases.hpp"
#include "tests/support/device.hpp"

namespace msa::testing {
namespace {

/// For work on one kernel: comma-separated lists in the environment that leave out the rest.
bool wanted(const char* variable, const std::string& name) {
  const std::string list = core::env(variable);
  return list.empty() ||
         core::concat(",", list, ",").find(core::concat(",", name, ",")) != std::string::npos;
}

/// $MSA_GPU_RUNS runs of each request and a graph replay.
Effort repeated() {
  const std::string runs = core::env("MSA_GPU_RUNS");
  return {.num_runs = runs.empty() ? 20 : std::stoi(runs), .graph = true};
}

/// What the decode kernels take: at most 16 query tokens a request on average.
bool few_queries(const Case& spec) {
  std::int64_t total = 0;
  for (const Lengths& lengths : spec.sequences) total += lengths.q;
  return spec.problem.top_k <= 64 && total <= 16 * static_cast<std::int64_t>(spec.sequences.size());
}

/// What a backend has promised for 16-bit tensors whose strides are multiples of 16 bytes.
bool must_take(const std::string& backend, const std::string& operation, const Case& spec) {
  const Problem& p = spec.problem;
  const auto is_tile = [](int n) { return n == 64 || n == 128; };
  const bool aligned = spec.row_gap % 8 == 0;
  if (spec.dtype == DType::f32 || !aligned || !is_tile(p.head_dim) || !is_tile(p.index_dim)) {
    return false;
  }
  if (backend == "cuda_generic") return true;
  if (backend == "cuda_sm90_key_rows" || backend == "cuda_sm90_decode_fused") return false;
  if (backend == "cuda_sm90_kv_outer" && spec.fp8 != Fp8::none) return false;
  if (backend == "cuda_sm90_decode_screened") {
    return operation == "Indexer" && spec.index_codes && p.index_dim == 128 &&
           p.block_size == 128 && few_queries(spec) && spec.fp8 == Fp8::none;
  }
  if (backend == "cuda_sm90_decode") {
    if (operation == "SparseAttentionForward") {
      const bool dim = p.head_dim == 128 || spec.fp8 == Fp8::none;
      return dim && few_queries(spec) && spec.sequences.size() <= 64 && p.group_size() <= 16;
    }
    return operation == "Indexer" && spec.problem.block_size == 128 && few_queries(spec);
  }
  const bool prefill =
      (operation == "Indexer" && backend == "cuda_sm90") || operation == "SparseAttentionForward";
  return prefill && is_tile(p.block_size) && p.top_k >= 4 && p.top_k <= 64 &&
         p.group_size() <= 16 && (p.group_size() & (p.group_size() - 1)) == 0;
}

/// Counts per backend and operation over the whole program, printed at its end.
class Totals : public ::testing::Environment {
 public:
  static Totals& get() {
    static auto* totals = new Totals;  // gtest deletes environments
    return *totals;
  }

  void add(const std::string& backend, const char* operation, const Case& spec,
           const Outcome& outcome) {
    using Status = Outcome::Status;
    Counts& counts = counts_[{backend, operation}];
    counts.passed += outcome.status == Status::passed ? 1 : 0;
    counts.failed += outcome.status == Status::failed ? 1 : 0;
    if (outcome.status != Status::declined) return;
    ++counts.declined;
    ++counts.reasons[outcome.detail];
    if (must_take(backend, operation, spec)) {
      ++counts.broken_promises;
      if (counts.broken_promises == 1) counts.first_broken = spec.name + ": " + outcome.detail;
    }
  }

  void TearDown() override {
    for (const auto& [row, counts] : counts_) {
      std::printf("TOTAL %-13s %-23s %4d passed %4d failed %4d declined %4d of them promised\n",
                  row.first.c_str(), row.second.c_str(), counts.passed, counts.failed,
                  counts.declined, counts.broken_promises);
      for (const auto& [reason, count] : counts.reasons) {
        std::printf("DECLINED %s %s %d x %s\n", row.first.c_str(), row.second.c_str(), count,
                    reason.c_str());
      }
    }
    for (const auto& [row, counts] : counts_) {
      EXPECT_EQ(counts.broken_promises, 0) << row.first << " declined what it promised for "
                                           << row.second << ", first " << counts.first_broken;
    }
  }

 private:
  struct Counts {
    int passed = 0;
    int failed = 0;
    int declined = 0;
    int broken_promises = 0;
    std::string first_broken{};
    std::map<std::string, int> reasons{};
  };
  std::map<std::pair<std::string, std::string>, Counts> counts_;
};

[[maybe_unused]] const auto* const kRegistered =
    ::testing::AddGlobalTestEnvironment(&Totals::get());

enum class Operations { all, forward, index, backward };

/// Values whose gradients pass the end of the type.
bool overflows(const Case& spec) {
  return spec.values == Values::largest || spec.values == Values::coarse;
}

/// All backends on one case.
void verify_case(const Case& spec, const Effort& effort, Operations operations = Operations::all) {
  ASSERT_EQ(why_no_device(), "");
  Inputs inputs(spec);
  const auto one = [&]<class Args>(const std::string& backend, const Args& args) {
    const char* operation = core::operation_name(args);
    if (!wanted("MSA_GPU_OPS", operation)) return;
    const Outcome outcome = verify<Args>(inputs, backend.c_str(), effort);
    if (outcome.status == Outcome::Status::not_applicable) return;
    Totals::get().add(backend, operation, spec, outcome);
    EXPECT_TRUE(outcome.ok()) << backend << ' ' << operation << ": " << outcome.detail;
  };
  for (const std::string backend :
       {"cuda_generic", "cuda_sm90", "cuda_sm90_kv_outer", "cuda_sm90_decode",
        "cuda_sm90_decode_screened", "cuda_sm90_decode_fused", "cuda_sm90_key_rows"}) {
    if (!wanted("MSA_GPU_BACKENDS", backend)) continue;
    const bool gradients = operations == Operations::all || operations == Operations::backward;
    for (const bool warm_up : {false, true}) {
      if (!gradients || overflows(spec)) continue;
      inputs.warm_up = warm_up;
      one(backend, SparseAttentionBackward{});
      one(backend, IndexerKlBackward{});
    }
    inputs.warm_up = false;
    if (operations == Operations::backward) continue;
    one(backend, IndexerScores{});
    one(backend, Indexer{});
    if (operations == Operations::index) continue;
    one(backend, SelectTopK{});
    one(backend, SparseAttentionForward{});
    one(backend, IndexedAttentionForward{});
    one(backend, DenseAttentionForward{});
    one(backend, AppendKv{});
    one(backend, NormRopeAppendKv{});
  }
}

class GpuTable : public ::testing::TestWithParam<Case> {};
TEST_P(GpuTable, MatchesTheReference) { verify_case(GetParam(), repeated()); }
INSTANTIATE_TEST_SUITE_P(Table, GpuTable, ::testing::ValuesIn(all_cases()),
                         [](const auto& test) { return test.param.name; });

class GpuScaled : public ::testing::TestWithParam<Case> {};
TEST_P(GpuScaled, MatchesTheReference) { verify_case(GetParam(), repeated()); }
INSTANTIATE_TEST_SUITE_P(Table, GpuScaled, ::testing::ValuesIn(scaled_cases()),
                         [](const auto& test) { return test.param.name; });

class GpuLarge : public ::testing::TestWithParam<Case> {};
TEST_P(GpuLarge, MatchesTheReference) {
  Effort effort = repeated();
  effort.max_rows = 16;
  verify_case(GetParam(), effort, Operations::forward);
}
INSTANTIATE_TEST_SUITE_P(Table, GpuLarge, ::testing::ValuesIn(large_cases()),
                         [](const auto& test) { return test.param.name; });

/// The CPU backend does not take e4m3, so the reference judges more rows.
class GpuFp8 : public ::testing::TestWithParam<Case> {};
TEST_P(GpuFp8, MatchesTheReference) {
  Effort effort = repeated();
  effort.num_runs = std::min(effort.num_runs, 4);
  effort.max_rows = 16;
  verify_case(GetParam(), effort, Operations::forward);
}
INSTANTIATE_TEST_SUITE_P(Table, GpuFp8, ::testing::ValuesIn(fp8_cases()),
                         [](const auto& test) { return test.param.name; });

class GpuGradients : public ::testing::TestWithParam<Case> {};
TEST_P(GpuGradients, MatchTheReference) {
  verify_case(GetParam(), repeated(), Operations::backward);
}
INSTANTIATE_TEST_SUITE_P(Table, GpuGradients, ::testing::ValuesIn(gradient_cases()),
                         [](const auto& test) { return test.param.name; });

class GpuCluster : public ::testing::TestWithParam<Case> {};
TEST_P(GpuCluster, MatchesTheReference) {
  Effort effort = repeated();
  effort.num_runs = std::min(effort.num_runs, 4);
  effort.max_rows = 6;
  verify_case(GetParam(), effort, Operations::index);
}
INSTANTIATE_TEST_SUITE_P(Table, GpuCluster, ::testing::ValuesIn(cluster_cases()),
                         [](const auto& test) { return test.param.name; });
INSTANTIATE_TEST_SUITE_P(Decode, GpuCluster, ::testing::ValuesIn(decode_index_cases()),
                         [](const auto& test) { return test.param.name; });

/// TMA reads from multiples of 16 bytes only: sm_90's rows decline others, and the generic one
/// takes them.
TEST(GpuAlignment, TensorsThatStartAnywhereGoToTheGenericKernels) {
  ASSERT_EQ(why_no_device(), "");
  const auto one = [](GuardedTensor Inputs::* tensor, const auto& request, const char* row) {
    using Args = std::decay_t<decltype(request)>;
    Inputs inputs(Case{.problem = {.num_q_heads = 32, .num_kv_heads = 2, .top_k = 4},
                       .dtype = DType::bf16,
                       .sequences = {{9, 700}},
                       .row_gap = 8});
    inputs.*tensor = (inputs.*tensor).shifted(1);
    const Outcome declined = verify<Args>(inputs, row, {.num_runs = 1});
    EXPECT_EQ(declined.status, Outcome::Status::declined);
    EXPECT_NE(declined.detail.find("not a multiple of 16 bytes"), std::string::npos)
        << declined.detail;
    const Outcome taken = verify<Args>(inputs, "cuda_generic", {.num_runs = 1});
    EXPECT_EQ(taken.status, Outcome::Status::passed) << taken.detail;
    Args args = inputs.args<Args>();
    const Outputs outputs(inputs, args);
    core::for_each_tensor(args, [](const char*, const TensorView& view, core::Use) {
      const_cast<TensorView&>(view).device = {DeviceType::cuda, 0};
    });
    EXPECT_STREQ(msa::plan(args).implementation(), "cuda_generic");
  };
  for (const auto tensor : {&Inputs::q, &Inputs::k, &Inputs::v}) {
    one(tensor, SparseAttentionForward{}, "cuda_sm90");
    one(tensor, SparseAttentionForward{}, "cuda_sm90_kv_outer");
  }
  for (const auto tensor : {&Inputs::index_q, &Inputs::index_k}) {
    one(tensor, Indexer{}, "cuda_sm90");
    one(tensor, IndexerScores{}, "cuda_sm90");
  }
}

}  // namespace
}  // namespace msa::testing
