// SPDX-License-Identifier: Apache-2.0
//
// Exact top-k of decode, one CTA a row: the kernels around indexer_decode_select.cuh.
#include <cuda_runtime.h>

#include "cuda/common/launch.hpp"
#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/support.hpp"
#include "cuda/sm90/indexer_decode.hpp"
#include "cuda/sm90/indexer_decode_select.cuh"
#include "cuda/sm90/indexer_screen.hpp"

namespace msa::cuda::sm90 {
namespace {

/// A row's survivors: blocks whose upper bound reaches the `wanted`-th largest lower bound.
__global__ void __launch_bounds__(kSelectThreads)
    screen_survivors_kernel(const __grid_constant__ ScreenParams params,
                            const __grid_constant__ DecodeSelectParams selection) {
  __shared__ SelectShared shared;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t row = blockIdx.x;
  ptx::let_dependents_start();
  ptx::wait_for_dependencies();
  const RowRange range = range_of(selection, row);
  if (range.num_visible <= selection.top_k || range.wanted <= 0) return;
  const std::int64_t offset = blockIdx.y * selection.head_stride + row * selection.row_stride;
  float* const scores = params.exact.scores + offset;
  const float* const upper = params.upper + offset;
  select(scores, range.first, range.last, range.wanted, shared);
  const float least = scores[block_of(shared.best[range.wanted - 1])];
  __syncthreads();  // everyone has it before scores change
  // Bounds are asked for several at a time: no load waits for the one before, or for the marks.
  constexpr int kBatch = 8;
  for (int begin = range.first + thread; begin <= range.last; begin += kBatch * kSelectThreads) {
    float bounds[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) bounds[i] = upper[min(begin + i * kSelectThreads, range.last)];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int block = begin + i * kSelectThreads;
      if (block > range.last) break;
      scores[block] = -INFINITY;
      if (bounds[i] < least) continue;
      const std::uint32_t bit = 1u << (block % 32);
      std::uint32_t* const word = params.seen + range.batch_idx * params.seen_words + block / 32;
      if ((atomicOr(word, bit) & bit) != 0) continue;
      params.survivors[atomicAdd(params.num_survivors, 1)] = {range.batch_idx, block};
    }
  }
}

__global__ void __launch_bounds__(kSelectThreads)
    decode_select_kernel(const __grid_constant__ DecodeSelectParams params) {
  __shared__ SelectShared shared;
  const std::int64_t row = blockIdx.x;
  const std::int64_t head = blockIdx.y;
  ptx::let_dependents_start();
  ptx::wait_for_dependencies();
  std::int32_t* const ids = params.ids + head * params.id_head_stride + row * params.id_row_stride;
  select_row(params, row, head, range_of(params, row), shared,
             [&](int slot, std::int32_t id) { ids[slot] = id; });
}

}  // namespace

void run_decode_select(const DecodeSelectParams& params, int heads, cudaStream_t stream) {
  launch(decode_select_kernel,
         {.grid = dim3(static_cast<unsigned>(params.batch.total_q), static_cast<unsigned>(heads)),
          .threads = kSelectThreads,
          .dependent = true},
         stream, params);
}

void run_screen_survivors(const ScreenParams& params, const DecodeSelectParams& select, int heads,
                          cudaStream_t stream) {
  launch(screen_survivors_kernel,
         {.grid = dim3(static_cast<unsigned>(select.batch.total_q), static_cast<unsigned>(heads)),
          .threads = kSelectThreads,
          .dependent = true},
         stream, params, select);
}

}  // namespace msa::cuda::sm90
