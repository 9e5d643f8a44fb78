// SPDX-License-Identifier: Apache-2.0
#include "model/linear.hpp"

#include <oneapi/dnnl/dnnl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "core/check.hpp"
#include "core/scalar.hpp"
#include "core/thread_pool.hpp"
#include "model/wide_clones.hpp"
#include "msa/backend.hpp"

// oneDNN's sgemm runs on OpenMP; declared here because not every compiler that reads this file has
// an omp.h. It sets a value of the calling thread only.
extern "C" void omp_set_num_threads(int num_threads);

namespace msa::model {
namespace {

// Up to here a product is bound by reading the weights once, and expanding them would add a write
// and a second read of twice the size.
constexpr std::int64_t kMaxDirectTokens = 4;
constexpr std::int64_t kLanes = 64;  // independent sums: 4 registers of AVX-512, 8 of AVX2

// Rows of weights expanded and multiplied at a time. dnnl_sgemm loses half of its speed or more on
// narrower matrices, and nothing on these (measured for 5 to 512 tokens on AVX-512).
constexpr std::int64_t kBandRows = 128;

// Products below these many multiplications take less than 100 us on one core; waking the other
// threads costs about half as much.
constexpr std::int64_t kMinSharedDirect = std::int64_t{1} << 19;
constexpr std::int64_t kMinSharedSgemm = std::int64_t{1} << 23;

struct F32 {
  using Stored = float;
  static float load(float value) { return value; }
};
struct Bf16 {
  using Stored = std::uint16_t;
  static float load(std::uint16_t bits) { return core::bf16_to_f32(bits); }
};

MSA_WIDE_CLONES void expand_bf16(const std::uint16_t* source, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = core::bf16_to_f32(source[i]);
}

template <class Format>
[[gnu::always_inline]] inline float dot(const typename Format::Stored* weight, const float* x,
                                        std::int64_t count) {
  std::array<float, kLanes> lanes{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[static_cast<std::size_t>(lane)] += x[i + lane] * Format::load(weight[i + lane]);
    }
  }
  float sum = 0.0f;
  for (; i < count; ++i) sum += x[i] * Format::load(weight[i]);
  for (std::int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::int64_t lane = 0; lane < width; ++lane) {
      lanes[static_cast<std::size_t>(lane)] += lanes[static_cast<std::size_t>(lane + width)];
    }
  }
  return sum + lanes[0];
}

MSA_WIDE_CLONES float dot_f32(const float* weight, const float* x, std::int64_t count) {
  return dot<F32>(weight, x, count);
}
MSA_WIDE_CLONES float dot_bf16(const std::uint16_t* weight, const float* x, std::int64_t count) {
  return dot<Bf16>(weight, x, count);
}

const std::byte* row_of(const TensorView& matrix, std::int64_t row) {
  return static_cast<const std::byte*>(matrix.data) +
         row * matrix.stride[0] * static_cast<std::int64_t>(size_of(matrix.dtype));
}

struct Shape {
  std::int64_t in = 0;
  std::int64_t out = 0;
  std::int64_t tokens = 0;
};

/// Rows of `weight` from `begin` to `end`, times each token, row by row.
void multiply_rows(const TensorView& weight, const float* x, float* y, const Shape& shape,
                   std::int64_t begin, std::int64_t end, float* expanded) {
  for (std::int64_t row = begin; row < end; ++row) {
    const std::byte* source = row_of(weight, row);
    if (weight.dtype == DType::f16) {
      expand_to_f32(source, DType::f16, {expanded, static_cast<std::size_t>(shape.in)});
    }
    for (std::int64_t token = 0; token < shape.tokens; ++token) {
      const float* values = x + token * shape.in;
      float& target = y[token * shape.out + row];
      if (weight.dtype == DType::bf16) {
        target = dot_bf16(reinterpret_cast<const std::uint16_t*>(source), values, shape.in);
      } else {
        target =
            dot_f32(weight.dtype == DType::f16 ? expanded : reinterpret_cast<const float*>(source),
                    values, shape.in);
      }
    }
  }
}

/// The same by sgemm, expanding the rows first. False where sgemm fails.
bool multiply_band(const TensorView& weight, const float* x, float* y, const Shape& shape,
                   std::int64_t begin, std::int64_t end, float* expanded) {
  const auto* matrix = reinterpret_cast<const float*>(row_of(weight, begin));
  std::int64_t row_stride = weight.stride[0];
  if (weight.dtype != DType::f32) {
    for (std::int64_t row = begin; row < end; ++row) {
      expand_row(weight, row,
                 {expanded + (row - begin) * shape.in, static_cast<std::size_t>(shape.in)});
    }
    matrix = expanded;
    row_stride = shape.in;
  }
  // The pool already runs one band per thread.
  omp_set_num_threads(1);
  return dnnl_sgemm('N', 'T', shape.tokens, end - begin, shape.in, 1.0f, x, shape.in, matrix,
                    row_stride, 0.0f, y + begin, shape.out) == dnnl_success;
}

/// Each thread's piece of the scratch starts on a cache line.
std::int64_t whole_lines(std::int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace

void LinearScratch::reserve(int num_threads, std::int64_t count) {
  if (count == 0 || (num_threads <= num_threads_ && count <= count_)) return;
  num_threads_ = std::max(num_threads, num_threads_);
  count_ = std::max(whole_lines(count), count_);
  buffer_ = {};
  buffer_ = core::HostBuffer(static_cast<std::size_t>(bytes(num_threads_, count_)));
}

std::int64_t LinearScratch::bytes(int num_threads, std::int64_t count) {
  return static_cast<std::int64_t>(sizeof(float)) * num_threads * whole_lines(count);
}

float* LinearScratch::of(int thread) const {
  return reinterpret_cast<float*>(buffer_.data()) + thread * count_;
}

void expand_to_f32(const std::byte* source, DType dtype, std::span<float> out) {
  switch (dtype) {
    case DType::f32:
      std::memcpy(out.data(), source, out.size_bytes());
      return;
    case DType::bf16:
      expand_bf16(reinterpret_cast<const std::uint16_t*>(source),
                  static_cast<std::int64_t>(out.size()), out.data());
      return;
    case DType::f16: {
      const auto* bits = reinterpret_cast<const std::uint16_t*>(source);
      for (std::size_t i = 0; i < out.size(); ++i) out[i] = core::f16_to_f32(bits[i]);
      return;
    }
    default:
      MSA_CHECK(false, "weights have dtype ", name_of(dtype), ", expected f32, f16 or bf16");
  }
}

void expand_row(const TensorView& matrix, std::int64_t row, std::span<float> out) {
  expand_to_f32(row_of(matrix, row), matrix.dtype, out);
}

std::int64_t linear_scratch(const TensorView& weight) {
  return weight.dtype == DType::f32 ? 0 : kBandRows * weight.shape[1];
}

void linear(const TensorView& weight, std::span<const float> x, std::int64_t tokens,
            std::span<float> y, LinearScratch& scratch) {
  MSA_CHECK(weight.rank == 2 && weight.stride[1] == 1, "linear: weight has rank ", weight.rank,
            ", expected a matrix with contiguous rows");
  MSA_CHECK(weight.dtype == DType::f32 || weight.dtype == DType::f16 || weight.dtype == DType::bf16,
            "linear: weight has dtype ", name_of(weight.dtype), ", expected f32, f16 or bf16");
  const Shape shape{.in = weight.shape[1], .out = weight.shape[0], .tokens = tokens};
  MSA_CHECK(static_cast<std::int64_t>(x.size()) >= tokens * shape.in &&
                static_cast<std::int64_t>(y.size()) >= tokens * shape.out,
            "linear: weight is [", shape.out, ", ", shape.in, "] and there are ", tokens,
            " tokens, but x has ", x.size(), " elements and y has ", y.size());
  if (tokens == 0 || shape.out == 0) return;

  const bool direct = tokens <= kMaxDirectTokens;
  const bool shared =
      tokens * shape.in * shape.out >= (direct ? kMinSharedDirect : kMinSharedSgemm);
  const int threads = shared ? num_threads() : 1;
  const std::int64_t share = (shape.out + threads - 1) / threads;
  const std::int64_t band = (std::min(kBandRows, share) + 15) / 16 * 16;
  const std::int64_t num_bands = (shape.out + band - 1) / band;
  if (weight.dtype != DType::f32) scratch.reserve(threads, (direct ? 1 : band) * shape.in);
  std::atomic<bool> failed{false};
  const auto multiply = [&](std::int64_t index, int worker) {
    const std::int64_t begin = index * band;
    const std::int64_t end = std::min(begin + band, shape.out);
    float* expanded = weight.dtype == DType::f32 ? nullptr : scratch.of(worker);
    if (direct) {
      multiply_rows(weight, x.data(), y.data(), shape, begin, end, expanded);
    } else if (!multiply_band(weight, x.data(), y.data(), shape, begin, end, expanded)) {
      failed = true;
    }
  };
  if (shared) {
    core::parallel_for(num_bands, multiply);
  } else {
    for (std::int64_t index = 0; index < num_bands; ++index) multiply(index, 0);
  }
  if (failed) {
    throw Error(ErrorCode::internal,
                core::concat("linear: dnnl_sgemm failed for ", tokens, " tokens and a weight of [",
                             shape.out, ", ", shape.in, "]"));
  }
}

}  // namespace msa::model
