// SPDX-License-Identifier: Apache-2.0
//
// What kernels that code index keys share: core/index_code.hpp, operation by operation in double
// with no product fused into a sum, so that codes, scales and errors agree bit by bit.
#pragma once

#include <cstdint>

#include "core/index_code.hpp"

namespace msa::cuda::generic {

/// core::bf16_at_least.
inline __device__ std::uint16_t least_bf16(double value) {
  float nearest = __double2float_rn(value);
  if (static_cast<double>(nearest) < value) nearest = nextafterf(nearest, INFINITY);
  return static_cast<std::uint16_t>((__float_as_uint(nearest) + 0xffffu) >> 16);
}

/// The code of an element and the square of what it leaves out.
struct CodedElement {
  std::int8_t code;
  double square;
};

__device__ __forceinline__ CodedElement code_element(double element, double scale) {
  double code = 0.0;
  if (scale > 0.0) {
    code = fmin(fmax(rint(element / scale), -core::kMaxIndexCode), core::kMaxIndexCode);
  }
  const double rest = __dsub_rn(element, __dmul_rn(scale, code));
  return {.code = static_cast<std::int8_t>(code), .square = __dmul_rn(rest, rest)};
}

/// A key's scale and the bound of its error; an infinite bound where it was not coded.
__device__ __forceinline__ void store_scales(std::uint16_t* scales, std::uint16_t scale_bits,
                                             bool coded, double squares) {
  scales[0] = scale_bits;
  scales[1] = coded ? least_bf16(__dmul_rn(__dsqrt_rn(squares), 1.0 + 0x1p-30))
                    : least_bf16(static_cast<double>(INFINITY));
}

}  // namespace msa::cuda::generic
