// SPDX-License-Identifier: Apache-2.0
//
// That the machinery under the GPU tests sees what it is meant to see.
#include "tests/support/device.hpp"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "core/tensor.hpp"
#include "msa/error.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

TEST(Device, MirrorsWholeBuffersAtTheSameLayout) {
  ASSERT_EQ(why_no_device(), "");
  Inputs inputs(Case{.sequences = {{3, 40}}, .keys = Keys::paged});
  DeviceMirror mirror;
  const std::vector<std::span<std::byte>> buffers = inputs.buffers();
  const TensorView host = inputs.k;
  const TensorView device = mirror.at(host, buffers);
  EXPECT_EQ(device.device, (Device{DeviceType::cuda, 0}));
  EXPECT_EQ(device.stride, host.stride);
  const DeviceBuffer* copy = mirror.find(inputs.k.bytes());
  ASSERT_NE(copy, nullptr);
  const core::HostBuffer back(copy->size());
  copy->download(back.span());
  EXPECT_TRUE(std::equal(inputs.k.bytes().begin(), inputs.k.bytes().end(), back.data()));
  EXPECT_EQ(static_cast<std::byte*>(device.data) - copy->data(),
            static_cast<std::byte*>(host.data) - inputs.k.bytes().data());
  EXPECT_EQ(mirror.find(inputs.v.bytes()), nullptr);  // no view asked for it
  EXPECT_FALSE(mirror.at(TensorView{}, buffers).given());
  int outside = 0;
  EXPECT_THROW(mirror.at(TensorView::contiguous(&outside, DType::i32, {}, {1}), buffers), Error);
}

TEST(Device, StreamsAndGraphsRunWhatIsPutOnThem) {
  ASSERT_EQ(why_no_device(), "");
  const DeviceBuffer buffer(1024);
  buffer.fill(std::byte{1});
  const DeviceStream stream;
  int calls = 0;
  const auto work = [&](Stream on) {
    ++calls;
    cudaMemsetAsync(buffer.data(), 7, 512, static_cast<cudaStream_t>(on.handle));
  };
  stream.run_as_graph(work);
  EXPECT_EQ(calls, 1);
  core::HostBuffer back(1024);
  buffer.download(back.span());
  EXPECT_EQ(back.span()[511], std::byte{7});
  EXPECT_EQ(back.span()[512], std::byte{1});
}

}  // namespace
}  // namespace msa::testing
