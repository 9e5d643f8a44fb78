// SPDX-License-Identifier: Apache-2.0
//
// What the bound of screened decode assumes of tensor cores: a step of mma.m16n8k16 is within
// 40 * 2^-23 of the sum of the magnitudes of its 17 terms (sm90_decode_indexer.md). No vendor says
// so; these sums are as hard on it as we know how.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>

#include "core/scalar.hpp"
#include "cuda/common/ptx/mma.cuh"
#include "tests/cuda/device_array.hpp"
#include "tests/cuda/screened_decode.hpp"

namespace msa::testing {
namespace {

constexpr double kAssumed = 40.0;  // in units of 2^-23 of the sum of magnitudes
constexpr int kTiles = 8192;       // of 16 x 8 sums
constexpr int kRows = 16;
constexpr int kColumns = 8;
constexpr int kTerms = 16;

/// A warp a tile. Words are two terms in a row: a [tile][row][8], b [tile][column][8].
template <class T>
__global__ void step_kernel(const std::uint32_t* a, const std::uint32_t* b, const float* c,
                            float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  const int g = lane / 4;
  const int t = lane % 4;
  const auto tile = static_cast<int>(blockIdx.x);
  const std::uint32_t* const a_row = a + (tile * kRows + g) * (kTerms / 2) + t;
  const std::uint32_t* const b_column = b + (tile * kColumns + g) * (kTerms / 2) + t;
  const int at = (tile * kRows + g) * kColumns + 2 * t;
  constexpr int kDown = 8 * kTerms / 2;
  float sums[4] = {c[at], c[at + 1], c[at + 8 * kColumns], c[at + 8 * kColumns + 1]};
  cuda::ptx::mma_m16n8k16<T>(sums, {a_row[0], a_row[kDown], a_row[4], a_row[kDown + 4]},
                             b_column[0], b_column[4]);
  d[at] = sums[0];
  d[at + 1] = sums[1];
  d[at + 8 * kColumns] = sums[2];
  d[at + 8 * kColumns + 1] = sums[3];
}

/// Values of at most 11 significant bits, exact in both types where those of bf16 have 8.
struct Steps {
  std::vector<std::uint16_t> a, b;
  std::vector<double> a_values, b_values;
  std::vector<float> c;
};

/// Terms far below the largest one, of magnitudes just short of a power of two: what is cut off
/// each is nearly a unit of whatever place they are cut at, and with equal signs it adds up. The
/// largest is the accumulator or a product, of either sign, and sometimes nearly cancelled.
/// Products are multiples of 2^-33 and sums below 2^20, so that double holds every sum exactly.
Steps make_steps(DType dtype) {
  Noise noise(31);
  Steps steps;
  const double just_short = dtype == DType::bf16 ? 2.0 - 0x1p-7 : 2.0 - 0x1p-10;
  const auto mantissa = [&] {
    const auto choice = noise.below(4);
    if (choice < 2) return just_short;
    return choice == 2 ? 1.0 : 1.0 + static_cast<double>(noise.below(128)) * 0x1p-7;
  };
  const auto put = [&](std::vector<std::uint16_t>& bits, std::vector<double>& values,
                       double value) {
    std::array<std::uint16_t, 4> element{};  // room for the largest type
    core::store_element(reinterpret_cast<std::byte*>(element.data()), dtype, value);
    bits.push_back(element[0]);
    values.push_back(core::load_element(reinterpret_cast<const std::byte*>(element.data()), dtype));
  };
  for (int tile = 0; tile < kTiles; ++tile) {
    const bool one_mantissa = noise.below(2) == 0;
    const bool one_sign = noise.below(3) > 0;
    std::array<double, kRows> largest{};
    for (int row = 0; row < kRows; ++row) {
      const auto below = static_cast<int>(10 + noise.below(15));  // 10..24
      const auto spread = noise.below(4) == 0 ? 6 : 1;
      const auto place = noise.below(2) == 0 ? noise.below(kTerms) : kTerms;  // the accumulator
      largest[static_cast<std::size_t>(row)] =
          place == kTerms ? std::ldexp(1.0, 12 + static_cast<int>(noise.below(4))) : 0.0;
      const bool cancelled = place < kTerms && noise.below(4) == 0;
      for (int k = 0; k < kTerms; ++k) {
        const auto lower = std::min(24, below + static_cast<int>(noise.below(spread)));
        double value = std::ldexp(one_mantissa ? just_short : mantissa(), 12 - lower);
        if (k == place) value = 0x1p12;
        if (cancelled && k == (place + 5) % kTerms) value = -0x1p12;
        if (!one_sign && k != place && noise.below(2) == 0) value = -value;
        put(steps.a, steps.a_values, value);
      }
    }
    const bool plain = noise.below(2) == 0;
    for (int column = 0; column < kColumns; ++column) {
      const double of_column = plain ? (column % 2 == 0 ? 1.0 : just_short) : 0.0;
      for (int k = 0; k < kTerms; ++k) put(steps.b, steps.b_values, plain ? of_column : mantissa());
    }
    for (const double value : largest) {
      for (int column = 0; column < kColumns; ++column) {
        const double sign = noise.below(3) == 0 ? -1.0 : 1.0;
        const double small = static_cast<double>(noise.below(1 << 20)) * 0x1p-30;
        steps.c.push_back(static_cast<float>(value == 0.0 ? sign * small : sign * value));
      }
    }
  }
  return steps;
}

/// The largest error of result(terms, index), in units of 2^-23 of the sum of magnitudes.
template <class Result>
double worst_error(const Steps& steps, const Result& result) {
  double worst = 0.0;
  for (std::size_t i = 0; i < steps.c.size(); ++i) {
    const std::size_t row = i / kColumns;
    const std::size_t column = i / (kRows * kColumns) * kColumns + i % kColumns;
    std::array<double, kTerms + 1> terms{};
    for (std::size_t k = 0; k < kTerms; ++k) {
      terms[k] = steps.a_values[row * kTerms + k] * steps.b_values[column * kTerms + k];
    }
    terms[kTerms] = static_cast<double>(steps.c[i]);
    double sum = 0.0;
    double magnitudes = 0.0;
    for (const double term : terms) {
      sum += term;
      magnitudes += std::fabs(term);
    }
    worst = std::max(worst, std::fabs(result(terms, i) - sum) / magnitudes * 0x1p23);
  }
  return worst;
}

/// Terms cut to 2^-places of the largest one's power of two, then summed exactly.
double cut_sum(const std::array<double, kTerms + 1>& terms, int places) {
  double largest = 0.0;
  for (const double term : terms) largest = std::max(largest, std::fabs(term));
  if (largest == 0.0) return 0.0;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - places);
  double sum = 0.0;
  for (const double term : terms) sum += std::trunc(term / unit) * unit;
  return sum;
}

class MmaSums : public ::testing::TestWithParam<DType> {};

/// Without a GPU: cut at the 23rd place these sums come near what that may cost, and two places
/// less would be seen.
TEST_P(MmaSums, AreHardEnoughToTellPlacesApart) {
  const Steps steps = make_steps(GetParam());
  const auto cut = [&](int places) {
    return worst_error(steps,
                       [&](const auto& terms, std::size_t) { return cut_sum(terms, places); });
  };
  const double at_23 = cut(23);
  std::printf("cut at 2^-23: %.3g, at 2^-22: %.3g, at 2^-21: %.3g\n", at_23, cut(22), cut(21));
  EXPECT_GE(at_23, 12.0);
  EXPECT_LE(at_23, 17.0);
  EXPECT_GT(cut(21), kAssumed);
}

class GpuMmaSums : public MmaSums {
 protected:
  void SetUp() override { ASSERT_EQ(why_no_device(), ""); }
};

TEST_P(GpuMmaSums, AreWithinWhatScreeningAssumes) {
  const Steps steps = make_steps(GetParam());
  const auto words = [](const std::vector<std::uint16_t>& elements) {
    std::vector<std::uint32_t> pairs(elements.size() / 2);
    for (std::size_t i = 0; i < pairs.size(); ++i) {
      pairs[i] = elements[2 * i] | static_cast<std::uint32_t>(elements[2 * i + 1]) << 16;
    }
    return pairs;
  };
  const DeviceArray<std::uint32_t> a(words(steps.a));
  const DeviceArray<std::uint32_t> b(words(steps.b));
  const DeviceArray<float> c(steps.c);
  const DeviceArray<float> d(std::vector<float>(steps.c.size(), NAN));
  run_kernel(GetParam() == DType::bf16 ? step_kernel<__nv_bfloat16> : step_kernel<__half>,
             {.grid = dim3(kTiles), .threads = 32}, static_cast<const std::uint32_t*>(a.data()),
             static_cast<const std::uint32_t*>(b.data()), static_cast<const float*>(c.data()),
             d.data());
  const std::vector<float> sums = d.values();
  const double worst = worst_error(steps, [&](const auto&, std::size_t i) {
    return std::isfinite(sums[i]) ? static_cast<double>(sums[i]) : INFINITY;
  });
  std::printf("largest error: %.3g of 2^-23 of the sum of magnitudes\n", worst);
  EXPECT_LE(worst, kAssumed);
}

const auto kName = [](const auto& test) { return std::string(name_of(test.param)); };
INSTANTIATE_TEST_SUITE_P(Types, MmaSums, ::testing::Values(DType::bf16, DType::f16), kName);
INSTANTIATE_TEST_SUITE_P(Types, GpuMmaSums, ::testing::Values(DType::bf16, DType::f16), kName);

}  // namespace
}  // namespace msa::testing
