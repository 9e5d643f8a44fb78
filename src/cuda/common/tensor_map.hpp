// SPDX-License-Identifier: Apache-2.0
//
// Descriptors of global tensors for the tensor memory accelerator (TMA).
#pragma once

#include <cuda.h>  // types only: the encoder comes from the driver at run time

#include <cstdint>
#include <span>

#include "msa/tensor.hpp"

namespace msa::cuda {

/// How a box lies in shared memory. swizzle_128b: box[0] is at most 128 bytes, and the 16-byte
/// chunk index of a row of 128 bytes is xored with the row index modulo 8.
enum class TensorMapLayout { plain, swizzle_128b };

/// Dimensions and box in elements, fastest first; `byte_strides` of dimensions 1 and up, multiples
/// of 16. Elements of a box outside the tensor are read as zero and not written. Throws Error(cuda)
/// with all values where the driver refuses, for example an address that is not a multiple of 16.
CUtensorMap make_tensor_map(const void* data, DType dtype, std::span<const std::uint64_t> dims,
                            std::span<const std::uint64_t> byte_strides,
                            std::span<const std::uint32_t> box,
                            TensorMapLayout layout = TensorMapLayout::swizzle_128b);

}  // namespace msa::cuda
