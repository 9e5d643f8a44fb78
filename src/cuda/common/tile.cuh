// SPDX-License-Identifier: Apache-2.0
//
// Tiles of 16-bit elements in shared memory for mma.sync. A row is kDim elements and 16 bytes of
// padding, so that the eight rows of an ldmatrix phase lie in different banks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstddef>
#include <cstdint>

#include "cuda/common/ptx/async_copy.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "msa/tensor.hpp"

namespace msa::cuda {

/// Elements between rows of a tile.
template <int kDim>
inline constexpr int kPitch = kDim + 8;

/// Starts a kernel for rows of up to 256 elements: start.template operator()<kDim>() with the
/// narrowest tile that holds `dim`.
template <class Start>
void with_padded_dim(int dim, Start start) {
  if (dim <= 64) return start.template operator()<64>();
  if (dim <= 128) return start.template operator()<128>();
  start.template operator()<256>();
}

/// How rows of a tensor get into a tile.
enum class Load : std::uint8_t {
  vectors,   ///< every row starts at a multiple of 16 bytes, its length is one too: cp.async
  elements,  ///< one by one
  e4m3,      ///< one by one, and widened, which is exact
};

inline Load load_of(const TensorView& view) {
  if (view.dtype == DType::e4m3) return Load::e4m3;
  const auto bytes = reinterpret_cast<std::uintptr_t>(view.data);
  bool aligned = bytes % 16 == 0 && view.shape[static_cast<std::size_t>(view.rank - 1)] % 8 == 0;
  for (std::size_t i = 0; i + 1 < static_cast<std::size_t>(view.rank); ++i) {
    aligned = aligned && (view.shape[i] == 1 || view.stride[i] % 8 == 0);
  }
  return aligned ? Load::vectors : Load::elements;
}

/// One of 16 bits, or e4m3.
template <class T>
__device__ __forceinline__ float element_at(const std::byte* row, Load load, int d) {
  if (load == Load::e4m3) {
    return static_cast<float>(reinterpret_cast<const __nv_fp8_e4m3*>(row)[d]);
  }
  return static_cast<float>(reinterpret_cast<const T*>(row)[d]);
}

/// Fills `rows` rows of a tile with row_at(row), the address of `dim` elements, or null for a row
/// of zeros; columns from dim on are zeros too. kThreads threads share the work; copies may still
/// be under way afterwards (cp_async_commit).
template <class T, int kDim, int kThreads, class RowAt>
__device__ __forceinline__ void load_tile(T* tile, int rows, int dim, Load load, int thread,
                                          RowAt row_at) {
  constexpr int kVector = 8;
  constexpr int kPerRow = kDim / kVector;
  for (int i = thread; i < rows * kPerRow; i += kThreads) {
    const int row = i / kPerRow;
    const int d = i % kPerRow * kVector;
    const std::byte* const from = row_at(row);
    T* const to = tile + row * kPitch<kDim> + d;
    if (from == nullptr || d >= dim) {
      *reinterpret_cast<uint4*>(to) = uint4{};
    } else if (load == Load::vectors) {
      ptx::cp_async_16(static_cast<std::uint32_t>(__cvta_generic_to_shared(to)),
                       reinterpret_cast<const T*>(from) + d);
    } else {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        to[e] = static_cast<T>(d + e < dim ? element_at<T>(from, load, d + e) : 0.0f);
      }
    }
  }
}

template <int kDim, class T>
__device__ __forceinline__ std::uint32_t address_in(const T* tile, int row, int column) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(tile + row * kPitch<kDim> + column));
}

/// s[2 c], s[2 c + 1] = the 16 rows of q times keys [16 c, 16 c + 16) of k, in the layout of an
/// accumulator.
template <class T, int kDim, int kChunks>
__device__ __forceinline__ void multiply_qk(float (&s)[2 * kChunks][4], const T* q, const T* k) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < 2 * kChunks; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
  for (int d = 0; d < kDim; d += 16) {
    std::uint32_t a[4];
    ptx::ldmatrix_x4(a, address_in<kDim>(q, lane % 16, d + lane / 16 * 8));
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4(
          b, address_in<kDim>(k, 16 * c + lane % 8 + lane / 16 * 8, d + lane / 8 % 2 * 8));
      ptx::mma_m16n8k16<T>(s[2 * c], a, b[0], b[1]);
      ptx::mma_m16n8k16<T>(s[2 * c + 1], a, b[2], b[3]);
    }
  }
}

/// o += P v for chunk `chunk` of 16 keys; P as the A operand, straight from an accumulator.
template <class T, int kDim>
__device__ __forceinline__ void multiply_pv(float (&o)[kDim / 8][4], const std::uint32_t (&p)[4],
                                            const T* v, int chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
    std::uint32_t b[4];
    ptx::ldmatrix_x4_trans(b, address_in<kDim>(v, 16 * chunk + lane % 16, 16 * j + lane / 16 * 8));
    ptx::mma_m16n8k16<T>(o[2 * j], p, b[0], b[1]);
    ptx::mma_m16n8k16<T>(o[2 * j + 1], p, b[2], b[3]);
  }
}

}  // namespace msa::cuda
