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

/// A warp per (query, query head).
template <class T>
__global__ void __launch_bounds__(kWarps * 32)
    row_statistics_kernel(const __grid_constant__ AttentionGradients g) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t at = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (at >= g.batch.total_q * g.num_q_heads) return;
  const std::int64_t row = at / g.num_q_heads;
  const int head = static_cast<int>(at % g.num_q_heads);
  const T* const out = reinterpret_cast<const T*>(g.out.at(row, head));
  const T* const dout = reinterpret_cast<const T*>(g.dout.at(row, head));
  float delta = 0.0f;
#pragma unroll 4
  for (int d = lane; d < g.head_dim; d += 32) {
    delta = fmaf(static_cast<float>(dout[d]), static_cast<float>(out[d]), delta);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(~0u, delta, lanes);
  const std::int64_t lse_at = row * g.lse_token_stride + head * g.lse_head_stride;
  const double natural = g.wide_lse ? static_cast<const double*>(g.lse)[lse_at]
                                    : static_cast<double>(static_cast<const float*>(g.lse)[lse_at]);
  const auto lse = static_cast<float>(natural * 1.4426950408889634074);
  RowStatistics statistics{lse, delta};
  // False for NaN too.
  const bool regular = fabsf(lse) <= kLargestLse && fabsf(delta) < INFINITY;
  if (!regular) statistics = exact_statistics<T>(g, row, head);
  if (lane == 0) g.statistics[at] = statistics;
}

template <class T>
void launch_statistics(const AttentionGradients& g, cudaStream_t stream) {
  const std::int64_t rows = g.batch.total_q * g.num_q_heads;
  launch(row_statistics_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(ceil_div(rows, kWarps))), .threads = kWarps * 32},
         stream, g);
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
