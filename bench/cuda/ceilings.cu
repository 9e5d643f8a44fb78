// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "bench/cuda/ceilings.hpp"
#include "bench/cuda/generate.hpp"
#include "bench/cuda/timing.hpp"
#include "cuda/common/device.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/wgmma.cuh"
#include "cuda/common/swizzle.cuh"

namespace msa::bench {
namespace {

namespace ptx = cuda::ptx;

// Two warpgroups, each D[64][256] += A[64][64] B[256][64]: the shape that reaches the most.
constexpr int kThreads = 256;
constexpr int kTileM = 64;
constexpr int kTileN = 256;
constexpr std::uint32_t kBytesA = kTileM * cuda::kPanelBytes;
constexpr std::uint32_t kBytesB = kTileN * cuda::kPanelBytes;
constexpr std::size_t kSmemBytes = 2 * kBytesA + kBytesB + 1024;
constexpr int kGroups = 8;  ///< of 4 wgmma each, between two drains
constexpr double kFlopsPerRound = 2.0 * 2 * kGroups * 4 * kTileM * kTileN * 16;  // of one CTA

__global__ void __launch_bounds__(kThreads, 1)
    tensor_kernel(const uint4* values, float* sink, int rounds) {
  extern __shared__ std::uint8_t raw[];
  std::uint8_t* const smem = raw + (1024 - ptx::smem_address(raw) % 1024) % 1024;
  for (std::uint32_t i = threadIdx.x; i < (2 * kBytesA + kBytesB) / 16; i += kThreads) {
    reinterpret_cast<uint4*>(smem)[i] = values[i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  const std::uint32_t base = ptx::smem_address(smem);
  const std::uint64_t a = ptx::k_major_descriptor(base + threadIdx.x / 128 * kBytesA);
  const std::uint64_t b = ptx::k_major_descriptor(base + 2 * kBytesA);
  float sums[kTileN / 2] = {};
  for (int round = 0; round < rounds; ++round) {
    ptx::pin(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (std::uint32_t step = 0; step < 4; ++step) {
        ptx::Wgmma<__nv_bfloat16, kTileN>::ss<0>(
            sums, ptx::advance(a, cuda::k_major_step(kTileM, step)),
            ptx::advance(b, cuda::k_major_step(kTileN, step)), 1);
      }
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<0>();
    ptx::pin(sums);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kTileN / 2; ++i) sum += sums[i];
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;
}

}  // namespace

DeviceCeilings measure_device_ceilings() {
  DeviceCeilings ceilings;
  constexpr std::int64_t kCopyElements = std::int64_t{1} << 29;  // 1 GiB of bf16
  const DeviceTensor from(DType::bf16, {kCopyElements});
  const DeviceTensor to(DType::bf16, {kCopyElements});
  fill_normal(from, 1);
  const Timing copy = time_on_device(
      [&](cudaStream_t stream) {
        MSA_CUDA_CHECK(cudaMemcpyAsync(to.data<std::byte>(), from.data<std::byte>(), from.size(),
                                       cudaMemcpyDeviceToDevice, stream));
      },
      {.min_runs = 10});
  ceilings.copy_tbytes_per_s = 2.0 * static_cast<double>(from.size()) / copy.median_ms * 1e-9;
  if (cuda::compute_capability(0) != 90) return ceilings;
  const auto ctas = static_cast<unsigned>(cuda::num_sms(0));
  const DeviceMemory sink(ctas * kThreads * sizeof(float));
  constexpr int kRounds = 2500;  // 40 ms: under the power limit's control
  const Timing tensor = time_on_device(
      [&](cudaStream_t stream) {
        cuda::launch(tensor_kernel,
                     {.grid = dim3(ctas), .threads = kThreads, .smem_bytes = kSmemBytes}, stream,
                     static_cast<const uint4*>(from.data<uint4>()),
                     reinterpret_cast<float*>(sink.data()), kRounds);
      },
      {.min_runs = 5});
  ceilings.tensor_tflops = kFlopsPerRound * kRounds * ctas / tensor.median_ms * 1e-9;
  return ceilings;
}

}  // namespace msa::bench
