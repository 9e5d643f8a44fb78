// SPDX-License-Identifier: Apache-2.0
//
// ptx/barrier.cuh on the device: phases, remote arrivals, named barriers, register moves, dependent
// launches.
#include <numeric>

#include "cuda/common/ptx/barrier.cuh"
#include "tests/cuda/device_array.hpp"

namespace msa::testing {
namespace {

namespace ptx = cuda::ptx;

/// Warp 0 writes a value per round, warp 1 reads it: a ring of one slot with a full and an empty
/// barrier, so that a parity that lies shows as a wrong or repeated value.
__global__ void ring_kernel(int* seen, int rounds) {
  __shared__ alignas(8) std::uint64_t barriers[2];
  __shared__ int slot[32];
  const std::uint32_t full = ptx::smem_address(&barriers[0]);
  const std::uint32_t empty = ptx::smem_address(&barriers[1]);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 32);
    ptx::mbarrier_init(empty, 32);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    const auto parity = static_cast<std::uint32_t>(round & 1);
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(empty, parity ^ 1);  // passes at once in round 0
      slot[lane] = round * 100 + lane;
      ptx::mbarrier_arrive(full);
    } else {
      ptx::mbarrier_wait(full, parity);
      seen[round * 32 + lane] = slot[lane];
      ptx::mbarrier_arrive(empty);
    }
  }
}
TEST(PtxBarrier, MbarrierPhasesOrderARing) {
  constexpr int kRounds = 200;
  const DeviceArray<int> seen(std::vector<int>(kRounds * 32, -1));
  run_kernel(ring_kernel, {.threads = 64}, seen.data(), kRounds);
  const std::vector<int> values = seen.values();
  for (int i = 0; i < kRounds * 32; ++i) {
    ASSERT_EQ(values[static_cast<std::size_t>(i)], i / 32 * 100 + i % 32);
  }
}

/// try_wait says false before the phase completes and true after.
__global__ void try_kernel(int* results) {
  __shared__ alignas(8) std::uint64_t barrier;
  const std::uint32_t address = ptx::smem_address(&barrier);
  ptx::mbarrier_init(address, 2);
  results[0] = ptx::mbarrier_try_wait(address, 1) ? 1 : 0;  // the phase before the first
  results[1] = ptx::mbarrier_try_wait(address, 0) ? 1 : 0;
  ptx::mbarrier_arrive(address);
  results[2] = ptx::mbarrier_try_wait(address, 0) ? 1 : 0;
  ptx::mbarrier_arrive(address);
  results[3] = ptx::mbarrier_try_wait(address, 0) ? 1 : 0;
  // Expected bytes hold a phase open although all have arrived; nobody sends them.
  ptx::mbarrier_arrive(address);
  ptx::mbarrier_expect_tx(address, 16);
  results[4] = ptx::mbarrier_try_wait(address, 1) ? 1 : 0;
}
TEST(PtxBarrier, TryWaitTellsCompletePhases) {
  const DeviceArray<int> results(std::vector<int>(5, -1));
  run_kernel(try_kernel, {.threads = 1}, results.data());
  EXPECT_EQ(results.values(), (std::vector<int>{1, 0, 0, 1, 0}));
}

/// Every CTA of a cluster arrives at the barrier of CTA 0.
__global__ void remote_kernel(int* results) {
  __shared__ alignas(8) std::uint64_t barrier;
  const std::uint32_t address = ptx::smem_address(&barrier);
  const std::uint32_t rank = ptx::cluster_cta_rank();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(address, 64 * 4);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  ptx::mbarrier_arrive_remote(address, 0);
  if (rank == 0) ptx::mbarrier_wait(address, 0);
  if (threadIdx.x == 0) results[blockIdx.x] = static_cast<int>(rank);
  ptx::cluster_arrive();
  ptx::cluster_wait();
}
TEST(PtxBarrier, ArrivesAtAnotherCtaOfTheCluster) {
  const DeviceArray<int> results(std::vector<int>(8, -1));
  run_kernel(remote_kernel, {.grid = dim3(8), .threads = 64, .cluster = 4}, results.data());
  EXPECT_EQ(results.values(), (std::vector<int>{0, 1, 2, 3, 0, 1, 2, 3}));
}

/// Warps 0 and 1 fill and arrive, warp 2 syncs and sums.
__global__ void named_kernel(int* sums, int rounds) {
  __shared__ int slots[64];
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < 64) {
      slots[threadIdx.x] = round + static_cast<int>(threadIdx.x);
      __threadfence_block();
      ptx::named_barrier_arrive(1, 96);
    } else {
      ptx::named_barrier_sync(1, 96);
      int sum = 0;
      for (int i = 0; i < 64; ++i) sum += slots[i];
      if (threadIdx.x == 64) sums[round] = sum;
    }
    __syncthreads();  // racecheck loses sight of the reads above across a named barrier, at times
  }
}
TEST(PtxBarrier, NamedBarriersOrderProducersAndConsumers) {
  const DeviceArray<int> sums(std::vector<int>(50, -1));
  run_kernel(named_kernel, {.threads = 96}, sums.data(), 50);
  const std::vector<int> values = sums.values();
  for (int round = 0; round < 50; ++round) {
    EXPECT_EQ(values[static_cast<std::size_t>(round)], 64 * round + 63 * 32);
  }
}

/// The second warpgroup takes registers that the first gives up.
__global__ void __launch_bounds__(256) registers_kernel(int* sums) {
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread < 128) {
    ptx::decrease_registers<40>();
    sums[thread] = thread;
  } else {
    ptx::increase_registers<168>();
    sums[thread] = 2 * thread;
  }
}
TEST(PtxBarrier, WarpgroupsMoveRegisters) {
  const DeviceArray<int> sums(std::vector<int>(256, -1));
  run_kernel(registers_kernel, {.threads = 256}, sums.data());
  const std::vector<int> values = sums.values();
  EXPECT_EQ(values[127], 127);
  EXPECT_EQ(values[255], 510);
}

__global__ void first_kernel(int* data, int count) {
  ptx::let_dependents_start();  // long before the writes below
  __nanosleep(200000);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    data[i] = i;
  }
}
__global__ void second_kernel(const int* data, int* sum, int count) {
  ptx::wait_for_dependencies();
  int total = 0;
  for (int i = 0; i < count; ++i) total += data[i];
  *sum = total;
}
TEST(PtxBarrier, DependentLaunchSeesWhatItWaitedFor) {
  constexpr int kCount = 1000;
  const DeviceArray<int> data(std::vector<int>(kCount, 0));
  const DeviceArray<int> sum(std::vector<int>(1, -1));
  const DeviceStream stream;
  const auto handle = static_cast<cudaStream_t>(stream.stream().handle);
  cuda::launch(first_kernel, {.threads = 64}, handle, data.data(), kCount);
  cuda::launch(second_kernel, {.threads = 1, .dependent = true}, handle,
               static_cast<const int*>(data.data()), sum.data(), kCount);
  stream.wait();
  EXPECT_EQ(sum.values()[0], kCount * (kCount - 1) / 2);
}

}  // namespace
}  // namespace msa::testing
