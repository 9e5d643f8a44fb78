// SPDX-License-Identifier: Apache-2.0
//
// A decode step in one launch, for so few tokens that launches are most of it. All CTAs, in
// clusters, score their share of the index keys; a barrier of the grid follows; then every cluster
// takes a token and KV head by turns: each of its CTAs selects the blocks, all the same, and
// attends to its own of them. The three parts are those of cuda_sm90_decode, so selection and,
// with as many splits, attention have its bits. The launch is cooperative: all CTAs are there at
// once, and the runtime keeps the counter of the barrier, so the workspace needs no first value.
// docs/kernels/sm90_decode_fused.md
#include <cooperative_groups.h>

#include <algorithm>
#include <utility>

#include "core/indexed_attention.hpp"
#include "cuda/cuda.hpp"
#include "cuda/sm90/indexed_attention_fused.hpp"
#include "cuda/sm90/indexer_decode_scores.cuh"
#include "cuda/sm90/indexer_decode_select.cuh"
#include "cuda/sm90/sparse_attention_decode.cuh"

namespace msa::cuda::sm90 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kDim = 128;
static_assert(kThreads == kDecodeThreads && kThreads == kSelectThreads);
static_assert(kWarps == kDecodeManyWarps);

using Element = __nv_bfloat16;
using Merge = DecodeMerge<kDim, kWarps>;
using Fragments = DecodeFragments<Element, Element, kDim>;

struct FusedParams {
  DecodeScoreParams scores;
  DecodeSelectParams selection;
  AttentionParams attention;
  int num_items;  ///< tokens x KV heads
};

__global__ void __launch_bounds__(kThreads, 1)
    indexed_attention_fused_kernel(const __grid_constant__ FusedParams params) {
  extern __shared__ __align__(16) std::uint8_t smem[];
  __shared__ DecodeBlock blocks[kDecodeAttentionSlots];
  __shared__ std::int32_t ids[kDecodeTopK];

  const AttentionParams& attention = params.attention;
  const int thread = static_cast<int>(threadIdx.x);
  const int num_splits = static_cast<int>(ptx::cluster_size());
  const int split = static_cast<int>(ptx::cluster_cta_rank());
  const int num_clusters = static_cast<int>(gridDim.x) / num_splits;
  const int heads = params.scores.heads;
  int index = static_cast<int>(blockIdx.x) / num_splits;
  const auto row_of = [&](int item) { return static_cast<std::int64_t>(item / heads); };

  prefetch_metadata(params.scores);
  if (index < params.num_items && thread < 2 * attention.group_size) {
    const int head = index % heads * attention.group_size + thread / 2;
    ptx::prefetch_l2(attention.q_row(row_of(index), head) + thread % 2 * 128);
  }
  score_share<Element, Element, kDim>(params.scores, smem, static_cast<int>(blockIdx.x),
                                      static_cast<int>(gridDim.x));
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  auto token = grid.barrier_arrive();
  // The next kernel may come to SMs that have nothing more to do.
  ptx::let_dependents_start();
  if (index >= params.num_items) return;
  // What does not depend on scores is read while the others arrive.
  std::uint32_t q[Fragments::kSteps][4];
  load_queries<Fragments>(attention, row_of(index), index % heads * attention.group_size, q);
  DeviceSequence sequence = sequence_of_query(attention.batch, row_of(index));
  RowRange range = range_of(params.selection, row_of(index));
  grid.barrier_wait(std::move(token));

  while (true) {
    const std::int64_t row = row_of(index);
    const int head = index % heads;
    std::int32_t* const out = params.selection.ids + head * params.selection.id_head_stride +
                              row * params.selection.id_row_stride;
    // All CTAs of a cluster write the same: exact_row of each reads ids that it wrote itself.
    select_row(params.selection, row, head, range, *reinterpret_cast<SelectShared*>(smem),
               [&](int slot, std::int32_t id) { ids[slot] = out[slot] = id; });
    __syncthreads();
    attend_share<Element, Element, kDim, kWarps>(attention, smem, blocks, q, sequence, row, head,
                                                 split, num_splits,
                                                 [&](int slot) { return ids[slot]; });
    index += num_clusters;
    if (index >= params.num_items) break;
    __syncthreads();  // shared memory is free again
    load_queries<Fragments>(attention, row_of(index), index % heads * attention.group_size, q);
    sequence = sequence_of_query(attention.batch, row_of(index));
    range = range_of(params.selection, row_of(index));
  }
}

/// Tokens x KV heads; above, the launches are a small part of a step.
constexpr std::int64_t kMostItems = 64;

std::int64_t num_items(const IndexedAttentionForward& args) {
  return args.q.shape[0] * args.problem.num_kv_heads;
}

std::optional<std::string> declines(const IndexedAttentionForward& args, const Options& options) {
  if (auto reason = kIndexerDecode.declines(core::indexer_of(args), options)) return reason;
  if (auto reason = kSparseAttentionDecode.declines(core::attention_of(args), options)) {
    return reason;
  }
  for (const auto& [name, view] :
       {std::pair{"index_q", args.index_q}, {"q", args.q}, {"k", args.k}, {"v", args.v}}) {
    if (view.dtype != DType::bf16) return core::concat(name, " is ", name_of(view.dtype));
  }
  const Problem& p = args.problem;
  if (p.head_dim != kDim) return core::concat("head_dim is ", p.head_dim, ", not ", kDim);
  if (p.index_dim != kDim) return core::concat("index_dim is ", p.index_dim, ", not ", kDim);
  if (num_items(args) > kMostItems) {
    return core::concat("there are ", num_items(args), " query tokens x KV heads, more than ",
                        kMostItems);
  }
  return std::nullopt;
}

void run(const IndexedAttentionForward& args, std::span<std::byte> workspace, Stream stream) {
  if (args.q.shape[0] == 0) return;
  const SparseAttentionForward attend = core::attention_of(args);
  const DecodeParams decode = make_decode_params(core::indexer_of(args), workspace);
  const FusedParams params{.scores = decode.scores,
                           .selection = decode.selection,
                           .attention = make_attention_params(attend),
                           .num_items = static_cast<int>(num_items(args))};
  const auto kernel = indexed_attention_fused_kernel;
  const auto* const symbol = reinterpret_cast<const void*>(kernel);
  const std::size_t smem =
      std::max({sizeof(Merge), sizeof(SelectShared), decode_score_smem(params.scores)});
  MSA_CUDA_CHECK(cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(smem)));
  MSA_CUDA_CHECK(cudaFuncSetAttribute(symbol, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = smem;
  config.stream = stream_of(stream);
  config.attrs = attributes;
  // Clusters that the GPU holds at once; a large one may not fit the SMs that are left to us.
  int num_clusters = 0;
  int splits = decode_splits(attend);
  for (;; splits /= 2) {
    attributes[0].val.clusterDim.x = static_cast<unsigned>(splits);
    config.gridDim = dim3(static_cast<unsigned>(splits));
    config.numAttrs = 1;
    MSA_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&num_clusters, kernel, &config));
    if (num_clusters > 0 || splits == 1) break;
  }
  num_clusters = std::min(num_clusters, num_sms(args.q.device.index) / splits);
  config.gridDim = dim3(static_cast<unsigned>(num_clusters * splits));
  config.numAttrs = 2;
  MSA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
}

}  // namespace

const msa::detail::Implementation<IndexedAttentionForward> kIndexedAttentionFused = {
    .name = "cuda_sm90_decode_fused",
    .dtypes = "bf16",
    .declines = declines,
    .workspace_bytes = [](const IndexedAttentionForward& args) -> std::size_t {
      return kIndexerDecode.workspace_bytes(core::indexer_of(args));
    },
    .run = run};

}  // namespace msa::cuda::sm90
