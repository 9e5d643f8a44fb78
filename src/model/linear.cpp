// SPDX-License-Identifier: Apache-2.0
#include "model/linear.hpp"

#include <oneapi/dnnl/dnnl.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <bit>
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
// Rows multiplied together share the reads of x and have kLanes independent sums each, 8 registers
// of AVX-512.
constexpr std::int64_t kRows = 4;
constexpr std::int64_t kLanes = 32;
constexpr std::int64_t kSums = kLanes / 2;

// Rows of weights expanded and multiplied at a time. dnnl_sgemm loses half of its speed or more on
// narrower matrices, and nothing on these (measured for 5 to 512 tokens on AVX-512).
constexpr std::int64_t kBandRows = 128;

// Products below these many multiplications take less than 10 us (direct) or 100 us (sgemm) on one
// core. A worker that has just finished another product still spins and joins at once; one that
// sleeps is not waited for.
constexpr std::int64_t kMinSharedDirect = std::int64_t{1} << 17;
constexpr std::int64_t kMinSharedSgemm = std::int64_t{1} << 23;

struct F32 {
  using Stored = float;
  static float load(float value) { return value; }
};
struct Bf16 {
  using Stored = std::uint16_t;
  static float load(std::uint16_t bits) { return core::bf16_to_f32(bits); }
};
struct F16 {
  using Stored = std::uint16_t;
  /// core::f16_to_f32 without branches, for loops over many.
  [[gnu::always_inline]] static float load(std::uint16_t half) {
    const std::uint32_t magnitude = (half & 0x7fffu) << 13;
    // Exponents of f16 begin 112 lower; the product is exact, for subnormal numbers too.
    const auto bits = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
    const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // inf and NaN
    return std::bit_cast<float>(bits | special | ((half & 0x8000u) << 16));
  }
};

MSA_WIDE_CLONES void expand_bf16(const std::uint16_t* source, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = Bf16::load(source[i]);
}
MSA_WIDE_CLONES void expand_f16(const std::uint16_t* source, std::int64_t count, float* out) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = F16::load(source[i]);
}

/// sums[row] = the products of x [count] and row `row` of weight, each added up in kSums lanes, for
/// some rows that lie `stride` elements apart.
template <class Format, std::int64_t kSome>
[[gnu::always_inline]] inline void multiply_some(const typename Format::Stored* weight,
                                                 std::int64_t stride, const float* x,
                                                 std::int64_t count, float* sums) {
  float lanes[kSome][kLanes] = {};
  for (std::int64_t i = 0; i + kLanes <= count; i += kLanes) {
    for (std::int64_t row = 0; row < kSome; ++row) {
      const typename Format::Stored* w = weight + row * stride + i;
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        lanes[row][lane] += x[i + lane] * Format::load(w[lane]);
      }
    }
  }
  for (std::int64_t row = 0; row < kSome; ++row) {
    for (std::int64_t lane = 0; lane < kSums; ++lane) {
      sums[row * kSums + lane] = lanes[row][lane] + lanes[row][lane + kSums];
    }
  }
}

[[gnu::always_inline]] inline void add_pairs(const float* __restrict x, std::int64_t pairs,
                                             float* __restrict out) {
  for (std::int64_t i = 0; i < pairs; ++i) out[i] = x[2 * i] + x[2 * i + 1];
}

/// y[row] = x [count] * row `row` of weight, for up to kBandRows rows.
template <class Format>
[[gnu::always_inline]] inline void dot_rows(const void* weight, std::int64_t stride,
                                            std::int64_t rows, const float* x, std::int64_t count,
                                            float* y) {
  const auto* w = static_cast<const typename Format::Stored*>(weight);
  // Lanes are added up for all rows at once: for each row by itself that takes longer than the
  // products of 256 elements.
  float sums[kBandRows * kSums];
  float fewer[kBandRows * kSums / 2];
  std::int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    multiply_some<Format, kRows>(w + row * stride, stride, x, count, sums + row * kSums);
  }
  for (; row < rows; ++row) {
    multiply_some<Format, 1>(w + row * stride, stride, x, count, sums + row * kSums);
  }
  static_assert(kSums == 16 && kLanes == 2 * kSums);
  add_pairs(sums, rows * 8, fewer);
  add_pairs(fewer, rows * 4, sums);
  add_pairs(sums, rows * 2, fewer);
  add_pairs(fewer, rows, y);
  const std::int64_t done = count / kLanes * kLanes;
  if (done == count) return;
  for (row = 0; row < rows; ++row) {
    for (std::int64_t i = done; i < count; ++i) y[row] += x[i] * Format::load(w[row * stride + i]);
  }
}

using DotRows = void(const void* weight, std::int64_t stride, std::int64_t rows, const float* x,
                     std::int64_t count, float* y);
MSA_WIDE_CLONES void dot_rows_f32(const void* weight, std::int64_t stride, std::int64_t rows,
                                  const float* x, std::int64_t count, float* y) {
  dot_rows<F32>(weight, stride, rows, x, count, y);
}
MSA_WIDE_CLONES void dot_rows_bf16(const void* weight, std::int64_t stride, std::int64_t rows,
                                   const float* x, std::int64_t count, float* y) {
  dot_rows<Bf16>(weight, stride, rows, x, count, y);
}
MSA_WIDE_CLONES void dot_rows_f16(const void* weight, std::int64_t stride, std::int64_t rows,
                                  const float* x, std::int64_t count, float* y) {
  dot_rows<F16>(weight, stride, rows, x, count, y);
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

/// Rows of `weight` from `begin` to `end`, times each token, as they lie.
void multiply_rows(const TensorView& weight, const float* x, float* y, const Shape& shape,
                   std::int64_t begin, std::int64_t end) {
  DotRows* const dot_rows = weight.dtype == DType::f32   ? dot_rows_f32
                            : weight.dtype == DType::f16 ? dot_rows_f16
                                                         : dot_rows_bf16;
  for (std::int64_t token = 0; token < shape.tokens; ++token) {
    dot_rows(row_of(weight, begin), weight.stride[0], end - begin, x + token * shape.in, shape.in,
             y + token * shape.out + begin);
  }
}

/// No signal reaches this thread while it lives; they wait, or go to another thread. A kernel of
/// dnnl_sgemm (oneDNN 2.6) keeps values further below the stack pointer than the ABI's red zone,
/// where a signal handler's frame goes: Ctrl-C in a prefill crashed one time in four. Two system
/// calls, where a band takes 100 us and more.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

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
  const SignalsBlocked signals_blocked;
  return dnnl_sgemm('N', 'T', shape.tokens, end - begin, shape.in, 1.0f, x, shape.in, matrix,
                    row_stride, 0.0f, y + begin, shape.out) == dnnl_success;
}

/// Each thread's piece of the scratch starts on a cache line.
std::int64_t whole_lines(std::int64_t floats) { return (floats + 15) / 16 * 16; }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Rows per task, from the weight alone: sgemm may add in another order on another width, and
/// results shall not depend on the number of threads or on the products beside this one.
std::int64_t band_of(const TensorView& weight) {
  return std::clamp<std::int64_t>(ceil_div(weight.shape[0], 16) * 16, 16, kBandRows);
}

void check(const Product& product, std::span<const float> x, std::int64_t tokens) {
  const TensorView& weight = product.weight;
  MSA_CHECK(weight.rank == 2 && weight.stride[1] == 1, "linear: weight has rank ", weight.rank,
            ", expected a matrix with contiguous rows");
  MSA_CHECK(weight.dtype == DType::f32 || weight.dtype == DType::f16 || weight.dtype == DType::bf16,
            "linear: weight has dtype ", name_of(weight.dtype), ", expected f32, f16 or bf16");
  MSA_CHECK(static_cast<std::int64_t>(x.size()) >= tokens * weight.shape[1] &&
                static_cast<std::int64_t>(product.y.size()) >= tokens * weight.shape[0],
            "linear: weight is [", weight.shape[0], ", ", weight.shape[1], "] and there are ",
            tokens, " tokens, but x has ", x.size(), " elements and y has ", product.y.size());
}

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
    case DType::f16:
      expand_f16(reinterpret_cast<const std::uint16_t*>(source),
                 static_cast<std::int64_t>(out.size()), out.data());
      return;
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
  const Product product{.weight = weight, .y = y};
  linear({&product, 1}, x, tokens, scratch);
}

void linear(std::span<const Product> products, std::span<const float> x, std::int64_t tokens,
            LinearScratch& scratch) {
  std::int64_t multiplications = 0;
  for (const Product& product : products) {
    check(product, x, tokens);
    multiplications += tokens * product.weight.num_elements();
  }
  if (multiplications == 0) return;

  const bool direct = tokens <= kMaxDirectTokens;
  const int threads =
      multiplications >= (direct ? kMinSharedDirect : kMinSharedSgemm) ? num_threads() : 1;
  std::int64_t num_bands = 0;
  for (const Product& product : products) {
    const TensorView& weight = product.weight;
    const std::int64_t band = band_of(weight);
    num_bands += ceil_div(weight.shape[0], band);
    if (!direct && weight.dtype != DType::f32) scratch.reserve(threads, band * weight.shape[1]);
  }
  std::atomic<const Product*> failed{nullptr};
  const auto multiply = [&](std::int64_t index, int worker) {
    const Product* product = products.data();
    std::int64_t band = band_of(product->weight);
    for (std::int64_t here = 0; index >= (here = ceil_div(product->weight.shape[0], band));) {
      index -= here;
      band = band_of((++product)->weight);
    }
    const TensorView& weight = product->weight;
    const Shape shape{.in = weight.shape[1], .out = weight.shape[0], .tokens = tokens};
    const std::int64_t begin = index * band;
    const std::int64_t end = std::min(begin + band, shape.out);
    if (direct) {
      multiply_rows(weight, x.data(), product->y.data(), shape, begin, end);
    } else if (!multiply_band(weight, x.data(), product->y.data(), shape, begin, end,
                              weight.dtype == DType::f32 ? nullptr : scratch.of(worker))) {
      failed = product;
    }
  };
  if (threads > 1) {
    core::parallel_for(num_bands, multiply);
  } else {
    for (std::int64_t index = 0; index < num_bands; ++index) multiply(index, 0);
  }
  if (const Product* product = failed) {
    throw Error(ErrorCode::internal,
                core::concat("linear: dnnl_sgemm failed for ", tokens, " tokens and a weight of [",
                             product->weight.shape[0], ", ", product->weight.shape[1], "]"));
  }
}

}  // namespace msa::model
