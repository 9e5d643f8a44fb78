// SPDX-License-Identifier: Apache-2.0
//
// ptx/math.cuh, ptx/mma.cuh and ptx/async_copy.cuh on the device.
#include <cmath>
#include <cstring>
#include <limits>

#include "core/scalar.hpp"
#include "cuda/common/ptx/async_copy.cuh"
#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/math.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "tests/cuda/device_array.hpp"

namespace msa::testing {
namespace {

namespace ptx = cuda::ptx;

__global__ void ex2_kernel(const float* x, float* y, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) y[i] = ptx::ex2(x[i]);
}
__global__ void lg2_kernel(const float* x, float* y, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) y[i] = ptx::lg2(x[i]);
}

std::vector<float> mapped(void (*kernel)(const float*, float*, int), const std::vector<float>& x) {
  const DeviceArray<float> from(x);
  const DeviceArray<float> to(x);
  const auto count = static_cast<int>(x.size());
  run_kernel(kernel, {.grid = dim3((count + 255) / 256), .threads = 256}, from.data(), to.data(),
             count);
  return to.values();
}

constexpr float kInf = std::numeric_limits<float>::infinity();

TEST(PtxMath, Ex2IsWithinTwoToTheMinus22) {
  std::vector<float> x = {-kInf, -200.0f, 0.0f, kInf, NAN};
  for (int i = 0; i < 1 << 20; ++i) x.push_back(-125.0f + static_cast<float>(i) * 0x1.f4p-13f);
  const std::vector<float> y = mapped(ex2_kernel, x);
  EXPECT_EQ(y[0], 0.0f);
  EXPECT_EQ(y[1], 0.0f);
  EXPECT_EQ(y[2], 1.0f);
  EXPECT_EQ(y[3], kInf);
  EXPECT_TRUE(std::isnan(y[4]));
  double worst = 0.0;
  for (std::size_t i = 5; i < x.size(); ++i) {
    const double exact = std::exp2(static_cast<double>(x[i]));
    worst = std::max(worst, std::fabs(static_cast<double>(y[i]) - exact) / exact);
  }
  EXPECT_LE(worst, 0x1p-22);
}

TEST(PtxMath, Lg2IsWithinTwoToTheMinus22) {
  std::vector<float> x = {0.0f, 1.0f, kInf};
  for (int i = 1; i < 1 << 20; ++i) x.push_back(static_cast<float>(i) * 0x1p-10f);
  const std::vector<float> y = mapped(lg2_kernel, x);
  EXPECT_EQ(y[0], -kInf);
  EXPECT_EQ(y[1], 0.0f);
  EXPECT_EQ(y[2], kInf);
  for (std::size_t i = 3; i < x.size(); ++i) {
    const double exact = std::log2(static_cast<double>(x[i]));
    ASSERT_LE(std::fabs(static_cast<double>(y[i]) - exact),
              0x1p-22 * std::max(1.0, std::fabs(exact)))
        << x[i];
  }
}

template <class T>
__global__ void pack_kernel(const float* x, std::uint32_t* y, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) y[i] = ptx::pack<T>(x[2 * i], x[2 * i + 1]);
}

template <class T>
void expect_packed(std::uint16_t (*round)(float)) {
  std::vector<float> x = {0.0f, -0.0f, 1.0f, -2.5f, kInf, -kInf, 1e-6f, 65504.0f};
  for (int i = 0; i < 1 << 16; ++i) x.push_back(std::sin(static_cast<float>(i)) * 0x1.234p-7f);
  const DeviceArray<float> from(x);
  const DeviceArray<std::uint32_t> to(std::vector<std::uint32_t>(x.size() / 2));
  const auto count = static_cast<int>(x.size() / 2);
  run_kernel(pack_kernel<T>, {.grid = dim3((count + 255) / 256), .threads = 256}, from.data(),
             to.data(), count);
  const std::vector<std::uint32_t> y = to.values();
  for (std::size_t i = 0; i < y.size(); ++i) {
    ASSERT_EQ(y[i] & 0xffff, round(x[2 * i])) << x[2 * i];
    ASSERT_EQ(y[i] >> 16, round(x[2 * i + 1])) << x[2 * i + 1];
  }
}
TEST(PtxMath, PackRoundsToNearestEven) {
  expect_packed<__nv_bfloat16>(core::f32_to_bf16);
  expect_packed<__half>(core::f32_to_f16);
}

__global__ void elect_kernel(int* elected) { elected[threadIdx.x] = ptx::elect_one() ? 1 : 0; }
TEST(PtxMath, ElectsOneLaneOfEachWarp) {
  const DeviceArray<int> elected(std::vector<int>(128, -1));
  run_kernel(elect_kernel, {.threads = 128}, elected.data());
  const std::vector<int> lanes = elected.values();
  for (std::size_t warp = 0; warp < 4; ++warp) {
    int count = 0;
    for (std::size_t lane = 0; lane < 32; ++lane) count += lanes[warp * 32 + lane];
    EXPECT_EQ(count, 1);
  }
}

/// D[16][8] = A[16][16] B[16][8] + 1 with A and B[n][k] read by ldmatrix, D packed and written by
/// stmatrix as 16-bit elements, two m16n8 tiles side by side.
template <class T>
__global__ void mma_kernel(const std::uint16_t* a, const std::uint16_t* b, float* d,
                           std::uint16_t* packed, bool b_is_k_by_n) {
  __shared__ alignas(16) std::uint16_t sa[16 * 16];
  __shared__ alignas(16) std::uint16_t sb[16 * 16];
  __shared__ alignas(16) std::uint16_t sd[16 * 16];
  const auto lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 256; i += 32) {
    sa[i] = a[i];
    sb[i] = b[i];
  }
  __syncwarp();
  // Lane l gives row l % 8 of matrix l / 8: matrices 0, 1 are the upper and lower rows of columns
  // 0 to 7, matrices 2, 3 those of columns 8 to 15.
  const int row = lane % 16;
  const int column = lane / 16 * 8;
  std::uint32_t fragment_a[4];
  std::uint32_t fragment_b[4];
  ptx::ldmatrix_x4(fragment_a, ptx::smem_address(sa + row * 16 + column));
  // n rows of k: matrices (n 0-7, k 0-7), (n 8-15, k 0-7), (n 0-7, k 8-15), (n 8-15, k 8-15).
  if (b_is_k_by_n) {
    // k rows of n, transposed on the way: the same four matrices.
    const int k = lane / 16 * 8 + lane % 8;
    const int n = lane / 8 % 2 * 8;
    ptx::ldmatrix_x4_trans(fragment_b, ptx::smem_address(sb + k * 16 + n));
  } else {
    ptx::ldmatrix_x4(fragment_b, ptx::smem_address(sb + row * 16 + column));
  }
  float left[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  float right[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  ptx::mma_m16n8k16<T>(left, fragment_a, fragment_b[0], fragment_b[2]);
  ptx::mma_m16n8k16<T>(right, fragment_a, fragment_b[1], fragment_b[3]);
  for (int i = 0; i < 4; ++i) {
    const int at = (lane / 4 + i / 2 * 8) * 16 + lane % 4 * 2 + i % 2;
    d[at] = left[i];
    d[at + 8] = right[i];
  }
  // Rows 0-7 and 8-15 of the left half, then of the right.
  ptx::stmatrix_x4(ptx::smem_address(sd + row * 16 + column), ptx::pack<T>(left[0], left[1]),
                   ptx::pack<T>(left[2], left[3]), ptx::pack<T>(right[0], right[1]),
                   ptx::pack<T>(right[2], right[3]));
  __syncwarp();
  for (int i = lane; i < 256; i += 32) packed[i] = sd[i];
}

template <class T>
void expect_product(std::uint16_t (*round)(float)) {
  for (const bool b_is_k_by_n : {false, true}) {
    std::vector<std::uint16_t> a(256);
    std::vector<std::uint16_t> b(256);
    for (int i = 0; i < 256; ++i) {
      a[static_cast<std::size_t>(i)] = round(static_cast<float>(i * 7 % 11 - 5));
      b[static_cast<std::size_t>(i)] = round(static_cast<float>(i * 5 % 9 - 4));
    }
    const DeviceArray<std::uint16_t> device_a(a);
    const DeviceArray<std::uint16_t> device_b(b);
    const DeviceArray<float> d(std::vector<float>(256, -1.0f));
    const DeviceArray<std::uint16_t> packed(std::vector<std::uint16_t>(256));
    run_kernel(mma_kernel<T>, {.threads = 32}, static_cast<const std::uint16_t*>(device_a.data()),
               static_cast<const std::uint16_t*>(device_b.data()), d.data(), packed.data(),
               b_is_k_by_n);
    const std::vector<float> products = d.values();
    const std::vector<std::uint16_t> rounded = packed.values();
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        int sum = 1;
        for (int k = 0; k < 16; ++k) {
          const int at = b_is_k_by_n ? k * 16 + n : n * 16 + k;
          sum += ((m * 16 + k) * 7 % 11 - 5) * (at * 5 % 9 - 4);
        }
        const auto i = static_cast<std::size_t>(m * 16 + n);
        EXPECT_EQ(products[i], static_cast<float>(sum)) << m << ' ' << n << ' ' << b_is_k_by_n;
        EXPECT_EQ(rounded[i], round(static_cast<float>(sum))) << m << ' ' << n;
      }
    }
  }
}
TEST(PtxMma, MultipliesAndMovesMatrices) {
  expect_product<__nv_bfloat16>(core::f32_to_bf16);
  expect_product<__half>(core::f32_to_f16);
}

__global__ void cp_async_kernel(const int* from, int* to) {
  __shared__ alignas(16) int rows[64 * 4];
  const auto i = static_cast<int>(threadIdx.x);
  for (int j = 0; j < 4; ++j) rows[4 * i + j] = -1;
  __syncthreads();
  const std::uint32_t at = ptx::smem_address(rows + 4 * i);
  if (i < 32) {
    ptx::cp_async_16(at, from + 4 * i);
    ptx::cp_async_commit();
  } else {
    ptx::cp_async_16(at, from + 4 * i, i % 2 == 0 ? 16 : 0);
    ptx::cp_async_commit();
    ptx::cp_async_commit();  // an empty group, the newest
  }
  i < 32 ? ptx::cp_async_wait<0>() : ptx::cp_async_wait<1>();
  __syncthreads();
  for (int j = 0; j < 4; ++j) to[4 * i + j] = rows[4 * i + j];
}
TEST(PtxAsyncCopy, CopiesOrFillsWithZeros) {
  std::vector<int> values(256);
  for (int i = 0; i < 256; ++i) values[static_cast<std::size_t>(i)] = i + 1;
  const DeviceArray<int> from(values);
  const DeviceArray<int> to(std::vector<int>(256, -1));
  run_kernel(cp_async_kernel, {.threads = 64}, static_cast<const int*>(from.data()), to.data());
  const std::vector<int> copied = to.values();
  for (int i = 0; i < 256; ++i) {
    const bool zero = i / 4 >= 32 && i / 4 % 2 == 1;
    EXPECT_EQ(copied[static_cast<std::size_t>(i)], zero ? 0 : i + 1) << i;
  }
}

}  // namespace
}  // namespace msa::testing
