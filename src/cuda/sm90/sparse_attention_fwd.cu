// SPDX-License-Identifier: Apache-2.0
//
// The row of SparseAttentionForward on sm_90: the union kernel, and the KV-outer kernel for tiles
// whose tokens share few blocks.
#include "cuda/common/launch.hpp"
#include "cuda/cuda.hpp"
#include "cuda/sm90/sparse_attention_fwd.hpp"
#include "cuda/sm90/sparse_attention_kv_outer.hpp"

namespace msa::cuda::sm90 {
namespace {

/// Marks the tiles whose tokens share so little that the KV-outer kernel is faster: measured on an
/// H100, the two meet where the union is 3.25 times as long as the mean list. One warp per tile.
constexpr int kClassifyWarps = 4;
constexpr int kMaxIds = kColdTile * 64;

__global__ void __launch_bounds__(kClassifyWarps * 32)
    classify_kernel(const __grid_constant__ AttentionTensors tensors, std::uint8_t* tile_is_cold,
                    int* count, std::int64_t num_cold_tiles) {
  __shared__ int all_ids[kClassifyWarps][kMaxIds];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t item = std::int64_t{blockIdx.x} * kClassifyWarps + warp;
  if (item >= num_cold_tiles * tensors.num_kv_heads) return;
  const int kv_head = static_cast<int>(item / num_cold_tiles);
  const std::int64_t row0 = item % num_cold_tiles * kColdTile;
  const std::int64_t left = tensors.batch.total_q - row0;
  const int num_tokens = left < kColdTile ? static_cast<int>(left) : kColdTile;
  int* const ids = all_ids[warp];
  for (int i = lane; i < num_tokens * tensors.top_k; i += 32) {
    ids[i] = tensors.ids_of(kv_head, row0 + i / tensors.top_k)[i % tensors.top_k];
  }
  __syncwarp();
  int pairs = 0;
  int distinct = 0;
  for (int i = lane; i < num_tokens * tensors.top_k; i += 32) {
    if (ids[i] < 0) continue;
    ++pairs;
    const int earlier = i / tensors.top_k * tensors.top_k;
    bool first = true;
    for (int j = 0; j < earlier; ++j) first = first && ids[j] != ids[i];
    distinct += first ? 1 : 0;
  }
  pairs = __reduce_add_sync(~0u, pairs);
  distinct = __reduce_add_sync(~0u, distinct);
  const bool is_cold = 4 * distinct * num_tokens > 13 * pairs;
  if (lane == 0) {
    tile_is_cold[item] = is_cold ? 1 : 0;
    if (is_cold) atomicAdd(count, 1);
  }
}

/// With few cold tiles the KV-outer kernel's cost per launch is more than they save: any = 1 only
/// where they are the greater part.
__global__ void decide_kernel(const int* count, int* any, std::int64_t num_tiles) {
  *any = 2 * std::int64_t{*count} > num_tiles ? 1 : 0;
}

/// Whether tiles of little overlap go to the KV-outer kernel. It needs enough queries for a block
/// to meet several of them, and its tiles to be ours.
bool may_be_cold(const SparseAttentionForward& args) {
  constexpr std::int64_t kMinQueries = 2048;
  return args.problem.group_size() == 16 && args.q.shape[0] >= kMinQueries &&
         !kv_outer_declines(args, {});
}

std::int64_t num_cold_tiles(const SparseAttentionForward& args) {
  return ceil_div(args.q.shape[0], kColdTile);
}
constexpr std::size_t kCountBytes = 256;
std::size_t flag_bytes(const SparseAttentionForward& args) {
  return kCountBytes +
         static_cast<std::size_t>(round_up(num_cold_tiles(args) * args.problem.num_kv_heads, 256));
}

std::optional<std::string> declines(const SparseAttentionForward& args, const Options&) {
  const Problem& problem = args.problem;
  if (auto reason = declines_device(args, 90, true)) return reason;
  if (args.q.dtype != DType::bf16 && args.q.dtype != DType::f16) {
    return core::concat("q is ", name_of(args.q.dtype), ", not bf16 or f16");
  }
  if (args.out.dtype != args.q.dtype) {
    return core::concat("out is ", name_of(args.out.dtype), ", q is ", name_of(args.q.dtype));
  }
  for (const auto& [name, view] : {std::pair{"k", args.k}, {"v", args.v}}) {
    if (view.dtype != args.q.dtype && view.dtype != DType::e4m3) {
      return core::concat(name, " is ", name_of(view.dtype), ", q is ", name_of(args.q.dtype));
    }
  }
  if (args.k.dtype != args.v.dtype) {
    return core::concat("k is ", name_of(args.k.dtype), ", v is ", name_of(args.v.dtype));
  }
  if (args.lse.given() && args.lse.dtype != DType::f32) {
    return core::concat("lse is ", name_of(args.lse.dtype), ", not f32");
  }
  if (problem.head_dim != 64 && problem.head_dim != 128) {
    return core::concat("head_dim ", problem.head_dim, " is not 64 or 128");
  }
  if (problem.block_size != 64 && problem.block_size != 128) {
    return core::concat("block_size ", problem.block_size, " is not 64 or 128");
  }
  const int group = problem.group_size();
  if (group > 16 || (group & (group - 1)) != 0) {
    return core::concat("group size ", group, " is not 1, 2, 4, 8 or 16");
  }
  if (problem.top_k > 64) return core::concat("top_k ", problem.top_k, " is above 64");
  if (args.softmax_scale < 0.0f || !std::isfinite(args.softmax_scale)) {
    return core::concat("softmax_scale ", args.softmax_scale, " is not positive");
  }
  for (const auto& [name, view] :
       {std::pair{"q", args.q}, {"k", args.k}, {"v", args.v}, {"out", args.out}}) {
    if (auto reason = declines_tma(name, view)) return reason;
  }
  return std::nullopt;
}

void launch_for_dtype(const SparseAttentionForward& args, ColdTiles cold, cudaStream_t stream) {
  if (args.k.dtype == DType::e4m3) {
    (args.q.dtype == DType::bf16 ? launch_union_bf16_e4m3 : launch_union_f16_e4m3)(args, stream);
    return;
  }
  (args.q.dtype == DType::bf16 ? launch_union_bf16 : launch_union_f16)(args, cold, stream);
}

void run(const SparseAttentionForward& args, std::span<std::byte> workspace, Stream stream) {
  if (args.q.shape[0] == 0) return;
  MSA_CHECK(reinterpret_cast<std::uintptr_t>(args.out.data) % 16 == 0,
            "out must be aligned to 16 bytes, is at ", args.out.data);
  if (!may_be_cold(args)) {
    launch_for_dtype(args, {}, stream_of(stream));
    return;
  }
  // Of the workspace: the number of cold tiles and the decision, a flag per tile, the KV-outer
  // kernel's part.
  auto* const count = reinterpret_cast<int*>(workspace.data());
  int* const any = count + 1;
  auto* const flags = reinterpret_cast<std::uint8_t*>(workspace.data() + kCountBytes);
  const std::int64_t tiles = num_cold_tiles(args);
  const std::int64_t items = tiles * args.problem.num_kv_heads;
  MSA_CUDA_CHECK(cudaMemsetAsync(count, 0, sizeof(int), stream_of(stream)));
  launch(classify_kernel,
         {.grid = dim3(static_cast<unsigned>(ceil_div(items, kClassifyWarps))),
          .threads = kClassifyWarps * 32},
         stream_of(stream), tensors_of(args), flags, count, tiles);
  launch(decide_kernel, {.threads = 1}, stream_of(stream), count, any, items);
  const ColdTiles cold{.flags = flags, .any = any};
  launch_for_dtype(args, cold, stream_of(stream));
  kv_outer_run(args, cold, workspace.subspan(flag_bytes(args)), stream);
}

}  // namespace

const msa::detail::Implementation<SparseAttentionForward> kSparseAttentionForward{
    .name = "cuda_sm90",
    .dtypes = "bf16 f16, k and v also e4m3",
    .declines = declines,
    .workspace_bytes = [](const SparseAttentionForward& args) -> std::size_t {
      return may_be_cold(args) ? flag_bytes(args) + kv_outer_workspace_bytes(args) : 0;
    },
    .run = run};

}  // namespace msa::cuda::sm90
