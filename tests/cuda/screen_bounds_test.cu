// SPDX-License-Identifier: Apache-2.0
//
// The bounds by which screened decode leaves blocks out hold the scores that the exact kernels
// compute, block by block: what selects the same ids by luck is seen here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>

#include "cuda/sm90/indexer_screen.hpp"
#include "tests/cuda/device_array.hpp"
#include "tests/cuda/screened_decode.hpp"

namespace msa::testing {
namespace {

using cuda::sm90::DecodeScoreParams;
using cuda::sm90::ScreenParams;

constexpr float kUnwritten = 12345.0f;

class GpuScreenBounds : public ::testing::TestWithParam<ScreenFamily> {
 protected:
  void SetUp() override { ASSERT_EQ(why_no_device(), ""); }
};

TEST_P(GpuScreenBounds, HoldTheExactScores) {
  constexpr int kGrid = 64;
  ScreenedDecode decode(DType::bf16, 4, 16, {{1, 9000}, {3, 2500}, {1, 130}});
  Noise noise(23);
  GetParam().fill(decode, noise);
  decode.upload();
  const std::int64_t columns = (decode.max_blocks() + 3) / 4 * 4;
  const std::int64_t count = decode.heads() * decode.total_q() * columns;
  const auto size = static_cast<std::size_t>(count);
  const DeviceArray<float> lower(std::vector<float>(size, kUnwritten));
  const DeviceArray<float> upper(std::vector<float>(size, kUnwritten));
  const DeviceArray<float> exact(std::vector<float>(size, kUnwritten));
  const std::int64_t words = (columns + 31) / 32;
  const DeviceArray<std::uint32_t> seen(
      std::vector<std::uint32_t>(static_cast<std::size_t>(decode.num_requests() * words)));
  const DeviceArray<int> num_survivors({7});
  const DeviceArray<std::int32_t> ids(
      std::vector<std::int32_t>(static_cast<std::size_t>(decode.heads() * decode.total_q() * 16)));
  const Indexer args = decode.args(TensorView::contiguous(
      ids.data(), DType::i32, {DeviceType::cuda, 0}, {decode.heads(), decode.total_q(), 16}));
  ScreenParams params{};
  params.exact = {.batch = cuda::make_device_batch(args),
                  .index_q = static_cast<const std::byte*>(args.index_q.data),
                  .query_stride = args.index_q.stride[0] * 2,
                  .query_head_stride = args.index_q.stride[1] * 2,
                  .index_k = static_cast<const std::byte*>(args.index_k.data),
                  .page_stride = args.index_k.stride[0] * 2,
                  .token_stride = args.index_k.stride[2] * 2,
                  .scores = lower.data(),
                  .head_stride = decode.total_q() * columns,
                  .row_stride = columns,
                  .num_columns = columns,
                  .heads = decode.heads(),
                  .pass_rows = 8};  // two passes over the request of twelve rows
  params.upper = upper.data();
  params.codes = static_cast<const std::byte*>(args.index_k_codes.data);
  params.codes_page_stride = args.index_k_codes.stride[0];
  params.codes_token_stride = args.index_k_codes.stride[2];
  params.scales = static_cast<const std::byte*>(args.index_k_scales.data);
  params.scales_page_stride = args.index_k_scales.stride[0] * 2;
  params.scales_token_stride = args.index_k_scales.stride[2] * 2;
  params.seen = seen.data();
  params.seen_words = words;
  params.num_survivors = num_survivors.data();
  DecodeScoreParams exact_params = params.exact;
  exact_params.scores = exact.data();
  const DeviceStream stream;
  const auto handle = static_cast<cudaStream_t>(stream.stream().handle);
  run_screen(params, DType::bf16, kGrid, handle);
  run_decode_scores_bf16(exact_params, 128, kGrid, handle);
  stream.wait();
  const std::vector<float> low = lower.values();
  const std::vector<float> high = upper.values();
  const std::vector<float> score = exact.values();
  EXPECT_EQ(num_survivors.values()[0], 0);
  int num_scores = 0;
  int num_wrong = 0;
  double nearest = 1.0;  // to a bound, of its distance to the middle
  for (std::size_t i = 0; i < size; ++i) {
    EXPECT_EQ(low[i] == kUnwritten, score[i] == kUnwritten) << i;
    if (score[i] == kUnwritten) continue;
    ++num_scores;
    if (!(low[i] <= score[i] && score[i] <= high[i])) ++num_wrong;
    const double room = (static_cast<double>(high[i]) - static_cast<double>(low[i])) / 2.0;
    if (!std::isfinite(room) || room == 0.0) continue;
    nearest = std::min({nearest, (static_cast<double>(score[i]) - low[i]) / room,
                        (static_cast<double>(high[i]) - score[i]) / room});
  }
  // Of the first row's 71 blocks those that 16 others do not rule out.
  std::vector<float> sorted(low.begin(), low.begin() + 71);
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const auto num_left = std::count_if(high.begin(), high.begin() + 71,
                                      [&](float bound) { return !(bound < sorted[15]); });
  std::printf(
      "%s: %d scores, the nearest at %.2g of the way from its bound; %d of 71 blocks left\n",
      GetParam().name, num_scores, nearest, static_cast<int>(num_left));
  EXPECT_GE(num_left, 16);
  if (std::string(GetParam().name) == "normal") EXPECT_LE(num_left, 24);
  EXPECT_EQ(num_wrong, 0);
  EXPECT_EQ(num_scores, decode.heads() * (71 + 3 * 20 + 2));
}

INSTANTIATE_TEST_SUITE_P(Families, GpuScreenBounds, ::testing::ValuesIn(screen_families()),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace msa::testing
