// SPDX-License-Identifier: Apache-2.0
//
// Matrix products with checkpoint weights. The weights stay in memory as the checkpoint has them;
// activations are f32.
#pragma once

#include <cstdint>
#include <span>

#include "core/tensor.hpp"
#include "msa/tensor.hpp"

namespace msa::model {

/// Memory in which linear() expands bf16 and f16 weights, a band of rows per thread. Grows to what
/// the largest product needs; not to be shared by calls that run at the same time.
class LinearScratch {
 public:
  /// One piece of `count` floats per thread.
  void reserve(int num_threads, std::int64_t count);
  float* of(int thread) const;
  /// What reserve() allocates.
  static std::int64_t bytes(int num_threads, std::int64_t count);

 private:
  core::HostBuffer buffer_;
  std::int64_t count_ = 0;
  int num_threads_ = 0;
};

/// Floats per thread of the scratch with which linear() takes any number of tokens.
std::int64_t linear_scratch(const TensorView& weight);

/// One of several products with the same x.
struct Product {
  const TensorView& weight;  ///< [out, in]
  std::span<float> y;        ///< [tokens, out]
};

/// y [tokens, out] = x [tokens, in] * weight [out, in]^T. Rows of x and y are contiguous; rows of
/// weight may lie apart. How tokens are grouped into calls changes y by f32 rounding only.
void linear(const TensorView& weight, std::span<const float> x, std::int64_t tokens,
            std::span<float> y, LinearScratch& scratch);

/// The same for several weights, all threads working on all of them at once. Each y is bitwise what
/// it is alone, on any number of threads.
void linear(std::span<const Product> products, std::span<const float> x, std::int64_t tokens,
            LinearScratch& scratch);

/// out[i] = element i of a contiguous run of `dtype` values (f32, f16 or bf16).
void expand_to_f32(const std::byte* source, DType dtype, std::span<float> out);

/// Row `row` of a matrix as f32.
void expand_row(const TensorView& matrix, std::int64_t row, std::span<float> out);

}  // namespace msa::model
