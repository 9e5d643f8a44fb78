// SPDX-License-Identifier: Apache-2.0
#include "cpu/ceilings.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdint>
#include <fstream>
#include <limits>
#include <vector>

#include "core/check.hpp"
#include "core/thread_pool.hpp"
#include "cpu/cpu.hpp"
#include "msa/backend.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/ceilings.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as Highway requires.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// `rounds` x 12 independent FMA chains: enough to cover latency 4 on two ports with room to spare.
/// Returns the FLOPs done; `sink` keeps the result alive.
double fma_rounds(std::int64_t rounds, float* sink) {
  const hn::ScalableTag<float> d;
  const auto factor = hn::Set(d, 0.999f);
  const auto summand = hn::Set(d, 1e-3f);
  // Different starts: equal chains would be merged by the compiler.
  const auto start = [d](float value) { return hn::Set(d, value); };
  auto a0 = start(0.0f), a1 = start(1.0f), a2 = start(2.0f), a3 = start(3.0f);
  auto a4 = start(4.0f), a5 = start(5.0f), a6 = start(6.0f), a7 = start(7.0f);
  auto a8 = start(8.0f), a9 = start(9.0f), a10 = start(10.0f), a11 = start(11.0f);
  for (std::int64_t i = 0; i < rounds; ++i) {
    a0 = hn::MulAdd(a0, factor, summand);
    a1 = hn::MulAdd(a1, factor, summand);
    a2 = hn::MulAdd(a2, factor, summand);
    a3 = hn::MulAdd(a3, factor, summand);
    a4 = hn::MulAdd(a4, factor, summand);
    a5 = hn::MulAdd(a5, factor, summand);
    a6 = hn::MulAdd(a6, factor, summand);
    a7 = hn::MulAdd(a7, factor, summand);
    a8 = hn::MulAdd(a8, factor, summand);
    a9 = hn::MulAdd(a9, factor, summand);
    a10 = hn::MulAdd(a10, factor, summand);
    a11 = hn::MulAdd(a11, factor, summand);
  }
  const auto sum = hn::Add(hn::Add(hn::Add(a0, a1), hn::Add(a2, a3)),
                           hn::Add(hn::Add(hn::Add(a4, a5), hn::Add(a6, a7)),
                                   hn::Add(hn::Add(a8, a9), hn::Add(a10, a11))));
  *sink = hn::GetLane(hn::SumOfLanes(d, sum));
  return 2.0 * 12.0 * static_cast<double>(hn::Lanes(d)) * static_cast<double>(rounds);
}

/// Sums `count` floats, a multiple of 4 * 8 vectors, in kStreams equal parts side by side.
template <int kStreams>
float sum_streams(const float* data, std::int64_t count) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const std::int64_t part = count / kStreams;
  constexpr std::int64_t kPerStream = 8 / kStreams;
  const std::int64_t step = kPerStream * lanes;
  // 8 sums: additions of latency 3 or 4 keep up with two loads per cycle.
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  const auto at = [&](std::int64_t i, std::int64_t n) {
    return hn::LoadU(d, data + n / kPerStream * part + i + n % kPerStream * lanes);
  };
  for (std::int64_t i = 0; i + step <= part; i += step) {
    s0 = hn::Add(s0, at(i, 0));
    s1 = hn::Add(s1, at(i, 1));
    s2 = hn::Add(s2, at(i, 2));
    s3 = hn::Add(s3, at(i, 3));
    s4 = hn::Add(s4, at(i, 4));
    s5 = hn::Add(s5, at(i, 5));
    s6 = hn::Add(s6, at(i, 6));
    s7 = hn::Add(s7, at(i, 7));
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)),
                                               hn::Add(hn::Add(s4, s5), hn::Add(s6, s7)))));
}

float sum_read(const float* data, std::int64_t count, bool four_streams) {
  return four_streams ? sum_streams<4>(data, count) : sum_streams<1>(data, count);
}

/// Copies `count` floats past the caches: a cached write reads its line first.
void stream_copy(const float* from, float* to, std::int64_t count) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  for (std::int64_t i = 0; i + 4 * lanes <= count; i += 4 * lanes) {
    const auto v0 = hn::Load(d, from + i);
    const auto v1 = hn::Load(d, from + i + lanes);
    const auto v2 = hn::Load(d, from + i + 2 * lanes);
    const auto v3 = hn::Load(d, from + i + 3 * lanes);
    hn::Stream(v0, d, to + i);
    hn::Stream(v1, d, to + i + lanes);
    hn::Stream(v2, d, to + i + 2 * lanes);
    hn::Stream(v3, d, to + i + 3 * lanes);
  }
  hwy::FlushStream();
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace msa::cpu {
HWY_EXPORT(fma_rounds);
HWY_EXPORT(sum_read);
HWY_EXPORT(stream_copy);

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Bytes of the last-level cache as Linux tells them, 0 where it doesn't.
std::size_t last_level_cache_bytes() {
  std::size_t kib = 0;
  for (int index = 0; index < 8; ++index) {
    std::ifstream file(core::concat("/sys/devices/system/cpu/cpu0/cache/index", index, "/size"));
    std::size_t size = 0;
    char unit = 0;
    if (file >> size >> unit) kib = std::max(kib, unit == 'M' ? size << 10 : size);
  }
  return kib << 10;
}

constexpr std::int64_t kPieces = 64;  ///< of a MemoryStream, for the pool to hand out

}  // namespace

double run_fma() {
  simd_target();  // MSA_CPU_TARGET also limits the ceiling
  constexpr std::int64_t kRounds = 1 << 20;
  const int threads = num_threads();
  std::vector<float> sinks(static_cast<std::size_t>(threads) * 16);
  std::vector<double> flops(static_cast<std::size_t>(threads));
  core::parallel_for(threads, [&](std::int64_t i, int) {
    const auto slot = static_cast<std::size_t>(i);
    flops[slot] = HWY_DYNAMIC_DISPATCH(fma_rounds)(kRounds, &sinks[slot * 16]);
  });
  double total = 0.0;
  for (double part : flops) total += part;
  return total;
}

Ceilings measure_ceilings(double seconds) {
  Ceilings best;
  const auto start_fma = Clock::now();
  do {
    const auto start = Clock::now();
    const double flops = run_fma();
    best.fma_gflops = std::max(best.fma_gflops, flops / seconds_since(start) * 1e-9);
  } while (seconds_since(start_fma) < seconds);

  MemoryStream memory;
  const auto start_read = Clock::now();
  do {
    best.read_gbytes_per_s = std::max(best.read_gbytes_per_s, memory.read());
  } while (seconds_since(start_read) < seconds);
  const auto start_copy = Clock::now();
  do {
    best.copy_gbytes_per_s = std::max(best.copy_gbytes_per_s, memory.copy());
  } while (seconds_since(start_copy) < seconds);
  return best;
}

MemoryStream::MemoryStream()
    : buffer_(std::clamp(std::bit_ceil(8 * last_level_cache_bytes()), std::size_t{256} << 20,
                         std::size_t{2} << 30)) {}

double MemoryStream::read() {
  const auto* const data = reinterpret_cast<const float*>(buffer_.data());
  const std::int64_t piece = static_cast<std::int64_t>(buffer_.size() / sizeof(float)) / kPieces;
  std::vector<float> sums(kPieces);
  double seconds = std::numeric_limits<double>::infinity();
  for (const bool four_streams : {false, true}) {
    const auto start = Clock::now();
    core::parallel_for(kPieces, [&](std::int64_t i, int) {
      sums[static_cast<std::size_t>(i)] =
          HWY_DYNAMIC_DISPATCH(sum_read)(data + i * piece, piece, four_streams);
    });
    seconds = std::min(seconds, seconds_since(start));
  }
  return static_cast<double>(buffer_.size()) / seconds * 1e-9;
}

double MemoryStream::copy() {
  auto* const data = reinterpret_cast<float*>(buffer_.data());
  const std::int64_t half = static_cast<std::int64_t>(buffer_.size() / sizeof(float)) / 2;
  const std::int64_t piece = half / kPieces;
  const auto start = Clock::now();
  core::parallel_for(kPieces, [&](std::int64_t i, int) {
    HWY_DYNAMIC_DISPATCH(stream_copy)(data + i * piece, data + half + i * piece, piece);
  });
  return static_cast<double>(buffer_.size()) / seconds_since(start) * 1e-9;
}

}  // namespace msa::cpu
#endif
