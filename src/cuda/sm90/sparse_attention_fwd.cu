// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>

#include "cuda/common/launch.hpp"
#include "cuda/common/support.hpp"
#include "cuda/common/tensor_map.hpp"
#include "cuda/cuda.hpp"
#include "cuda/sm90/sparse_attention_fwd.cuh"
#include "cuda/sm90/sparse_attention_kv_outer.hpp"

namespace msa::cuda::sm90 {
namespace {

constexpr std::size_t kSmemLimit = 227 * 1024;  // of a CTA of compute capability 9.0

std::uint64_t bytes_of(std::int64_t elements) { return static_cast<std::uint64_t>(elements) * 2; }

/// k or v as (dim, token, head, page), ragged keys as one page. Without keys a tensor of one token,
/// which nothing reads.
CUtensorMap map_of_keys(const TensorView& view, const SparseAttentionForward& args) {
  const Problem& problem = args.problem;
  const bool paged = args.batch.page_table.given();
  const bool empty = view.shape[0] == 0;
  const auto dim = static_cast<std::uint64_t>(problem.head_dim);
  const auto heads = static_cast<std::uint64_t>(problem.num_kv_heads);
  const std::uint64_t tokens = empty   ? 1
                               : paged ? static_cast<std::uint64_t>(problem.block_size)
                                       : static_cast<std::uint64_t>(view.shape[0]);
  const std::uint64_t pages = paged && !empty ? static_cast<std::uint64_t>(view.shape[0]) : 1;
  const std::uint64_t token_stride = bytes_of(view.stride[paged ? 2 : 0]);
  const std::uint64_t head_stride = bytes_of(view.stride[1]);
  const std::uint64_t page_stride = paged ? bytes_of(view.stride[0]) : 16;
  const auto positive = [](std::uint64_t stride) { return std::max<std::uint64_t>(stride, 16); };
  return make_tensor_map(
      empty ? args.q.data : view.data, view.dtype, std::array{dim, tokens, heads, pages},
      std::array{positive(token_stride), positive(head_stride), positive(page_stride)},
      std::array<std::uint32_t, 4>{64, static_cast<std::uint32_t>(problem.block_size), 1, 1});
}

CUtensorMap map_of_queries(const SparseAttentionForward& args, int slot_rows) {
  const Problem& problem = args.problem;
  return make_tensor_map(args.q.data, args.q.dtype,
                         std::array{static_cast<std::uint64_t>(problem.head_dim),
                                    static_cast<std::uint64_t>(problem.num_q_heads),
                                    static_cast<std::uint64_t>(args.q.shape[0])},
                         std::array{std::max<std::uint64_t>(bytes_of(args.q.stride[1]), 16),
                                    std::max<std::uint64_t>(bytes_of(args.q.stride[0]), 16)},
                         std::array<std::uint32_t, 3>{64, static_cast<std::uint32_t>(slot_rows),
                                                      static_cast<std::uint32_t>(64 / slot_rows)});
}

AttentionTensors tensors_of(const SparseAttentionForward& args) {
  const bool paged = args.batch.page_table.given();
  AttentionTensors g{};
  g.batch = make_device_batch(args);
  g.q = args.q.data;
  g.k = args.k.data;
  g.v = args.v.data;
  g.block_ids = static_cast<const std::int32_t*>(args.block_ids.data);
  g.out = args.out.data;
  g.lse = static_cast<float*>(args.lse.given() ? args.lse.data : nullptr);
  g.q_token_stride = args.q.stride[0];
  g.q_head_stride = args.q.stride[1];
  g.k_page_stride = paged ? args.k.stride[0] : 0;
  g.k_head_stride = args.k.stride[1];
  g.k_token_stride = args.k.stride[paged ? 2 : 0];
  g.v_page_stride = paged ? args.v.stride[0] : 0;
  g.v_head_stride = args.v.stride[1];
  g.v_token_stride = args.v.stride[paged ? 2 : 0];
  g.ids_head_stride = args.block_ids.stride[0];
  g.ids_token_stride = args.block_ids.stride[1];
  g.out_token_stride = args.out.stride[0];
  g.out_head_stride = args.out.stride[1];
  g.lse_token_stride = args.lse.stride[0];
  g.lse_head_stride = args.lse.stride[1];
  g.num_kv_heads = args.problem.num_kv_heads;
  g.group_size = args.problem.group_size();
  g.head_dim = args.problem.head_dim;
  g.top_k = args.problem.top_k;
  constexpr double kLog2E = 1.4426950408889634;
  g.scale_log2 =
      static_cast<float>(scale_or_default(args.softmax_scale, args.problem.head_dim) * kLog2E);
  return g;
}

/// Whether tiles of little overlap go to the KV-outer kernel. It needs enough queries for a block
/// to meet several of them, and its tiles to be ours.
bool may_be_cold(const SparseAttentionForward& args) {
  constexpr std::int64_t kMinQueries = 2048;
  return args.problem.group_size() == kTileRows / kColdTile && args.q.shape[0] >= kMinQueries &&
         !kv_outer_declines(args, {});
}

std::int64_t num_cold_tiles(const SparseAttentionForward& args) {
  return ceil_div(args.q.shape[0], kColdTile);
}
std::size_t flag_bytes(const SparseAttentionForward& args) {
  return static_cast<std::size_t>(round_up(num_cold_tiles(args) * args.problem.num_kv_heads, 256));
}

template <class T, int kDim, int kBlock>
void launch_union(const SparseAttentionForward& args, std::uint8_t* tile_is_cold,
                  cudaStream_t stream) {
  const Problem& problem = args.problem;
  UnionParams g{};
  g.tensors = tensors_of(args);
  g.slot_rows = std::max(problem.group_size(), 4);
  g.tile_is_cold = tile_is_cold;
  g.num_cold_tiles = num_cold_tiles(args);
  if (tile_is_cold != nullptr) {
    launch(classify_kernel,
           {.grid = dim3(static_cast<unsigned>(
                ceil_div(g.num_cold_tiles * problem.num_kv_heads, kClassifyWarps))),
            .threads = kClassifyWarps * 32},
           stream, g.tensors, tile_is_cold, g.num_cold_tiles);
  }
  const int tile_tokens = kTileRows / g.slot_rows;
  g.num_tiles = args.q.shape[0] / tile_tokens + g.tensors.batch.batch_size;
  const int lanes_per_token = 32 / tile_tokens;
  g.ids_per_lane = static_cast<int>(ceil_div(problem.top_k, lanes_per_token));
  constexpr std::size_t kQBytes = std::size_t{kTileRows} * kDim * 2;
  constexpr std::size_t kStageBytes = std::size_t{2} * kBlock * kDim * 2;
  const std::size_t fixed =
      kQBytes + sizeof(UnionShared) + static_cast<std::size_t>(g.ids_per_lane) * 32 * sizeof(int);
  g.stages =
      static_cast<int>(std::min<std::size_t>(kMaxStages, (kSmemLimit - fixed) / kStageBytes));
  const std::int64_t items = g.num_tiles * problem.num_kv_heads;
  const std::int64_t grid = std::min<std::int64_t>(items, num_sms(args.q.device.index));
  launch(union_kernel<T, kDim, kBlock>,
         {.grid = dim3(static_cast<unsigned>(grid)),
          .threads = kUnionThreads,
          .smem_bytes = fixed + static_cast<std::size_t>(g.stages) * kStageBytes},
         stream, g, map_of_queries(args, g.slot_rows), map_of_keys(args.k, args),
         map_of_keys(args.v, args));
}

template <class T>
void launch_for(const SparseAttentionForward& args, std::uint8_t* cold, cudaStream_t stream) {
  const bool wide = args.problem.block_size == 128;
  if (args.problem.head_dim == 128) {
    wide ? launch_union<T, 128, 128>(args, cold, stream)
         : launch_union<T, 128, 64>(args, cold, stream);
  } else {
    wide ? launch_union<T, 64, 128>(args, cold, stream)
         : launch_union<T, 64, 64>(args, cold, stream);
  }
}

std::optional<std::string> declines(const SparseAttentionForward& args, const Options&) {
  const Problem& problem = args.problem;
  if (auto reason = declines_device(args, 90, true)) return reason;
  if (args.q.dtype != DType::bf16 && args.q.dtype != DType::f16) {
    return core::concat("q is ", name_of(args.q.dtype), ", not bf16 or f16");
  }
  for (const auto& [name, view] : {std::pair{"k", args.k}, {"v", args.v}, {"out", args.out}}) {
    if (view.dtype != args.q.dtype) {
      return core::concat(name, " is ", name_of(view.dtype), ", q is ", name_of(args.q.dtype));
    }
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

void run(const SparseAttentionForward& args, std::span<std::byte> workspace, Stream stream) {
  if (args.q.shape[0] == 0) return;
  MSA_CHECK(reinterpret_cast<std::uintptr_t>(args.out.data) % 16 == 0,
            "out must be aligned to 16 bytes, is at ", args.out.data);
  const bool cold = may_be_cold(args);
  auto* const flags = cold ? reinterpret_cast<std::uint8_t*>(workspace.data()) : nullptr;
  (args.q.dtype == DType::bf16 ? launch_for<__nv_bfloat16> : launch_for<__half>)(args, flags,
                                                                                 stream_of(stream));
  if (cold) kv_outer_run(args, flags, workspace.subspan(flag_bytes(args)), stream);
}

}  // namespace

const msa::detail::Implementation<SparseAttentionForward> kSparseAttentionForward{
    .name = "cuda_sm90",
    .dtypes = "bf16 f16",
    .declines = declines,
    .workspace_bytes = [](const SparseAttentionForward& args) -> std::size_t {
      return may_be_cold(args) ? flag_bytes(args) + kv_outer_workspace_bytes(args) : 0;
    },
    .run = run};

}  // namespace msa::cuda::sm90
