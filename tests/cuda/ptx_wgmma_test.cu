// SPDX-License-Identifier: Apache-2.0
//
// ptx/wgmma.cuh on the device: every type and N, both sources of A, both layouts of B, on small
// integers, whose products and sums are exact in every type.
#include <vector>

#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/wgmma.cuh"
#include "cuda/common/swizzle.cuh"
#include "tests/cuda/device_array.hpp"

namespace msa::testing {
namespace {

namespace ptx = cuda::ptx;

constexpr int kM = 64;
constexpr int kDepth = 128;  ///< elements of K

template <class T>
constexpr bool is_16_bit = sizeof(T) == 2;
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, std::int8_t>, std::int32_t, float>;

struct Mode {
  bool a_in_registers;
  bool b_is_mn_major;  ///< 16-bit types only
};

/// Byte of element (row, k) of a K-major tile, or (k, column) of an MN-major one.
template <class T>
__device__ std::uint32_t place(std::uint32_t rows, int row, int k, bool mn_major) {
  if (!mn_major) {
    return cuda::k_major(rows, static_cast<std::uint32_t>(row),
                         static_cast<std::uint32_t>(k) * sizeof(T));
  }
  return static_cast<std::uint32_t>(row) / 64 * kDepth * cuda::kPanelBytes +
         cuda::swizzled(static_cast<std::uint32_t>(k),
                        static_cast<std::uint32_t>(row) % 64 * sizeof(T));
}

/// D[64][N] = 2 A[64][128] B[N][128]: the first step overwrites what was there, a second pass over
/// all steps adds to it.
template <class T, int kN>
__global__ void wgmma_kernel(const std::int8_t* a, const std::int8_t* b, Sum<T>* d, Mode mode) {
  extern __shared__ __align__(1024) std::uint8_t smem[];
  std::uint8_t* const sa = smem;
  std::uint8_t* const sb = smem + kM * kDepth * sizeof(T);
  const auto thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kM * kDepth; i += 128) {
    *reinterpret_cast<T*>(sa + place<T>(kM, i / kDepth, i % kDepth, false)) =
        static_cast<T>(static_cast<float>(a[i]));
  }
  for (int i = thread; i < kN * kDepth; i += 128) {
    *reinterpret_cast<T*>(sb + place<T>(kN, i / kDepth, i % kDepth, mode.b_is_mn_major)) =
        static_cast<T>(static_cast<float>(b[i]));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  Sum<T> sums[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sums[i] = static_cast<Sum<T>>(1000);  // must be overwritten
  const std::uint64_t descriptor_a = ptx::k_major_descriptor(ptx::smem_address(sa));
  const std::uint64_t k_major_b = ptx::k_major_descriptor(ptx::smem_address(sb));
  const std::uint64_t mn_major_b = ptx::mn_major_descriptor(ptx::smem_address(sb), kDepth);
  constexpr int kSteps = kDepth * static_cast<int>(sizeof(T)) / 32;
  for (int step = 0; step < 2 * kSteps; ++step) {
    const auto k = static_cast<std::uint32_t>(step % kSteps);
    std::uint32_t fragment[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // A warp holds 16 rows; 4 bytes at byte 4 (lane % 4) + 16 (i / 2) of the step's 32.
      const int row = thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
      const std::uint32_t byte = k * 32 + static_cast<std::uint32_t>(thread % 4 * 4 + i / 2 * 16);
      fragment[i] = *reinterpret_cast<const std::uint32_t*>(
          sa + cuda::k_major(kM, static_cast<std::uint32_t>(row), byte));
    }
    const std::uint64_t step_a = ptx::advance(descriptor_a, cuda::k_major_step(kM, k));
    const std::uint64_t step_b = ptx::advance(k_major_b, cuda::k_major_step(kN, k));
    const std::uint64_t step_t = ptx::advance(mn_major_b, cuda::mn_major_step(k));
    const int accumulate = step == 0 ? 0 : 1;
    ptx::pin(fragment);
    ptx::pin(sums);
    ptx::wgmma_fence();
    if constexpr (is_16_bit<T>) {
      if (mode.a_in_registers && mode.b_is_mn_major) {
        ptx::Wgmma<T, kN>::template rs<1>(sums, fragment, step_t, accumulate);
      } else if (mode.a_in_registers) {
        ptx::Wgmma<T, kN>::template rs<0>(sums, fragment, step_b, accumulate);
      } else if (mode.b_is_mn_major) {
        ptx::Wgmma<T, kN>::template ss<1>(sums, step_a, step_t, accumulate);
      } else {
        ptx::Wgmma<T, kN>::template ss<0>(sums, step_a, step_b, accumulate);
      }
    } else if (mode.a_in_registers) {
      ptx::Wgmma<T, kN>::rs(sums, fragment, step_b, accumulate);
    } else {
      ptx::Wgmma<T, kN>::ss(sums, step_a, step_b, accumulate);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::pin(sums);
  }
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    d[ptx::accumulator_row(i) * kN + ptx::accumulator_column(i)] = sums[i];
  }
}

int element_of_a(int m, int k) { return (m * 5 + k * 3) % 7 - 3; }
int element_of_b(int n, int k) { return (n * 3 + k * 7 + n / 8) % 5 - 2; }

template <class T, int kN>
void expect_product(Mode mode) {
  std::vector<std::int8_t> a(kM * kDepth);
  std::vector<std::int8_t> b(kN * kDepth);
  for (int i = 0; i < kM * kDepth; ++i) {
    a[static_cast<std::size_t>(i)] = static_cast<std::int8_t>(element_of_a(i / kDepth, i % kDepth));
  }
  for (int i = 0; i < kN * kDepth; ++i) {
    b[static_cast<std::size_t>(i)] = static_cast<std::int8_t>(element_of_b(i / kDepth, i % kDepth));
  }
  const DeviceArray<std::int8_t> device_a(a);
  const DeviceArray<std::int8_t> device_b(b);
  const DeviceArray<Sum<T>> d(std::vector<Sum<T>>(kM * kN, Sum<T>{-1}));
  // An MN-major tile is made of whole panels of 64 columns.
  const std::size_t columns = mode.b_is_mn_major ? std::max(kN, 64) : kN;
  run_kernel(wgmma_kernel<T, kN>,
             {.threads = 128, .smem_bytes = (kM + columns) * kDepth * sizeof(T)},
             static_cast<const std::int8_t*>(device_a.data()),
             static_cast<const std::int8_t*>(device_b.data()), d.data(), mode);
  const std::vector<Sum<T>> sums = d.values();
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      int expected = 0;
      for (int k = 0; k < kDepth; ++k) expected += 2 * element_of_a(m, k) * element_of_b(n, k);
      ASSERT_EQ(sums[static_cast<std::size_t>(m * kN + n)], static_cast<Sum<T>>(expected))
          << "row " << m << " column " << n << " of N = " << kN;
    }
  }
}

template <class T>
class PtxWgmma : public ::testing::Test {};
using Types = ::testing::Types<__nv_bfloat16, __half, __nv_fp8_e4m3, std::int8_t>;
TYPED_TEST_SUITE(PtxWgmma, Types, );

TYPED_TEST(PtxWgmma, MultipliesExactly) {
  for (const bool a_in_registers : {false, true}) {
    for (const bool b_is_mn_major : {false, true}) {
      if (b_is_mn_major && !is_16_bit<TypeParam>) continue;
      const Mode mode{a_in_registers, b_is_mn_major};
      SCOPED_TRACE(a_in_registers ? "A in registers" : "A in shared memory");
      SCOPED_TRACE(b_is_mn_major ? "B MN-major" : "B K-major");
      expect_product<TypeParam, 8>(mode);
      expect_product<TypeParam, 16>(mode);
      expect_product<TypeParam, 32>(mode);
      expect_product<TypeParam, 64>(mode);
      expect_product<TypeParam, 128>(mode);
      expect_product<TypeParam, 256>(mode);
    }
  }
}

}  // namespace
}  // namespace msa::testing
