// SPDX-License-Identifier: Apache-2.0
//
// ptx/tma.cuh and tensor_map.hpp on the device: boxes land where swizzle.cuh says, zeros outside of
// the tensor, stores leave the outside alone.
#include <array>
#include <functional>

#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/swizzle.cuh"
#include "cuda/common/tensor_map.hpp"
#include "msa/error.hpp"
#include "tests/cuda/device_array.hpp"

namespace msa::testing {
namespace {

namespace ptx = cuda::ptx;

constexpr int kBoxBytes = 16 * 128;  ///< 16 rows of 64 elements of 16 bits

struct Place {
  int rank;
  int x, y, z, w;
};

/// One box into shared memory, and the shared memory out as it is.
__global__ void load_kernel(const __grid_constant__ CUtensorMap map, Place at, std::uint8_t* out) {
  extern __shared__ __align__(1024) std::uint8_t smem[];
  __shared__ alignas(8) std::uint64_t barrier;
  const std::uint32_t address = ptx::smem_address(&barrier);
  const std::uint32_t to = ptx::smem_address(smem);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbarrier_init(address, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_expect_tx(address, kBoxBytes);
    if (at.rank == 2) ptx::tma_load_2d(to, &map, at.x, at.y, address);
    if (at.rank == 3) ptx::tma_load_3d(to, &map, at.x, at.y, at.z, address);
    if (at.rank == 4) ptx::tma_load_4d(to, &map, at.x, at.y, at.z, at.w, address);
  }
  ptx::mbarrier_wait(address, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kBoxBytes; i += 32) out[i] = smem[i];
}

/// A tensor [5][3][20][72] of 16-bit elements, its rows 160 bytes apart; element = its number.
constexpr std::array<std::int64_t, 4> kDims = {72, 20, 3, 5};
constexpr std::array<std::int64_t, 4> kStrides = {1, 80, 80 * 20, 80 * 20 * 3};  // elements

std::int64_t offset_of(const std::array<std::int64_t, 4>& at) {
  std::int64_t offset = 0;
  for (std::size_t i = 0; i < 4; ++i) offset += at[i] * kStrides[i];
  return offset;
}

std::vector<std::uint16_t> numbers() {
  std::vector<std::uint16_t> values(static_cast<std::size_t>(kStrides[3] * kDims[3]));
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = static_cast<std::uint16_t>(i + 1);
  return values;
}

/// The first `rank` dimensions; box: `box_y` x ... rows of 64 elements, 16 rows in all.
CUtensorMap map_of(const void* data, int rank, const std::vector<std::uint32_t>& box) {
  std::vector<std::uint64_t> dims;
  std::vector<std::uint64_t> strides;
  for (std::size_t i = 0; i < static_cast<std::size_t>(rank); ++i) {
    dims.push_back(static_cast<std::uint64_t>(kDims[i]));
    if (i > 0) strides.push_back(static_cast<std::uint64_t>(2 * kStrides[i]));
  }
  return cuda::make_tensor_map(data, DType::bf16, dims, strides, box);
}

/// What `rows` of a swizzled box should be: element e of row r is at(r, e), 0 outside the tensor.
void expect_box(const std::vector<std::uint8_t>& bytes, const std::vector<std::uint16_t>& tensor,
                const std::function<std::array<std::int64_t, 4>(int, int)>& at) {
  for (int row = 0; row < 16; ++row) {
    for (int element = 0; element < 64; ++element) {
      const std::array<std::int64_t, 4> indices = at(row, element);
      bool inside = true;
      for (std::size_t i = 0; i < 4; ++i) inside &= indices[i] >= 0 && indices[i] < kDims[i];
      const std::uint16_t expected =
          inside ? tensor[static_cast<std::size_t>(offset_of(indices))] : std::uint16_t{0};
      const std::uint32_t byte =
          cuda::swizzled(static_cast<std::uint32_t>(row), 2 * static_cast<std::uint32_t>(element));
      const auto actual = static_cast<std::uint16_t>(bytes[byte] | bytes[byte + 1] << 8);
      ASSERT_EQ(actual, expected) << "row " << row << " element " << element;
    }
  }
}

TEST(PtxTma, LoadsBoxesSwizzledAndFillsTheOutsideWithZeros) {
  const std::vector<std::uint16_t> tensor = numbers();
  const DeviceArray<std::uint16_t> device(tensor);
  const DeviceArray<std::uint8_t> out(std::vector<std::uint8_t>(kBoxBytes, 0xee));
  const auto load = [&](int rank, const std::vector<std::uint32_t>& box, const Place& place) {
    run_kernel(load_kernel, {.threads = 32, .smem_bytes = kBoxBytes},
               map_of(device.data(), rank, box), place, out.data());
    return out.values();
  };
  for (const Place& place : {Place{2, 0, 0, 0, 0}, Place{2, 8, 4, 0, 0}, Place{2, 32, 15, 0, 0},
                             Place{2, -8, -3, 0, 0}}) {
    expect_box(load(2, {64, 16}, place), tensor, [&](int row, int element) {
      return std::array<std::int64_t, 4>{place.x + element, place.y + row, 0, 0};
    });
  }
  for (const Place& place : {Place{3, 0, 0, 1, 0}, Place{3, 8, 14, 2, 0}}) {
    expect_box(load(3, {64, 8, 2}, place), tensor, [&](int row, int element) {
      return std::array<std::int64_t, 4>{place.x + element, place.y + row % 8, place.z + row / 8,
                                         0};
    });
  }
  for (const Place& place : {Place{4, 0, 4, 1, 2}, Place{4, 16, 18, 2, 4}}) {
    expect_box(load(4, {64, 4, 2, 2}, place), tensor, [&](int row, int element) {
      return std::array<std::int64_t, 4>{place.x + element, place.y + row % 4,
                                         place.z + row / 4 % 2, place.w + row / 8};
    });
  }
}

/// CTA 0 of a cluster of 2 loads for both.
__global__ void multicast_kernel(const __grid_constant__ CUtensorMap map, std::uint8_t* out) {
  extern __shared__ __align__(1024) std::uint8_t smem[];
  __shared__ alignas(8) std::uint64_t barrier;
  const std::uint32_t address = ptx::smem_address(&barrier);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(address, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) ptx::mbarrier_expect_tx(address, kBoxBytes);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x == 0 && ptx::cluster_cta_rank() == 0) {
    ptx::tma_load_4d_multicast(ptx::smem_address(smem), &map, 8, 4, 1, 2, address, 3);
  }
  ptx::mbarrier_wait(address, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kBoxBytes; i += 32) {
    out[blockIdx.x * kBoxBytes + static_cast<unsigned>(i)] = smem[i];
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
}
TEST(PtxTma, MulticastReachesTheCluster) {
  const std::vector<std::uint16_t> tensor = numbers();
  const DeviceArray<std::uint16_t> device(tensor);
  const DeviceArray<std::uint8_t> out(std::vector<std::uint8_t>(2 * kBoxBytes, 0xee));
  run_kernel(multicast_kernel,
             {.grid = dim3(2), .threads = 32, .smem_bytes = kBoxBytes, .cluster = 2},
             map_of(device.data(), 4, {64, 16, 1, 1}), out.data());
  const std::vector<std::uint8_t> both = out.values();
  for (int cta = 0; cta < 2; ++cta) {
    const auto begin = both.begin() + cta * kBoxBytes;
    expect_box({begin, begin + kBoxBytes}, tensor, [&](int row, int element) {
      return std::array<std::int64_t, 4>{8 + element, 4 + row, 1, 2};
    });
  }
}

/// A swizzled box of 2 x 8 rows, written with ordinary stores, goes out by TMA.
__global__ void store_kernel(const __grid_constant__ CUtensorMap map, int x, int y, int z) {
  extern __shared__ __align__(1024) std::uint8_t smem[];
  for (int i = static_cast<int>(threadIdx.x); i < 16 * 64; i += 32) {
    const std::uint32_t at = cuda::swizzled(static_cast<std::uint32_t>(i) / 64,
                                            2 * (static_cast<std::uint32_t>(i) % 64));
    *reinterpret_cast<std::uint16_t*>(smem + at) = static_cast<std::uint16_t>(30000 + i);
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store_3d(&map, ptx::smem_address(smem), x, y, z);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<0>();
    ptx::bulk_wait_group<0>();
  }
}
TEST(PtxTma, StoresBoxesAndNothingOutside) {
  std::vector<std::uint16_t> expected = numbers();
  const DeviceArray<std::uint16_t> device(expected);
  run_kernel(store_kernel, {.threads = 32, .smem_bytes = kBoxBytes},
             map_of(device.data(), 3, {64, 8, 2}), 32, 15, 1);
  for (int i = 0; i < 16 * 64; ++i) {
    const std::array<std::int64_t, 4> at = {32 + i % 64, 15 + i / 64 % 8, 1 + i / 512, 0};
    if (at[0] >= kDims[0] || at[1] >= kDims[1] || at[2] >= kDims[2]) continue;
    expected[static_cast<std::size_t>(offset_of(at))] = static_cast<std::uint16_t>(30000 + i);
  }
  EXPECT_EQ(device.values(), expected);
}

/// In by bulk copy, doubled, out by bulk copy.
__global__ void bulk_kernel(const int* from, int* to, int count) {
  extern __shared__ __align__(1024) std::uint8_t smem[];
  __shared__ alignas(8) std::uint64_t barrier;
  auto* const values = reinterpret_cast<int*>(smem);
  const std::uint32_t address = ptx::smem_address(&barrier);
  const auto bytes = static_cast<std::uint32_t>(count) * 4;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(address, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::mbarrier_expect_tx(address, bytes);
    ptx::bulk_load(ptx::smem_address(smem), from, bytes, address);
  }
  ptx::mbarrier_wait(address, 0);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += 32) values[i] *= 2;
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::bulk_store(to, ptx::smem_address(smem), bytes);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group<0>();
  }
}
TEST(PtxTma, BulkCopiesBytes) {
  constexpr int kCount = 1004;
  std::vector<int> values(kCount);
  for (int i = 0; i < kCount; ++i) values[static_cast<std::size_t>(i)] = 3 * i - 500;
  const DeviceArray<int> from(values);
  const DeviceArray<int> to(std::vector<int>(kCount + 4, -7));
  run_kernel(bulk_kernel, {.threads = 32, .smem_bytes = 4 * kCount},
             static_cast<const int*>(from.data()), to.data(), kCount);
  const std::vector<int> copied = to.values();
  for (int i = 0; i < kCount; ++i) {
    ASSERT_EQ(copied[static_cast<std::size_t>(i)], 2 * (3 * i - 500));
  }
  EXPECT_EQ(copied[kCount], -7);
}

TEST(TensorMap, RefusesWhatTmaCannotRead) {
  const DeviceArray<std::uint16_t> device(numbers());
  const std::array<std::uint64_t, 2> dims = {64, 16};
  const std::array<std::uint64_t, 1> strides = {160};
  const std::array<std::uint64_t, 1> odd = {136};
  const std::array<std::uint32_t, 2> box = {64, 16};
  EXPECT_NO_THROW((void)cuda::make_tensor_map(device.data(), DType::bf16, dims, strides, box));
  EXPECT_THROW((void)cuda::make_tensor_map(device.data(), DType::bf16, dims, odd, box), Error);
  EXPECT_THROW((void)cuda::make_tensor_map(device.data() + 1, DType::bf16, dims, strides, box),
               Error);
}

}  // namespace
}  // namespace msa::testing
