// SPDX-License-Identifier: Apache-2.0
//
// IndexerKlBackward beyond the table of all operations: with the teacher's lse where the table has
// none and the other way round, single outputs, windows of queries that don't hold all of them.
#include "cuda/common/indexer_kl.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "core/scalar.hpp"
#include "reference/reference.hpp"
#include "tests/support/device.hpp"
#include "tests/support/gradient_bounds.hpp"
#include "tests/support/verify.hpp"

namespace msa::testing {
namespace {

/// Heads of M3, in short sequences: the reference takes its time.
std::vector<Case> m3_cases() {
  const Problem one{.num_q_heads = 16, .num_kv_heads = 1, .top_k = 3};
  const Problem two{.num_q_heads = 32, .num_kv_heads = 2, .top_k = 4};
  const std::vector<Lengths> mixed = {{70, 400}, {0, 40}, {40, 40}, {5, 3}};
  const auto shape = [](const char* name, const Problem& problem, std::vector<Lengths> sequences,
                        DType dtype, Values values, Selection selection) {
    return Case{.name = name,
                .problem = problem,
                .dtype = dtype,
                .sequences = std::move(sequences),
                .values = values,
                .selection = selection,
                .row_gap = 8};
  };
  using enum Values;
  using enum Selection;
  std::vector<Case> cases = {
      shape("m3_mixed", one, mixed, DType::bf16, normal, scattered),
      shape("m3_two_heads", two, {{64, 300}, {20, 20}}, DType::bf16, normal, any_order),
      shape("m3_f16", one, mixed, DType::f16, normal, Selection::indexer),
      shape("m3_nans", one, {{70, 300}}, DType::bf16, nans, Selection::indexer),
      shape("m3_infinities", one, {{70, 300}}, DType::bf16, infinities, any_order),
      shape("m3_ties", one, {{130, 300}}, DType::bf16, ties, scattered),
      shape("m3_large", one, {{40, 200}}, DType::bf16, large, Selection::indexer)};
  for (std::size_t i = 0; i < cases.size(); ++i) cases[i].seed = static_cast<std::uint32_t>(40 + i);
  cases[1].problem.block_size = 256;
  return cases;
}

std::vector<Case> kl_cases() {
  std::vector<Case> cases = m3_cases();
  for (const Case& spec : all_cases()) {
    if (spec.dtype != DType::f32 && spec.keys == Keys::ragged) cases.push_back(spec);
  }
  return cases;
}

class GpuIndexerKl : public ::testing::TestWithParam<Case> {};
TEST_P(GpuIndexerKl, MatchesTheReference) {
  ASSERT_EQ(why_no_device(), "");
  Inputs inputs(GetParam());
  inputs.teacher_lse = !inputs.teacher_lse;
  const Problem& p = inputs.spec.problem;
  const bool m3 = p.head_dim == 128 && p.index_dim == 128 && p.block_size >= 128 &&
                  p.group_size() == 16 && inputs.spec.row_gap % 8 == 0;
  for (const char* backend : {"cuda_generic", "cuda_sm90", "cuda_sm90_key_rows"}) {
    if (backend != std::string("cuda_generic") && !m3) continue;
    for (const bool warm_up : {false, true}) {
      inputs.warm_up = warm_up;
      const Outcome outcome =
          verify<IndexerKlBackward>(inputs, backend, {.num_runs = 3, .graph = true});
      EXPECT_EQ(outcome.status, Outcome::Status::passed)
          << backend << (warm_up ? ", every token: " : ", selected blocks: ") << outcome.detail;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Table, GpuIndexerKl, ::testing::ValuesIn(kl_cases()),
                         [](const auto& test) { return test.param.name; });

/// Bytes of all outputs of a run on the GPU; those that `choose` takes from the request stay as
/// they were.
template <class Choose, class Run>
std::vector<std::vector<std::byte>> outputs_of(Inputs& inputs, Choose choose, Run run) {
  auto args = inputs.args<IndexerKlBackward>();
  const Outputs outputs(inputs, args);
  choose(args);
  DeviceMirror mirror;
  std::vector<std::span<std::byte>> buffers = inputs.buffers();
  const std::vector<std::span<std::byte>> host = outputs.buffers();
  buffers.insert(buffers.end(), host.begin(), host.end());
  core::for_each_tensor(args, [&](const char*, const TensorView& view, core::Use) {
    TensorView& changed = const_cast<TensorView&>(view);
    if (!view.given()) return;
    changed.device = {DeviceType::cuda, 0};
    changed = mirror.at(view, buffers);
  });
  const DeviceStream stream;
  run(args, stream);
  std::vector<std::vector<std::byte>> all;
  for (const std::span<std::byte> bytes : host) {
    all.emplace_back(bytes.begin(), bytes.end());
    if (const DeviceBuffer* device = mirror.find(bytes)) device->download(all.back());
  }
  return all;
}

void run_plan(const IndexerKlBackward& args, const DeviceStream& stream) {
  const auto plan = msa::plan(args, {.backend = "cuda_generic"});
  const DeviceBuffer workspace(plan.workspace_bytes() + 1);
  workspace.fill(std::byte{0xff});
  plan.run(args, workspace.span().first(plan.workspace_bytes()), stream.stream());
  stream.wait();
}

const Case kThreeSequences{.name = "three_sequences",
                           .problem = {.num_q_heads = 8,
                                       .num_kv_heads = 2,
                                       .head_dim = 64,
                                       .index_dim = 64,
                                       .block_size = 64,
                                       .top_k = 4},
                           .dtype = DType::bf16,
                           .sequences = {{70, 300}, {0, 9}, {129, 129}},
                           .row_gap = 8};

TEST(GpuIndexerKlOutputs, DoNotDependOnEachOther) {
  ASSERT_EQ(why_no_device(), "");
  Inputs inputs(kThreeSequences);
  for (const bool warm_up : {false, true}) {
    inputs.warm_up = warm_up;
    const auto both = outputs_of(inputs, [](IndexerKlBackward&) {}, run_plan);
    const auto loss = outputs_of(
        inputs, [](IndexerKlBackward& args) { args.dindex_q = args.dindex_k = {}; }, run_plan);
    const auto gradients =
        outputs_of(inputs, [](IndexerKlBackward& args) { args.loss = {}; }, run_plan);
    ASSERT_EQ(both.size(), 3u);
    EXPECT_EQ(loss[0], both[0]);
    EXPECT_EQ(gradients[1], both[1]);
    EXPECT_EQ(gradients[2], both[2]);
    EXPECT_NE(gradients[0], both[0]);  // not written
    EXPECT_NE(loss[2], both[2]);
  }
}

/// 0 times its index_q must not reach the keys of its last block that it does not see.
TEST(GpuIndexerKlOutputs, AQueryThatIsNotFiniteReachesWhatItSees) {
  ASSERT_EQ(why_no_device(), "");
  for (const double special :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Case spec = m3_cases().front();
    spec.sequences = {{70, 400}, {40, 40}};
    Inputs inputs(spec);
    core::store(inputs.index_q.view(), special, 20, 0, 3);
    core::store(inputs.index_q.view(), special, 81, 0, 100);
    inputs.index_q.seal();
    for (const bool warm_up : {false, true}) {
      inputs.warm_up = warm_up;
      for (const char* backend : {"cuda_generic", "cuda_sm90", "cuda_sm90_key_rows"}) {
        const Outcome outcome = verify<IndexerKlBackward>(inputs, backend, {.num_runs = 1});
        EXPECT_EQ(outcome.status, Outcome::Status::passed) << backend << ": " << outcome.detail;
      }
    }
  }
}

/// Each window adds its share of dindex_k to those before; everything else is of single queries.
TEST(GpuIndexerKlWindows, AreSeenInRoundingOnly) {
  ASSERT_EQ(why_no_device(), "");
  Inputs inputs(kThreeSequences);
  for (const bool warm_up : {false, true}) {
    inputs.warm_up = warm_up;
    const auto with_window = [&](std::int64_t bytes) {
      return outputs_of(
          inputs, [](IndexerKlBackward&) {},
          [&](const IndexerKlBackward& args, const DeviceStream& stream) {
            const std::size_t size = cuda::indexer_kl_workspace_bytes(args, bytes);
            const DeviceBuffer workspace(size);
            workspace.fill(std::byte{0xff});
            cuda::run_indexer_kl(args, bytes, cuda::kKlScoreGradients, workspace.span(),
                                 stream.stream());
            stream.wait();
          });
    };
    const auto whole = with_window(cuda::kKlWindowBytes);
    const auto cut = with_window(1);  // 16 queries at a time
    EXPECT_EQ(cut[0], whole[0]);
    EXPECT_EQ(cut[1], whole[1]);
    auto args = inputs.args<IndexerKlBackward>();
    const Outputs outputs(inputs, args);
    const std::vector<std::span<std::byte>> host = outputs.buffers();
    for (std::size_t i = 0; i < host.size(); ++i) {
      std::memcpy(host[i].data(), cut[i].data(), host[i].size());
    }
    auto exact = inputs.args<IndexerKlBackward>();
    const Outputs expected(inputs, exact, /*wide=*/true);
    reference::indexer_kl_backward(exact);
    const IndexGradientBounds bounds =
        gradient_bounds(args, arithmetic_of("cuda_generic", inputs.spec.dtype));
    EXPECT_EQ(compare("dindex_k", args.dindex_k, exact.dindex_k, bounds.dindex_k, 0.0).failure, "");
  }
}

}  // namespace
}  // namespace msa::testing
