// SPDX-License-Identifier: Apache-2.0
//
// A serving engine's decode loop: AppendKv, Indexer and SparseAttentionForward as one captured CUDA
// graph, replayed while lengths, query counts and page tables change in GPU memory, against the
// same loop with eager runs and against the reference.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>

#include "core/check.hpp"
#include "core/env.hpp"
#include "core/tensor.hpp"
#include "cuda/common/check.hpp"
#include "tests/cuda/decode_steps.hpp"
#include "tests/support/device.hpp"
#include "tests/support/judge.hpp"

namespace msa::testing {
namespace {

struct LoopShape {
  Problem problem{};
  std::vector<std::int32_t> lengths{};  ///< before the first step
  std::vector<std::int32_t> counts{};   ///< query tokens a step, taken in turn
  int num_steps = 0;
  bool codes = false;

  std::int64_t total_q() const {
    std::int64_t sum = 0;
    for (const std::int32_t count : counts) sum += count;
    return sum;
  }
  std::int64_t batch_size() const { return std::ssize(lengths); }
  /// Each request has taken every count equally often, up to one round.
  std::int64_t max_pages() const {
    const std::int32_t longest = *std::max_element(lengths.begin(), lengths.end());
    const std::int64_t rounds = num_steps / batch_size() + 1;
    return (longest + rounds * total_q()) / problem.block_size + 1;
  }
};

Problem small() {
  return {.num_q_heads = 8,
          .num_kv_heads = 2,
          .head_dim = 64,
          .index_dim = 64,
          .block_size = 64,
          .top_k = 8};
}

/// A tensor in GPU memory, zeroed.
class Array {
 public:
  Array(DType dtype, std::initializer_list<std::int64_t> shape)
      : view_(TensorView::contiguous(nullptr, dtype, {DeviceType::cuda, 0}, shape)),
        buffer_(size_of(dtype) * static_cast<std::size_t>(view_.num_elements())) {
    view_.data = buffer_.data();
    buffer_.fill(std::byte{0});
  }
  operator const TensorView&() const { return view_; }
  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(buffer_.data());
  }
  std::vector<std::byte> bytes() const {
    std::vector<std::byte> host(buffer_.size());
    buffer_.download(host);
    return host;
  }
  void set(const std::vector<std::int32_t>& values) const {
    buffer_.upload(std::as_bytes(std::span(values)));
  }

 private:
  TensorView view_;
  DeviceBuffer buffer_;
};

/// An operation with its plan and a workspace of just the size that was planned.
template <class Args>
class Planned {
 public:
  Planned(const Args& args, const char* backend)
      : args_(args),
        plan_(msa::plan(args, {.backend = backend})),
        size_(plan_.workspace_bytes()),
        workspace_(size_ + kGuardBytes) {
    workspace_.fill(kGuard);
  }
  const Args& args() const { return args_; }
  const char* implementation() const { return plan_.implementation(); }
  void run(Stream stream) const { plan_.run(args_, workspace_.span().first(size_), stream); }
  bool guard_is_whole() const {
    std::vector<std::byte> host(workspace_.size());
    workspace_.download(host);
    return std::all_of(host.begin() + static_cast<std::ptrdiff_t>(size_), host.end(),
                       [](std::byte b) { return b == kGuard; });
  }

 private:
  static constexpr std::size_t kGuardBytes = 4096;
  static constexpr std::byte kGuard{0xa5};

  Args args_;
  Plan<Args> plan_;
  std::size_t size_;
  DeviceBuffer workspace_;
};

/// One engine: caches, metadata and the three operations.
class Loop {
 public:
  Loop(const LoopShape& shape, const char* backend, std::uint32_t seed)
      : shape_(shape),
        seed_(seed),
        step_(DType::i32, {1}),
        counts_(DType::i32, {shape.batch_size()}),
        pages_(DType::i32, {shape.batch_size(), shape.max_pages()}),
        page_table_(DType::i32, {shape.batch_size(), shape.max_pages()}),
        cu_seqlens_q_(DType::i32, {shape.batch_size() + 1}),
        seq_lens_k_(DType::i32, {shape.batch_size()}),
        q_(DType::bf16, {shape.total_q(), heads(), dim()}),
        k_(DType::bf16, {shape.total_q(), kv_heads(), dim()}),
        v_(DType::bf16, {shape.total_q(), kv_heads(), dim()}),
        index_q_(DType::bf16, {shape.total_q(), kv_heads(), dim()}),
        index_k_(DType::bf16, {shape.total_q(), 1, dim()}),
        k_pages_(DType::bf16, {num_pages(), kv_heads(), block(), dim()}),
        v_pages_(DType::bf16, {num_pages(), kv_heads(), block(), dim()}),
        index_k_pages_(DType::bf16, {num_pages(), 1, block(), dim()}),
        codes_(DType::i8, {num_pages(), 1, block(), dim()}),
        scales_(DType::bf16, {num_pages(), 1, block(), 2}),
        block_ids_(DType::i32, {kv_heads(), shape.total_q(), shape.problem.top_k}),
        out_(DType::bf16, {shape.total_q(), heads(), dim()}),
        lse_(DType::f32, {shape.total_q(), heads()}),
        digests_(DType::i32, {3, out_words()}),
        append_(append_args(), nullptr),
        indexer_(indexer_args(), backend),
        attention_(attention_args(), backend) {
    counts_.set(shape.counts);
    seq_lens_k_.set(shape.lengths);
    // Sequences take pages from both ends in turn; all share the page of block 0.
    std::vector<std::int32_t> pages;
    for (std::int64_t b = 0; b < shape.batch_size(); ++b) {
      for (std::int64_t i = 0; i < shape.max_pages(); ++i) {
        const std::int64_t page = 1 + i * shape.batch_size() + b;
        const bool shared = i == 0 && shape.lengths[static_cast<std::size_t>(b)] >= block();
        pages.push_back(static_cast<std::int32_t>(shared          ? 0
                                                  : page % 2 == 0 ? page
                                                                  : num_pages() - page));
      }
    }
    pages_.set(pages);
    fill_prompt();
  }

  void enqueue(Stream stream) const {
    advance(state(), stream);
    std::uint32_t seed = seed_;
    for (const Array* tokens : {&q_, &k_, &v_, &index_q_, &index_k_}) {
      fill_tokens(*tokens, step_.data<std::int32_t>(), ++seed, stream);
    }
    append_.run(stream);
    indexer_.run(stream);
    attention_.run(stream);
    std::uint32_t* digest = digests_.data<std::uint32_t>();
    for (const Array* result : {&out_, &lse_, &block_ids_}) {
      mix_into(*result, digest, stream);
      digest += out_words();
    }
  }

  /// "" or what differs in the results, of all steps so far, and the metadata.
  std::string difference(const Loop& other) const {
    return difference(other, {{"digests of all steps", &Loop::digests_},
                              {"block_ids", &Loop::block_ids_},
                              {"out", &Loop::out_},
                              {"lse", &Loop::lse_},
                              {"seq_lens_k", &Loop::seq_lens_k_},
                              {"page_table", &Loop::page_table_}});
  }
  std::string cache_difference(const Loop& other) const {
    return difference(other, {{"k_pages", &Loop::k_pages_},
                              {"v_pages", &Loop::v_pages_},
                              {"index_k_pages", &Loop::index_k_pages_},
                              {"codes", &Loop::codes_},
                              {"scales", &Loop::scales_}});
  }

  /// The reference's verdict on the last step.
  void judge() const {
    std::vector<std::vector<std::byte>> copies;
    const auto on_host = [&]<class Args>(Args args) {
      core::for_each_tensor(args, [&](const char*, const TensorView& given, core::Use) {
        if (!given.given()) return;
        copies.emplace_back(size_of(given.dtype) * static_cast<std::size_t>(given.num_elements()));
        MSA_CUDA_CHECK(cudaMemcpy(copies.back().data(), given.data, copies.back().size(),
                                  cudaMemcpyDeviceToHost));
        auto& view = const_cast<TensorView&>(given);
        view.data = copies.back().data();
        view.device = {};
      });
      return args;
    };
    Case spec{.problem = shape_.problem, .dtype = DType::bf16};
    const Verdict selection = judge_by_reference(
        spec, on_host(indexer_.args()), arithmetic_of(indexer_.implementation(), DType::bf16),
        shape_.max_pages());
    EXPECT_EQ(selection.failure, "") << indexer_.implementation();
    const Verdict attention = judge_by_reference(
        spec, on_host(attention_.args()), arithmetic_of(attention_.implementation(), DType::bf16),
        shape_.max_pages());
    EXPECT_EQ(attention.failure, "") << attention_.implementation();
  }

  bool guards_are_whole() const {
    return append_.guard_is_whole() && indexer_.guard_is_whole() && attention_.guard_is_whole();
  }
  std::string implementations() const {
    return core::concat(append_.implementation(), ", ", indexer_.implementation(), ", ",
                        attention_.implementation());
  }

 private:
  using Part = std::pair<const char*, const Array Loop::*>;
  std::string difference(const Loop& other, std::initializer_list<Part> parts) const {
    std::string names;
    for (const auto& [name, part] : parts) {
      if ((this->*part).bytes() != (other.*part).bytes()) names += core::concat(name, "; ");
    }
    return names;
  }
  std::int64_t heads() const { return shape_.problem.num_q_heads; }
  std::int64_t kv_heads() const { return shape_.problem.num_kv_heads; }
  std::int64_t dim() const { return shape_.problem.head_dim; }
  std::int64_t block() const { return shape_.problem.block_size; }
  /// Even, so that even page ids and `num_pages() - odd page` are different and not 0.
  std::int64_t num_pages() const { return (shape_.batch_size() * shape_.max_pages() + 3) / 2 * 2; }
  std::int64_t out_words() const {
    return std::max(shape_.total_q() * heads() * dim() / 2,
                    kv_heads() * shape_.total_q() * shape_.problem.top_k);
  }
  LoopState state() const {
    return {.step = step_.data<std::int32_t>(),
            .cu_seqlens_q = cu_seqlens_q_.data<std::int32_t>(),
            .seq_lens_k = seq_lens_k_.data<std::int32_t>(),
            .page_table = page_table_.data<std::int32_t>(),
            .pages = pages_.data<std::int32_t>(),
            .counts = counts_.data<std::int32_t>(),
            .batch_size = static_cast<int>(shape_.batch_size()),
            .max_pages = static_cast<int>(shape_.max_pages()),
            .block_size = static_cast<int>(block())};
  }
  Batch batch() const {
    // Equal counts need no offsets.
    const bool ragged = std::ranges::count(shape_.counts, shape_.counts[0]) != shape_.batch_size();
    return {.cu_seqlens_q = ragged ? TensorView(cu_seqlens_q_) : TensorView{},
            .page_table = page_table_,
            .seq_lens_k = seq_lens_k_,
            .max_seq_len_q = *std::max_element(shape_.counts.begin(), shape_.counts.end())};
  }
  TensorView if_coded(const TensorView& view) const { return shape_.codes ? view : TensorView{}; }
  AppendKv append_args() const {
    return {.problem = shape_.problem,
            .batch = batch(),
            .k = k_,
            .v = v_,
            .index_k = index_k_,
            .k_pages = k_pages_,
            .v_pages = v_pages_,
            .index_k_pages = index_k_pages_,
            .index_k_codes_pages = if_coded(codes_),
            .index_k_scales_pages = if_coded(scales_)};
  }
  Indexer indexer_args() const {
    return {.problem = shape_.problem,
            .batch = batch(),
            .index_q = index_q_,
            .index_k = index_k_pages_,
            .index_k_codes = if_coded(codes_),
            .index_k_scales = if_coded(scales_),
            .block_ids = block_ids_};
  }
  SparseAttentionForward attention_args() const {
    return {.problem = shape_.problem,
            .batch = batch(),
            .q = q_,
            .k = k_pages_,
            .v = v_pages_,
            .block_ids = block_ids_,
            .out = out_,
            .lse = lse_};
  }

  /// The caches hold values everywhere; codes of the prompts' keys are written as an engine does,
  /// by AppendKv of whole pages.
  void fill_prompt() const {
    std::uint32_t seed = seed_ + 50;
    for (const Array* pages : {&k_pages_, &v_pages_}) {
      fill_tokens(*pages, step_.data<std::int32_t>(), ++seed, {});
    }
    const Array keys(DType::bf16, {num_pages() * block(), 1, dim()});
    fill_tokens(keys, step_.data<std::int32_t>(), ++seed, {});
    const Array table(DType::i32, {1, num_pages()});
    const Array length(DType::i32, {1});
    std::vector<std::int32_t> identity;
    for (std::int32_t i = 0; i < num_pages(); ++i) identity.push_back(i);
    table.set(identity);
    length.set({static_cast<std::int32_t>(num_pages() * block())});
    const AppendKv append{.problem = shape_.problem,
                          .batch = {.page_table = table, .seq_lens_k = length},
                          .index_k = keys,
                          .index_k_pages = index_k_pages_,
                          .index_k_codes_pages = if_coded(codes_),
                          .index_k_scales_pages = if_coded(scales_)};
    msa::plan(append).run(append);
    MSA_CUDA_CHECK(cudaDeviceSynchronize());
  }

  LoopShape shape_;
  std::uint32_t seed_;
  Array step_, counts_, pages_, page_table_, cu_seqlens_q_, seq_lens_k_;
  Array q_, k_, v_, index_q_, index_k_;
  Array k_pages_, v_pages_, index_k_pages_, codes_, scales_;
  Array block_ids_, out_, lse_, digests_;
  Planned<AppendKv> append_;
  Planned<Indexer> indexer_;
  Planned<SparseAttentionForward> attention_;
};

/// A captured step. The capture itself fails where run() allocates or waits.
class StepGraph {
 public:
  explicit StepGraph(const Loop& loop) {
    const auto stream = static_cast<cudaStream_t>(stream_.stream().handle);
    MSA_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    loop.enqueue(stream_.stream());
    cudaGraph_t graph = nullptr;
    MSA_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
    MSA_CUDA_CHECK(cudaGraphInstantiate(&executable_, graph, 0));
    std::size_t count = 0;
    MSA_CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &count));
    std::vector<cudaGraphNode_t> nodes(count);
    MSA_CUDA_CHECK(cudaGraphGetNodes(graph, nodes.data(), &count));
    for (cudaGraphNode_t node : nodes) {
      cudaGraphNodeType type{};
      MSA_CUDA_CHECK(cudaGraphNodeGetType(node, &type));
      EXPECT_TRUE(type == cudaGraphNodeTypeKernel || type == cudaGraphNodeTypeMemset) << type;
    }
    MSA_CUDA_CHECK(cudaGraphDestroy(graph));
  }
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;
  ~StepGraph() { cudaGraphExecDestroy(executable_); }

  void replay() const {
    MSA_CUDA_CHECK(
        cudaGraphLaunch(executable_, static_cast<cudaStream_t>(stream_.stream().handle)));
  }
  void wait() const { stream_.wait(); }

 private:
  DeviceStream stream_;
  cudaGraphExec_t executable_ = nullptr;
};

/// Of the whole device; only of use while no other process works on it.
std::size_t free_memory() {
  std::size_t free = 0;
  std::size_t total = 0;
  MSA_CUDA_CHECK(cudaMemGetInfo(&free, &total));
  return free;
}

/// The reference takes seconds for a step of M3 shape, so few are judged.
void replay_against_eager(const LoopShape& shape, const char* backend,
                          const std::vector<int>& judged_steps) {
  ASSERT_EQ(why_no_device(), "");
  constexpr int kCompareEvery = 50;
  const Loop replayed(shape, backend, 1);
  const Loop eager(shape, backend, 1);
  const StepGraph graph(replayed);
  const DeviceStream stream;
  const bool alone = core::env("GTEST_TOTAL_SHARDS").empty();
  std::size_t free_at_first = 0;
  for (int step = 1; step <= shape.num_steps; ++step) {
    graph.replay();
    eager.enqueue(stream.stream());
    if (step == 1 || step % kCompareEvery == 0) {
      graph.wait();
      stream.wait();
      ASSERT_EQ(replayed.difference(eager), "") << "step " << step;
      if (step == 1) free_at_first = free_memory();
    }
    if (std::ranges::count(judged_steps, step) != 0) {
      graph.wait();
      replayed.judge();
    }
  }
  stream.wait();
  EXPECT_EQ(replayed.cache_difference(eager), "");
  if (alone) {
    EXPECT_EQ(free_memory(), free_at_first);
  }
  EXPECT_TRUE(replayed.guards_are_whole() && eager.guards_are_whole());
  std::printf("%d steps on %s\n", shape.num_steps, replayed.implementations().c_str());
}

LoopShape m3_loop() {
  return {.problem = {},
          .lengths = {0, 1, 127, 128, 1000, 2900},
          .counts = {1, 4, 1, 0, 2, 8},
          .num_steps = 1000};
}

LoopShape small_loop() {
  return {.problem = small(),
          .lengths = {0, 64, 63, 700, 65, 1, 128},
          .counts = {1, 16, 0, 3, 1, 1, 2},
          .num_steps = 1000};
}

TEST(GpuDecodeLoop, ReplaysEqualEagerRunsOverAThousandSteps) {
  replay_against_eager(m3_loop(), nullptr, {1, 1000});
}

TEST(GpuDecodeLoop, ReplaysEqualEagerRunsWithCodes) {
  LoopShape shape = m3_loop();
  shape.codes = true;
  replay_against_eager(shape, nullptr, {700});
}

TEST(GpuDecodeLoop, OneTokenPerRequest) {
  LoopShape shape = m3_loop();
  shape.lengths = {0, 1, 127, 128, 1000, 2900, 640, 5000};
  shape.counts.assign(8, 1);
  replay_against_eager(shape, nullptr, {999});
}

TEST(GpuDecodeLoop, GenericKernels) {
  replay_against_eager(small_loop(), "cuda_generic", {1, 2, 500, 1000});
}

TEST(GpuDecodeLoop, TwoStreamsGiveTheBitsOfEachAlone) {
  ASSERT_EQ(why_no_device(), "");
  LoopShape shape = m3_loop();
  shape.num_steps = 300;
  const Loop alone[2] = {{shape, nullptr, 1}, {shape, nullptr, 2}};
  const Loop together[2] = {{shape, nullptr, 1}, {shape, nullptr, 2}};
  for (const Loop& loop : alone) {
    const StepGraph graph(loop);
    for (int step = 0; step < shape.num_steps; ++step) graph.replay();
    graph.wait();
  }
  const StepGraph first(together[0]);
  const StepGraph second(together[1]);
  for (int step = 0; step < shape.num_steps; ++step) {
    first.replay();
    second.replay();
  }
  first.wait();
  second.wait();
  EXPECT_EQ(together[0].difference(alone[0]), "");
  EXPECT_EQ(together[1].difference(alone[1]), "");
  EXPECT_EQ(together[0].cache_difference(alone[0]), "");
  EXPECT_EQ(together[1].cache_difference(alone[1]), "");
  EXPECT_NE(together[0].difference(together[1]), "");
}

}  // namespace
}  // namespace msa::testing
