// SPDX-License-Identifier: Apache-2.0
#include "core/workspace.hpp"

#include <gtest/gtest.h>

#include "core/tensor.hpp"

namespace msa::core {
namespace {

struct Parts {
  float* a;
  double* b;
  std::byte* c;
};

Parts lay_out(WorkspaceLayout& layout) {
  return {layout.take<float>(3), layout.take<double>(9), layout.take<std::byte>(0)};
}

TEST(WorkspaceLayout, CountsAndHandsOutTheSame) {
  WorkspaceLayout counting;
  const Parts counted = lay_out(counting);
  EXPECT_EQ(counted.a, nullptr);
  EXPECT_EQ(counted.b, nullptr);
  EXPECT_EQ(counting.bytes(), 64u + 128u);

  const HostBuffer memory(counting.bytes());
  WorkspaceLayout layout(memory.data());
  const Parts parts = lay_out(layout);
  EXPECT_EQ(layout.bytes(), counting.bytes());
  EXPECT_EQ(reinterpret_cast<std::byte*>(parts.a), memory.data());
  EXPECT_EQ(reinterpret_cast<std::byte*>(parts.b), memory.data() + 64);
  EXPECT_EQ(parts.c, memory.data() + 192);
}

TEST(HostBuffer, IsZeroedAndAligned) {
  for (const std::size_t bytes : {0u, 1u, 64u, 1000u}) {
    const HostBuffer buffer(bytes);
    EXPECT_EQ(buffer.size(), bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % 64, 0u);
    for (const std::byte byte : buffer.span()) EXPECT_EQ(byte, std::byte{0});
  }
}

TEST(Tensor, OwnsAContiguousView) {
  const Tensor tensor(DType::bf16, {2, 5});
  EXPECT_EQ(tensor.view().stride[0], 5);
  EXPECT_EQ(tensor.span<std::uint16_t>().size(), 10u);
  EXPECT_EQ(tensor.view().data, tensor.data<std::byte>());
}

}  // namespace
}  // namespace msa::core
