// SPDX-License-Identifier: Apache-2.0
//
// The swizzle functions, exhaustively, on the host: each tile's bytes are a permutation, 16-byte
// chunks stay whole, and columns of 8 chunks meet every bank group.
#include <gtest/gtest.h>

#include <set>
#include <vector>

#include "cuda/common/swizzle.cuh"

namespace msa::testing {
namespace {

TEST(Swizzle, PermutesChunksWithinRows) {
  for (std::uint32_t row = 0; row < 256; ++row) {
    for (std::uint32_t byte = 0; byte < 128; ++byte) {
      const std::uint32_t at = cuda::swizzled(row, byte);
      EXPECT_EQ(at / 128, row);
      EXPECT_EQ(at % 16, byte % 16);
      EXPECT_EQ(at % 128 / 16, (byte / 16) ^ (row % 8));
    }
  }
  // The same chunk of 8 rows lies in 8 different groups of 4 banks.
  for (std::uint32_t chunk = 0; chunk < 8; ++chunk) {
    std::set<std::uint32_t> groups;
    for (std::uint32_t row = 0; row < 8; ++row) {
      groups.insert(cuda::swizzled(row, 16 * chunk) % 128 / 16);
    }
    EXPECT_EQ(groups.size(), 8u);
  }
}

TEST(Swizzle, TilesArePermutations) {
  for (const std::uint32_t rows : {8u, 16u, 32u, 64u, 128u, 256u}) {
    for (const std::uint32_t row_bytes : {128u, 256u, 512u}) {
      std::vector<bool> used(static_cast<std::size_t>(rows) * row_bytes, false);
      for (std::uint32_t row = 0; row < rows; ++row) {
        for (std::uint32_t byte = 0; byte < row_bytes; ++byte) {
          const std::uint32_t at = cuda::k_major(rows, row, byte);
          ASSERT_LT(at, used.size());
          ASSERT_FALSE(used[at]) << rows << ' ' << row << ' ' << byte;
          used[at] = true;
        }
      }
    }
  }
}

// A K step of 32 bytes begins where its first chunk of row 0 lies, whose row xors with nothing.
TEST(Swizzle, StepsPointAtTheirChunks) {
  for (const std::uint32_t rows : {8u, 64u, 128u}) {
    for (std::uint32_t step = 0; step < 16; ++step) {
      EXPECT_EQ(cuda::k_major_step(rows, step), cuda::k_major(rows, 0, 32 * step));
    }
  }
  for (std::uint32_t step = 0; step < 16; ++step) {
    EXPECT_EQ(cuda::mn_major_step(step), cuda::swizzled(16 * step, 0));
  }
}

}  // namespace
}  // namespace msa::testing
