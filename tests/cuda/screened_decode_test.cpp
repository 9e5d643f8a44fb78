// SPDX-License-Identifier: Apache-2.0
//
// The screened row of decode selects what the row that reads every key selects, bit for bit,
// whatever the keys hold.
#include "tests/cuda/screened_decode.hpp"

#include <gtest/gtest.h>

#include "core/env.hpp"
#include "msa/tensor.hpp"

namespace msa::testing {
namespace {

constexpr const char* kExact = "cuda_sm90_decode";
constexpr const char* kScreened = "cuda_sm90_decode_screened";

int num_runs() {
  const std::string runs = core::env("MSA_GPU_RUNS");
  return runs.empty() ? 4 : std::stoi(runs);
}

void expect_same_selection(ScreenedDecode& decode) {
  decode.upload();
  const std::vector<std::int32_t> expected = decode.select(kExact);
  for (int run = 0; run < num_runs(); ++run) {
    EXPECT_EQ(decode.select(kScreened), expected) << "run " << run;
  }
}

class GpuScreened : public ::testing::TestWithParam<ScreenFamily> {
 protected:
  void SetUp() override { ASSERT_EQ(why_no_device(), ""); }
};

TEST_P(GpuScreened, SelectsTheSameBlocksOfMixedRequests) {
  for (const DType dtype : {DType::bf16, DType::f16}) {
    SCOPED_TRACE(name_of(dtype));
    // Fewer and as many blocks as are wanted, one more, query tokens before the first key, none.
    ScreenedDecode decode(dtype, 2, 16,
                          {{1, 5000},
                           {0, 700},
                           {16, 4097},
                           {2, 0},
                           {3, 2048},
                           {4, 2049},
                           {1, 2177},
                           {5, 3},
                           {1, 1},
                           {1, 8192}});
    Noise noise(7);
    GetParam().fill(decode, noise);
    decode.lose_page(0, 3, -1);
    decode.lose_page(2, 30, 1 << 20);
    decode.lose_page(9, 63, -1);
    expect_same_selection(decode);
  }
}

TEST_P(GpuScreened, SelectsTheSameBlocksOfALongRequest) {
  ScreenedDecode decode(DType::bf16, 4, 16, {{1, 65'536 - 9}});
  Noise noise(11);
  GetParam().fill(decode, noise);
  expect_same_selection(decode);
}

TEST_P(GpuScreened, SelectsTheSameBlocksBesideForcedOnes) {
  ScreenedDecode decode(DType::bf16, 1, 16, {{2, 4000}, {1, 16'001}});
  decode.problem.num_local_blocks = 3;
  decode.problem.num_init_blocks = 2;
  Noise noise(13);
  GetParam().fill(decode, noise);
  expect_same_selection(decode);
}

INSTANTIATE_TEST_SUITE_P(Families, GpuScreened, ::testing::ValuesIn(screen_families()),
                         [](const auto& test) { return std::string(test.param.name); });

TEST(GpuScreenedShape, MoreRowsThanOnePassTakes) {
  ASSERT_EQ(why_no_device(), "");
  ScreenedDecode decode(DType::bf16, 12, 5, {{16, 3000}, {16, 90}, {16, 1025}});
  Noise noise(17);
  screen_families().front().fill(decode, noise);
  expect_same_selection(decode);
}

TEST(GpuScreenedShape, ManyRequests) {
  ASSERT_EQ(why_no_device(), "");
  std::vector<Request> requests;
  for (std::int32_t i = 0; i < 400; ++i) requests.push_back({i % 3, i * i % 3700});
  ScreenedDecode decode(DType::bf16, 2, 8, requests);
  Noise noise(19);
  screen_families().front().fill(decode, noise);
  expect_same_selection(decode);
}

}  // namespace
}  // namespace msa::testing
