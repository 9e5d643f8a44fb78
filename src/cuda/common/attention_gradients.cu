// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/attention_gradients.cuh"
#include "cuda/common/launch.hpp"

namespace msa::cuda {
namespace {

constexpr int kWarps = 8;

/// Base-2 scores up to which f32 keeps lse to 2^-12, so that P is no worse for it than by the
/// rounding of scores themselves.
constexpr float kLargestLse = 0x1p12f;

/// Statistics of a row by the contract's words, by a warp.
template <class T>
__device__ __noinline__ RowStatistics exact_statistics(const AttentionGradients& g,
                                                       std::int64_t row, int head) {
  double maximum = -INFINITY;
  bool empty = true;
  for_each_exact<T>(g, row, head, [&](std::int64_t, double s, double) {
    maximum = s > maximum ? s : maximum;
    empty = false;
  });
  if (empty) return {INFINITY, 0.0f};
  double sum = 0.0;
  for_each_exact<T>(g, row, head, [&](std::int64_t, double s, double) {
    sum += s == -INFINITY ? 0.0 : exp(s - maximum);
  });
  ExactStatistics softmax{maximum, sum == 0.0 ? 0.0 : 1.0 / sum, 0.0};
  for_each_exact<T>(g, row, head, [&](std::int64_t, double s, double dp) {
    softmax.delta += softmax.probability(s) * dp;
  });
  if (threadIdx.x % 32 == 0) g.exact[g.statistic(row, head)] = softmax;
  return {NAN, 0.0f};
}

/// sum(dout * out) of a row, by kLanes lanes, all of which get it. kVectors: rows start at
/// multiples of 16 bytes and are that long.
template <class T, int kLanes, bool kVectors>
__device__ __forceinline__ float delta_of(const T* out, const T* dout, int dim) {
  constexpr int kStep = kVectors ? 16 / sizeof(T) : 1;
  float sum = 0.0f;
#pragma unroll 2
  for (int d = static_cast<int>(threadIdx.x) % kLanes * kStep; d < dim; d += kLanes * kStep) {
    T of_out[kStep];
    T of_dout[kStep];
    if constexpr (kVectors) {
      *reinterpret_cast<uint4*>(of_out) = *reinterpret_cast<const uint4*>(out + d);
      *reinterpret_cast<uint4*>(of_dout) = *reinterpret_cast<const uint4*>(dout + d);
    } else {
      of_out[0] = out[d];
      of_dout[0] = dout[d];
    }
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      sum = fmaf(static_cast<float>(of_dout[i]), static_cast<float>(of_out[i]), sum);
    }
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  return sum;
}

/// kLanes lanes per (query, query head).
template <class T, int kLanes, bool kVectors>
__global__ void __launch_bounds__(kWarps * 32, 3)
    row_statistics_kernel(const __grid_constant__ AttentionGradients g) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t num_rows = g.batch.total_q * g.num_q_heads;
  const std::int64_t at = (std::int64_t{blockIdx.x} * (kWarps * 32) + threadIdx.x) / kLanes;
  const bool live = at < num_rows;
  // A division of 64 bits costs more than the row.
  const std::int64_t row = num_rows <= INT32_MAX ? static_cast<std::uint32_t>(live ? at : 0) /
                                                       static_cast<std::uint32_t>(g.num_q_heads)
                                                 : (live ? at : 0) / g.num_q_heads;
  const int head = static_cast<int>((live ? at : 0) - row * g.num_q_heads);
  RowStatistics statistics;
  statistics.delta = delta_of<T, kLanes, kVectors>(reinterpret_cast<const T*>(g.out.at(row, head)),
                                                   reinterpret_cast<const T*>(g.dout.at(row, head)),
                                                   live ? g.head_dim : 0);
  const bool writes = live && lane % kLanes == 0;
  bool regular = true;
  if (writes) {
    const std::int64_t lse_at = row * g.lse_token_stride + head * g.lse_head_stride;
    const double natural = g.wide_lse
                               ? static_cast<const double*>(g.lse)[lse_at]
                               : static_cast<double>(static_cast<const float*>(g.lse)[lse_at]);
    statistics.lse = static_cast<float>(natural * 1.4426950408889634074);
    // False for NaN too.
    regular = fabsf(statistics.lse) <= kLargestLse && fabsf(statistics.delta) < INFINITY;
  }
#pragma unroll 1
  for (unsigned left = __ballot_sync(~0u, !regular); left != 0; left &= left - 1) {
    const int from = __ffs(static_cast<int>(left)) - 1;
    const RowStatistics exact =
        exact_statistics<T>(g, __shfl_sync(~0u, row, from), __shfl_sync(~0u, head, from));
    if (lane == from) statistics = exact;
  }
  if (writes) g.statistics[at] = statistics;
}

template <class T>
void launch_statistics(const AttentionGradients& g, cudaStream_t stream) {
  const std::int64_t rows = g.batch.total_q * g.num_q_heads;
  const auto start = [&]<int kLanes, bool kVectors>() {
    constexpr std::int64_t kRows = kWarps * 32 / kLanes;
    launch(row_statistics_kernel<T, kLanes, kVectors>,
           {.grid = dim3(static_cast<unsigned>(ceil_div(rows, kRows))), .threads = kWarps * 32},
           stream, g);
  };
  // 16 lanes read 128 elements of 16 bits at a time.
  const bool vectors = g.out.load == Load::vectors && g.dout.load == Load::vectors;
  vectors ? start.template operator()<16, true>() : start.template operator()<32, false>();
}

}  // namespace

void compute_row_statistics(const AttentionGradients& g, DType dtype, cudaStream_t stream) {
  switch (dtype) {
    case DType::f16:
      return launch_statistics<__half>(g, stream);
    case DType::bf16:
      return launch_statistics<__nv_bfloat16>(g, stream);
    default:
      return launch_statistics<float>(g, stream);
  }
}

}  // namespace msa::cuda
