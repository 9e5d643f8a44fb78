// SPDX-License-Identifier: Apache-2.0
//
// Two streams that run plans of one kind at once, each with its own workspace and outputs: the bits
// are those of runs that had the GPU to themselves.
#include <gtest/gtest.h>

#include <cstring>
#include <deque>

#include "core/operation.hpp"
#include "msa/error.hpp"
#include "tests/support/device.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

constexpr std::byte kUnwritten{0xff};

/// A plan on cuda:0 with a stream, workspace and copies of all tensors of its own.
template <class Args>
class Lane {
 public:
  Lane(const Case& spec, const char* backend)
      : inputs_(spec), args_(inputs_.args<Args>()), outputs_(inputs_, args_), device_args_(args_) {
    const auto for_each_view = [&](const auto& change) {
      core::for_each_tensor(device_args_, [&](const char*, const TensorView& view, core::Use) {
        if (view.given()) change(const_cast<TensorView&>(view));
      });
    };
    for_each_view([](TensorView& view) { view.device = {DeviceType::cuda, 0}; });
    plan_ = msa::plan(device_args_, {.backend = backend});
    std::vector<std::span<std::byte>> buffers = inputs_.buffers();
    const std::vector<std::span<std::byte>> outputs = outputs_.buffers();
    buffers.insert(buffers.end(), outputs.begin(), outputs.end());
    for_each_view([&](TensorView& view) { view = mirror_.at(view, buffers); });
    workspace_.emplace(plan_.workspace_bytes() + 1);
  }

  void enqueue() {
    plan_.run(device_args_, workspace_->span().first(plan_.workspace_bytes()), stream_.stream());
  }
  void wait() const { stream_.wait(); }
  /// Outputs and workspace as they were before any run, so that a run which does nothing is seen.
  void forget() {
    for (const std::span<std::byte> host : outputs_.buffers()) {
      const core::HostBuffer empty(host.size());
      std::memset(empty.data(), static_cast<int>(kUnwritten), host.size());
      mirror_.find(host)->upload(empty.span());
    }
    workspace_->fill(kUnwritten);
  }
  std::vector<std::vector<std::byte>> results() const {
    std::vector<std::vector<std::byte>> all;
    for (const std::span<std::byte> host : outputs_.buffers()) {
      all.emplace_back(host.size());
      mirror_.find(host)->download(all.back());
    }
    return all;
  }

 private:
  Inputs inputs_;
  Args args_;
  Outputs outputs_;
  Args device_args_;
  DeviceMirror mirror_;
  DeviceStream stream_;
  std::optional<DeviceBuffer> workspace_;
  Plan<Args> plan_;
};

template <class Args>
void check_two_streams(const char* backend) {
  ASSERT_EQ(why_no_device(), "");
  // Enough queries for every sm90 kernel, those of scattered selections included, and more tiles
  // than SMs.
  Case spec{.name = "two_streams",
            .problem = {.num_q_heads = 32, .num_kv_heads = 2},
            .dtype = DType::bf16,
            .sequences = {{2100, 2500}},
            .keys = Keys::paged,
            .selection = Selection::scattered,
            .row_gap = 8,
            .seed = 41};
  std::deque<Lane<Args>> lanes;
  std::vector<std::vector<std::vector<std::byte>>> alone;
  for (int i = 0; i < 2; ++i) {
    try {
      lanes.emplace_back(spec, backend);
    } catch (const Error& error) {
      FAIL() << backend << ": " << error.what();
    }
    lanes.back().forget();
    lanes.back().enqueue();
    lanes.back().wait();
    alone.push_back(lanes.back().results());
    spec.seed += 2;
    spec.sequences = {{2300, 2300}};
  }
  for (int round = 0; round < 3; ++round) {
    for (Lane<Args>& lane : lanes) lane.forget();
    for (int i = 0; i < 10; ++i) {
      for (Lane<Args>& lane : lanes) lane.enqueue();
    }
    for (Lane<Args>& lane : lanes) lane.wait();
    for (std::size_t i = 0; i < lanes.size(); ++i) {
      EXPECT_EQ(lanes[i].results(), alone[i]) << backend << ", stream " << i;
    }
  }
}

TEST(GpuStreams, TwoIndexers) {
  check_two_streams<Indexer>("cuda_sm90");
  check_two_streams<Indexer>("cuda_generic");
}
TEST(GpuStreams, TwoSparseAttentions) {
  check_two_streams<SparseAttentionForward>("cuda_sm90");
  check_two_streams<SparseAttentionForward>("cuda_generic");
}
TEST(GpuStreams, TwoDenseAttentions) { check_two_streams<DenseAttentionForward>("cuda_generic"); }

}  // namespace
}  // namespace msa::testing
