// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "cuda/common/launch.hpp"
#include "cuda/common/support.hpp"
#include "cuda/cuda.hpp"
#include "cuda/generic/select_top_k.hpp"

namespace msa::cuda::generic {
namespace {

constexpr int kWarps = 4;  // rows of a CTA
constexpr int kDigits = 256;
constexpr unsigned kAll = 0xffffffffu;

/// Ascending with the score; NaN is below -inf, and both zeros are one value.
__device__ __forceinline__ std::uint32_t ordered_bits(float score) {
  if (isnan(score)) return 0;
  const std::uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

/// The `wanted`-th largest of the ordered bits of scores[first..last], and in `wanted` how many
/// equal to it belong to the `wanted` largest. More than `wanted` candidates, `wanted` > 0.
__device__ std::uint32_t threshold_of(const float* scores, std::int64_t first, std::int64_t last,
                                      int& wanted, int* histogram) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int digit = lane; digit < kDigits; digit += 32) histogram[digit] = 0;
    __syncwarp();
    for (std::int64_t b = first + lane; b <= last; b += 32) {
      const std::uint32_t bits = ordered_bits(scores[b]);
      const bool same = shift == 24 || (bits ^ prefix) >> (shift + 8) == 0;
      if (same) atomicAdd(&histogram[(bits >> shift) & 255u], 1);
    }
    __syncwarp();
    int digit = kDigits - 1;
    while (digit > 0 && histogram[digit] < wanted) wanted -= histogram[digit--];
    prefix |= static_cast<std::uint32_t>(digit) << shift;
    __syncwarp();
  }
  return prefix;
}

__global__ void __launch_bounds__(kWarps * 32)
    select_top_k_kernel(const __grid_constant__ SelectTopKParams params) {
  __shared__ int histograms[kWarps][kDigits];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp;
  if (index >= params.num_queries) return;
  const std::int64_t query = params.query_begin + index;
  const std::int64_t head = blockIdx.y;
  const float* const scores =
      params.scores + head * params.score_head_stride + index * params.score_query_stride;
  std::int32_t* const ids =
      params.ids + head * params.id_head_stride + query * params.id_query_stride;
  const DeviceSequence sequence = sequence_of_query(params.batch, query);
  const std::int64_t position = sequence.position(query - sequence.q_begin);
  std::int64_t count = 0;
  if (position >= 0 && sequence.k_len > 0) {
    // No further than lengths that were checked would say.
    const std::int64_t num_visible =
        min(min(position, sequence.k_len - 1) / params.batch.block_size + 1, params.num_columns);
    const std::int64_t num_local = min(std::int64_t{params.num_local_blocks}, num_visible);
    const std::int64_t first = min(std::int64_t{params.num_init_blocks}, num_visible - num_local);
    const std::int64_t last = num_visible - num_local - 1;  // first..last compete by score
    int wanted = static_cast<int>(params.top_k - num_local - first);
    const bool all = last - first + 1 <= wanted;
    std::uint32_t threshold = 0;
    if (!all && wanted > 0) threshold = threshold_of(scores, first, last, wanted, histograms[warp]);
    const bool none = !all && wanted == 0;
    int ties = 0;  // with the threshold, in lower blocks
    for (std::int64_t begin = 0; begin < num_visible; begin += 32) {
      const std::int64_t b = begin + lane;
      const bool competes = b >= first && b <= last;
      const std::uint32_t bits = competes && !all && !none ? ordered_bits(scores[b]) : 0;
      const bool tie = competes && !all && !none && bits == threshold;
      const unsigned tie_mask = __ballot_sync(kAll, tie);
      const unsigned below = (1u << lane) - 1;
      bool taken = b < num_visible;
      if (competes) {
        taken = all ||
                (!none && (bits > threshold || (tie && ties + __popc(tie_mask & below) < wanted)));
      }
      const unsigned taken_mask = __ballot_sync(kAll, taken);
      if (taken) ids[count + __popc(taken_mask & below)] = static_cast<std::int32_t>(b);
      count += __popc(taken_mask);
      ties += __popc(tie_mask);
    }
  }
  for (std::int64_t slot = count + lane; slot < params.top_k; slot += 32) ids[slot] = -1;
}

}  // namespace

void run_select_top_k(const SelectTopKParams& params, int num_heads, cudaStream_t stream) {
  launch(select_top_k_kernel,
         {.grid = dim3(static_cast<unsigned>(ceil_div(params.num_queries, kWarps)),
                       static_cast<unsigned>(num_heads)),
          .threads = kWarps * 32},
         stream, params);
}

const msa::detail::Implementation<SelectTopK> kSelectTopK = {
    .name = "cuda_generic",
    .dtypes = "f32",
    .declines = [](const SelectTopK& args, const Options&) -> std::optional<std::string> {
      if (auto reason = declines_device(args, 80, false)) return reason;
      if (args.block_scores.dtype != DType::f32) {
        return core::concat("block_scores is ", name_of(args.block_scores.dtype), ", not f32");
      }
      return std::nullopt;
    },
    .workspace_bytes = [](const SelectTopK&) -> std::size_t { return 0; },
    .run =
        [](const SelectTopK& args, std::span<std::byte>, Stream stream) {
          const Problem& p = args.problem;
          const SelectTopKParams params{.batch = make_device_batch(args),
                                        .scores = static_cast<const float*>(args.block_scores.data),
                                        .score_head_stride = args.block_scores.stride[0],
                                        .score_query_stride = args.block_scores.stride[1],
                                        .num_columns = args.block_scores.shape[2],
                                        .ids = static_cast<std::int32_t*>(args.block_ids.data),
                                        .id_head_stride = args.block_ids.stride[0],
                                        .id_query_stride = args.block_ids.stride[1],
                                        .query_begin = 0,
                                        .num_queries = args.block_scores.shape[1],
                                        .top_k = p.top_k,
                                        .num_init_blocks = p.num_init_blocks,
                                        .num_local_blocks = p.num_local_blocks};
          run_select_top_k(params, p.num_kv_heads, stream_of(stream));
        }};

}  // namespace msa::cuda::generic
