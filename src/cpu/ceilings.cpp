// SPDX-License-Identifier: Apache-2.0
#include "cpu/ceilings.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "core/tensor.hpp"
#include "core/thread_pool.hpp"
#include "cpu/cpu.hpp"
#include "msa/backend.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/ceilings.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as Highway requires.
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

float sum_read(const float* data, std::int64_t count) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  auto s0 = hn::Zero(d), s1 = hn::Zero(d), s2 = hn::Zero(d), s3 = hn::Zero(d);
  for (std::int64_t i = 0; i + 4 * lanes <= count; i += 4 * lanes) {
    s0 = hn::Add(s0, hn::LoadU(d, data + i));
    s1 = hn::Add(s1, hn::LoadU(d, data + i + lanes));
    s2 = hn::Add(s2, hn::LoadU(d, data + i + 2 * lanes));
    s3 = hn::Add(s3, hn::LoadU(d, data + i + 3 * lanes));
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace msa::cpu {
HWY_EXPORT(fma_rounds);
HWY_EXPORT(sum_read);

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

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

  constexpr std::int64_t kFloats = std::int64_t{64} << 20;  // 256 MiB
  constexpr std::int64_t kPieces = 64;
  const core::HostBuffer buffer(static_cast<std::size_t>(kFloats) * sizeof(float));
  const auto* const data = reinterpret_cast<const float*>(buffer.data());
  std::vector<float> sums(kPieces);
  const auto start_read = Clock::now();
  do {
    const auto start = Clock::now();
    core::parallel_for(kPieces, [&](std::int64_t i, int) {
      constexpr std::int64_t kPiece = kFloats / kPieces;
      sums[static_cast<std::size_t>(i)] = HWY_DYNAMIC_DISPATCH(sum_read)(data + i * kPiece, kPiece);
    });
    const double bytes = static_cast<double>(kFloats) * sizeof(float);
    best.read_gbytes_per_s = std::max(best.read_gbytes_per_s, bytes / seconds_since(start) * 1e-9);
  } while (seconds_since(start_read) < seconds);
  return best;
}

}  // namespace msa::cpu
#endif
