// SPDX-License-Identifier: Apache-2.0
//
// A decode step in one launch against its two operations: the same selection, bit for bit, and the
// same attention, bit for bit where both divide a token's blocks among as many CTAs.
#include "msa/indexed_attention.hpp"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <initializer_list>
#include <limits>
#include <numeric>

#include "core/scalar.hpp"
#include "core/tensor.hpp"
#include "cuda/common/check.hpp"
#include "msa/error.hpp"
#include "tests/cuda/screened_decode.hpp"
#include "tests/support/device.hpp"
#include "tests/support/judge.hpp"

namespace msa::testing {
namespace {

constexpr const char* kParts = "cuda_sm90_decode";
constexpr const char* kFused = "cuda_sm90_decode_fused";
constexpr std::int64_t kBlock = 128;
constexpr std::int64_t kDim = 128;
constexpr std::byte kUnwritten{0x5a};
/// Up to here both have 16 splits, on a GPU of 132 SMs.
constexpr std::int64_t kMostEqualItems = 8;

/// A tensor on the device and its copy here.
class Mirrored {
 public:
  Mirrored(DType dtype, std::initializer_list<std::int64_t> shape)
      : host_(dtype, shape), device_(bytes().size()) {
    device_.fill(kUnwritten);
  }
  std::span<std::byte> bytes() const {
    return host_.span<std::byte>().first(size_of(host_.view().dtype) *
                                         static_cast<std::size_t>(host_.view().num_elements()));
  }
  TensorView here() const { return host_.view(); }
  TensorView there() const {
    TensorView view = host_.view();
    view.data = device_.data();
    view.device = {DeviceType::cuda, 0};
    return view;
  }
  void upload() const { device_.upload(bytes()); }
  void download() const { device_.download(bytes()); }
  void forget() const { device_.fill(kUnwritten); }
  void fill_normal(Noise& noise) const {
    auto* const values = reinterpret_cast<std::uint16_t*>(bytes().data());
    for (std::size_t i = 0; i < bytes().size() / 2; ++i) {
      values[i] = core::f32_to_bf16(static_cast<float>(noise.normal()));
    }
    upload();
  }
  std::int32_t* ids() const { return reinterpret_cast<std::int32_t*>(bytes().data()); }

 private:
  core::Tensor host_;
  DeviceBuffer device_;
};

std::int64_t num_blocks(const Request& request) { return (request.num_keys + kBlock - 1) / kBlock; }

/// A step of requests with pages in random order.
class Step {
 public:
  Step(const Problem& problem, const std::vector<Request>& requests)
      : problem_(problem),
        total_q_(std::accumulate(requests.begin(), requests.end(), std::int64_t{0},
                                 [](auto sum, const Request& r) { return sum + r.num_queries; })),
        num_pages_(std::accumulate(requests.begin(), requests.end(), std::int64_t{1},
                                   [](auto sum, const Request& r) { return sum + num_blocks(r); })),
        max_blocks_(num_blocks(*std::ranges::max_element(requests, {}, &Request::num_keys))),
        cu_seqlens_q_(DType::i32, {std::ssize(requests) + 1}),
        seq_lens_k_(DType::i32, {std::ssize(requests)}),
        page_table_(DType::i32, {std::ssize(requests), max_blocks_}),
        index_q_(DType::bf16, {total_q_, problem.num_kv_heads, kDim}),
        index_k_(DType::bf16, {num_pages_, 1, kBlock, kDim}),
        q_(DType::bf16, {total_q_, problem.num_q_heads, kDim}),
        k_(DType::bf16, {num_pages_, problem.num_kv_heads, kBlock, kDim}),
        v_(DType::bf16, {num_pages_, problem.num_kv_heads, kBlock, kDim}),
        block_ids_(DType::i32, {problem.num_kv_heads, total_q_, problem.top_k}),
        out_(DType::bf16, {total_q_, problem.num_q_heads, kDim}),
        lse_(DType::f32, {total_q_, problem.num_q_heads}) {
    Noise noise(23);
    std::vector<std::int32_t> pages(static_cast<std::size_t>(num_pages_));
    std::iota(pages.begin(), pages.end(), 0);
    for (std::size_t i = pages.size(); i > 1; --i) {
      std::swap(pages[i - 1],
                pages[static_cast<std::size_t>(noise.below(static_cast<std::int64_t>(i)))]);
    }
    std::size_t next = 0;
    cu_seqlens_q_.ids()[0] = 0;
    for (std::size_t b = 0; b < requests.size(); ++b) {
      cu_seqlens_q_.ids()[b + 1] = cu_seqlens_q_.ids()[b] + requests[b].num_queries;
      seq_lens_k_.ids()[b] = requests[b].num_keys;
      for (std::int64_t i = 0; i < max_blocks_; ++i) {
        page_table_.ids()[static_cast<std::int64_t>(b) * max_blocks_ + i] =
            i < num_blocks(requests[b]) ? pages[next++] : (i % 2 == 0 ? -7 : 1 << 30);
      }
    }
    cu_seqlens_q_.upload();
    seq_lens_k_.upload();
    page_table_.upload();
    for (const Mirrored* tensor : {&index_q_, &index_k_, &q_, &k_, &v_}) tensor->fill_normal(noise);
  }

  void lose_page(std::int64_t request, std::int64_t block) const {
    page_table_.ids()[request * max_blocks_ + block] = -1;
    page_table_.upload();
  }
  void set_length(std::int64_t request, std::int32_t length) const {
    seq_lens_k_.ids()[request] = length;
    seq_lens_k_.upload();
  }
  void plant(float value) const {
    auto* const keys = reinterpret_cast<std::uint16_t*>(k_.bytes().data());
    for (std::size_t i = 0; i < k_.bytes().size() / 2; i += 100'003) {
      keys[i] = core::f32_to_bf16(value);
    }
    k_.upload();
  }

  IndexedAttentionForward args() const {
    return {.problem = problem_,
            .batch = {.cu_seqlens_q = cu_seqlens_q_.there(),
                      .page_table = page_table_.there(),
                      .seq_lens_k = seq_lens_k_.there()},
            .index_q = index_q_.there(),
            .index_k = index_k_.there(),
            .q = q_.there(),
            .k = k_.there(),
            .v = v_.there(),
            .block_ids = block_ids_.there(),
            .out = out_.there(),
            .lse = lse_.there()};
  }

  struct Results {
    std::vector<std::byte> ids, out, lse;
    bool operator==(const Results&) const = default;
  };
  void forget() const {
    for (const Mirrored* tensor : {&block_ids_, &out_, &lse_}) tensor->forget();
  }
  Results results() const {
    const auto copy = [](const Mirrored& tensor) {
      tensor.download();
      return std::vector<std::byte>(tensor.bytes().begin(), tensor.bytes().end());
    };
    return {copy(block_ids_), copy(out_), copy(lse_)};
  }
  Results run(const char* backend) const {
    forget();
    const auto plan = msa::plan(args(), {.backend = backend});
    const DeviceBuffer workspace(plan.workspace_bytes() + 1);
    workspace.fill(std::byte{0xff});
    const DeviceStream stream;
    plan.run(args(), workspace.span().first(plan.workspace_bytes()), stream.stream());
    stream.wait();
    return results();
  }
  /// Of the results here, for their ids.
  std::string attention_failure() const {
    const SparseAttentionForward attend{.problem = problem_,
                                        .batch = {.cu_seqlens_q = cu_seqlens_q_.here(),
                                                  .page_table = page_table_.here(),
                                                  .seq_lens_k = seq_lens_k_.here()},
                                        .q = q_.here(),
                                        .k = k_.here(),
                                        .v = v_.here(),
                                        .block_ids = block_ids_.here(),
                                        .out = out_.here(),
                                        .lse = lse_.here()};
    return judge_by_reference({.problem = problem_, .dtype = DType::bf16}, attend,
                              arithmetic_of(kParts, DType::bf16), max_blocks_)
        .failure;
  }
  std::int64_t num_items() const { return total_q_ * problem_.num_kv_heads; }

 private:
  Problem problem_;
  std::int64_t total_q_, num_pages_, max_blocks_;
  Mirrored cu_seqlens_q_, seq_lens_k_, page_table_;
  Mirrored index_q_, index_k_, q_, k_, v_, block_ids_, out_, lse_;
};

void expect_same_step(const Step& step, bool judge = true) {
  const Step::Results expected = step.run(kParts);
  const Step::Results first = step.run(kFused);
  EXPECT_EQ(first.ids, expected.ids) << "selection";
  if (judge) {
    EXPECT_EQ(step.attention_failure(), "");
  }
  if (step.num_items() <= kMostEqualItems) {
    EXPECT_TRUE(first.out == expected.out) << "out";
    EXPECT_TRUE(first.lse == expected.lse) << "lse";
  }
  for (int run = 1; run < 20; ++run) ASSERT_TRUE(step.run(kFused) == first) << "run " << run;
}

Problem small() { return {.num_q_heads = 16, .num_kv_heads = 2, .top_k = 5}; }

class GpuIndexedAttention : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_EQ(why_no_device(), ""); }
};

TEST_F(GpuIndexedAttention, OneRequest) {
  for (const std::int32_t length : {32'768, 32'761, 2'177, 2'048, 129, 1}) {
    SCOPED_TRACE(length);
    expect_same_step(Step({}, {{1, length}}));
  }
}

TEST_F(GpuIndexedAttention, TwoRequests) { expect_same_step(Step({}, {{1, 3'000}, {1, 9'001}})); }

TEST_F(GpuIndexedAttention, FourRaggedRequests) {
  expect_same_step(Step({}, {{1, 5'000}, {1, 700}, {1, 2'049}, {1, 16'000}}));
}

TEST_F(GpuIndexedAttention, SeveralQueryTokens) {
  expect_same_step(Step({}, {{4, 4'000}, {3, 100}, {0, 50}, {2, 0}, {5, 3}}));
}

TEST_F(GpuIndexedAttention, AsManyTokensAsItTakes) { expect_same_step(Step({}, {{16, 5'000}})); }

TEST_F(GpuIndexedAttention, FewerHeadsAndBlocks) {
  expect_same_step(Step(small(), {{1, 4'000}, {2, 900}, {16, 3'000}, {10, 200}}));
}

TEST_F(GpuIndexedAttention, ForcedBlocks) {
  Problem problem;
  problem.num_local_blocks = 3;
  problem.num_init_blocks = 2;
  expect_same_step(Step(problem, {{1, 16'001}, {2, 4'000}}));
}

TEST_F(GpuIndexedAttention, MissingPages) {
  const Step step({}, {{1, 5'000}, {1, 8'192}});
  step.lose_page(0, 3);
  step.lose_page(1, 63);
  expect_same_step(step);
}

TEST_F(GpuIndexedAttention, RowsThatAreDoneAgain) {
  const Step step({}, {{1, 4'096}});
  step.plant(std::numeric_limits<float>::infinity());
  expect_same_step(step, /*judge=*/false);
  step.plant(std::numeric_limits<float>::quiet_NaN());
  expect_same_step(step, /*judge=*/false);
}

TEST_F(GpuIndexedAttention, GraphFollowsGrowingLengths) {
  const Step step({}, {{1, 9'000}, {1, 5'000}});
  const auto plan = msa::plan(step.args(), {.backend = kFused});
  const DeviceBuffer workspace(plan.workspace_bytes() + 1);
  workspace.fill(std::byte{0xff});
  const DeviceStream stream;
  const auto handle = static_cast<cudaStream_t>(stream.stream().handle);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  constexpr int kSteps = 3;  // of a graph, one behind the other
  MSA_CUDA_CHECK(cudaStreamBeginCapture(handle, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kSteps; ++i) {
    plan.run(step.args(), workspace.span().first(plan.workspace_bytes()), stream.stream());
  }
  MSA_CUDA_CHECK(cudaStreamEndCapture(handle, &graph));
  std::size_t num_nodes = 0;
  MSA_CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &num_nodes));
  ASSERT_EQ(num_nodes, std::size_t{kSteps});
  cudaGraphNode_t nodes[kSteps] = {};
  MSA_CUDA_CHECK(cudaGraphGetNodes(graph, nodes, &num_nodes));
  cudaKernelNodeParams node{};
  MSA_CUDA_CHECK(cudaGraphKernelNodeGetParams(nodes[0], &node));
  std::printf("%u CTAs, %u bytes of shared memory each\n", node.gridDim.x, node.sharedMemBytes);
  MSA_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  for (const std::int32_t length : {1, 127, 128, 129, 2'048, 2'049, 2'176, 5'000, 8'999, 9'000}) {
    SCOPED_TRACE(length);
    step.set_length(0, length);
    step.set_length(1, 5'000 - length / 2);
    const Step::Results expected = step.run(kParts);
    step.forget();
    MSA_CUDA_CHECK(cudaGraphLaunch(executable, handle));
    MSA_CUDA_CHECK(cudaGraphLaunch(executable, handle));
    stream.wait();
    EXPECT_TRUE(step.results() == expected);
  }
  MSA_CUDA_CHECK(cudaGraphExecDestroy(executable));
  MSA_CUDA_CHECK(cudaGraphDestroy(graph));
}

TEST_F(GpuIndexedAttention, TwoStreamsAtOnce) {
  const Step steps[] = {Step({}, {{1, 20'000}}), Step({}, {{1, 3'000}, {1, 10'000}})};
  const Step::Results expected[] = {steps[0].run(kParts), steps[1].run(kParts)};
  const auto plan0 = msa::plan(steps[0].args(), {.backend = kFused});
  const auto plan1 = msa::plan(steps[1].args(), {.backend = kFused});
  const DeviceBuffer workspace0(plan0.workspace_bytes());
  const DeviceBuffer workspace1(plan1.workspace_bytes());
  const DeviceStream stream0;
  const DeviceStream stream1;
  for (const Step& step : steps) step.forget();
  for (int i = 0; i < 50; ++i) {
    plan0.run(steps[0].args(), workspace0.span(), stream0.stream());
    plan1.run(steps[1].args(), workspace1.span(), stream1.stream());
  }
  stream0.wait();
  stream1.wait();
  EXPECT_TRUE(steps[0].results() == expected[0]);
  EXPECT_TRUE(steps[1].results() == expected[1]);
}

TEST_F(GpuIndexedAttention, SaysWhatItDeclines) {
  const Step step({}, {{17, 300}});
  EXPECT_THROW(step.run(kFused), Error);
  EXPECT_STREQ(msa::plan(Step({}, {{1, 300}}).args()).implementation(), kParts);
}

}  // namespace
}  // namespace msa::testing
