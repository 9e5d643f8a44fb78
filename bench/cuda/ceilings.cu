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

// Two warpgroups, each D[64][256] += A[64][128 bytes] B[256][128 bytes]: the shape that reaches the
// most.
constexpr int kThreads = 256;
constexpr int kTileM = 64;
constexpr int kTileN = 256;
constexpr std::uint32_t kBytesA = kTileM * cuda::kPanelBytes;
constexpr std::uint32_t kBytesB = kTileN * cuda::kPanelBytes;
constexpr std::size_t kSmemBytes = 2 * kBytesA + kBytesB + 1024;
constexpr int kGroups = 8;  ///< of 4 wgmma each, between two drains

/// 16 bytes a thread and turn.
__global__ void copy_kernel(const uint4* from, uint4* to, std::int64_t count) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 4
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    __stcs(&to[i], __ldcs(&from[i]));
  }
}

template <class T>
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
        const std::uint64_t step_a = ptx::advance(a, cuda::k_major_step(kTileM, step));
        const std::uint64_t step_b = ptx::advance(b, cuda::k_major_step(kTileN, step));
        if constexpr (sizeof(T) == 2) {
          ptx::Wgmma<T, kTileN>::template ss<0>(sums, step_a, step_b, 1);
        } else {
          ptx::Wgmma<T, kTileN>::ss(sums, step_a, step_b, 1);
        }
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

template <class T>
double tensor_tflops(DType dtype) {
  const DeviceTensor values(dtype,
                            {static_cast<std::int64_t>((2 * kBytesA + kBytesB) / sizeof(T))});
  fill_normal(values, 1);
  const auto ctas = static_cast<unsigned>(cuda::num_sms(0));
  const DeviceMemory sink(ctas * kThreads * sizeof(float));
  constexpr int kRounds = 2500;  // 20 to 40 ms: under the power limit's control
  const Timing timing = time_on_device(
      [&](cudaStream_t stream) {
        cuda::launch(tensor_kernel<T>,
                     {.grid = dim3(ctas), .threads = kThreads, .smem_bytes = kSmemBytes}, stream,
                     static_cast<const uint4*>(values.data<uint4>()),
                     reinterpret_cast<float*>(sink.data()), kRounds);
      },
      {.min_runs = 5});
  constexpr double kDepth = cuda::kPanelBytes / sizeof(T);
  const double flops = 2.0 * 2 * kGroups * kTileM * kTileN * kDepth * kRounds * ctas;
  return flops / timing.median_ms * 1e-9;
}

}  // namespace

DeviceCeilings measure_device_ceilings() {
  DeviceCeilings ceilings;
  constexpr std::int64_t kCopyElements = std::int64_t{1} << 29;  // 1 GiB of bf16
  const DeviceTensor from(DType::bf16, {kCopyElements});
  const DeviceTensor to(DType::bf16, {kCopyElements});
  fill_normal(from, 1);
  const auto ctas = static_cast<unsigned>(cuda::num_sms(0));
  const Timing by_kernel = time_on_device(
      [&](cudaStream_t stream) {
        cuda::launch(copy_kernel, {.grid = dim3(8 * ctas), .threads = 256}, stream,
                     static_cast<const uint4*>(from.data<uint4>()), to.data<uint4>(),
                     static_cast<std::int64_t>(from.size() / sizeof(uint4)));
      },
      {.min_runs = 10});
  const Timing by_runtime = time_on_device(
      [&](cudaStream_t stream) {
        MSA_CUDA_CHECK(cudaMemcpyAsync(to.data<std::byte>(), from.data<std::byte>(), from.size(),
                                       cudaMemcpyDeviceToDevice, stream));
      },
      {.min_runs = 10});
  ceilings.copy_tbytes_per_s = 2.0 * static_cast<double>(from.size()) /
                               std::min(by_kernel.median_ms, by_runtime.median_ms) * 1e-9;
  if (cuda::compute_capability(0) != 90) return ceilings;
  ceilings.tensor_tflops = tensor_tflops<__nv_bfloat16>(DType::bf16);
  ceilings.e4m3_tflops = tensor_tflops<__nv_fp8_e4m3>(DType::e4m3);
  return ceilings;
}

}  // namespace msa::bench
