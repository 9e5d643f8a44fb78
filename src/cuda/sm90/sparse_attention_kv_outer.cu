// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>

#include "core/workspace.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/common/support.hpp"
#include "cuda/sm90/sparse_attention_fwd.hpp"
#include "cuda/sm90/sparse_attention_kv_outer.hpp"
#include "cuda/sm90/sparse_attention_kv_outer_merge.cuh"
#include "cuda/sm90/tensor_maps.hpp"

namespace msa::cuda::sm90 {
namespace {

using namespace kv_outer;

constexpr std::int64_t kPartialBytes = std::int64_t{2} << 30;  // of out, for the tokens of a launch

/// Everything that follows from shapes.
struct Layout {
  std::int64_t window;         ///< tokens that share a reading of K and V
  std::int64_t launch_tokens;  ///< tokens whose partials are held, a multiple of window
  std::int64_t num_segments;
  std::int64_t num_launches;
  std::int64_t max_items;
  Lists lists{};
  Partials partials{};
  std::size_t bytes = 0;
};

Layout make_layout(const SparseAttentionForward& args, std::byte* workspace) {
  const Problem& problem = args.problem;
  const std::int64_t total_q = args.q.shape[0];
  const bool paged = args.batch.page_table.given();
  Layout layout{};
  // Enough queries that a block meets 64 tokens where they choose evenly.
  const std::int64_t num_blocks = ceil_div(core::max_seq_len_k(args), problem.block_size);
  const std::int64_t wanted =
      std::clamp<std::int64_t>(64 * num_blocks / problem.top_k, 512, std::int64_t{kMaxWindow});
  layout.window = static_cast<std::int64_t>(
      std::bit_ceil(static_cast<std::uint64_t>(std::clamp<std::int64_t>(total_q, 128, wanted))));
  const std::int64_t token_bytes =
      std::int64_t{problem.num_q_heads} * problem.top_k * problem.head_dim * 2;
  while (layout.window > 128 && layout.window * token_bytes > kPartialBytes) layout.window /= 2;
  const std::int64_t windows =
      std::clamp<std::int64_t>(std::min<std::int64_t>(kPartialBytes / (layout.window * token_bytes),
                                                      kMaxSegments / problem.num_kv_heads),
                               1, std::max<std::int64_t>(1, ceil_div(total_q, layout.window)));
  layout.launch_tokens = windows * layout.window;
  const std::int64_t num_windows = ceil_div(total_q, layout.window);
  layout.num_segments = num_windows * problem.num_kv_heads;
  layout.num_launches = ceil_div(total_q, layout.launch_tokens);
  const std::int64_t pairs = layout.window * problem.top_k;
  const std::int64_t bins =
      paged ? args.k.shape[0] : args.k.shape[0] / problem.block_size + core::batch_size(args.batch);
  layout.max_items = std::min(bins, pairs) + pairs / kTokensPerItem;

  const std::int64_t held = std::min(layout.launch_tokens, round_up(total_q, 1));
  const std::int64_t rows = held * problem.num_q_heads * problem.top_k;
  core::WorkspaceLayout memory(workspace);
  layout.lists.entries = memory.take<std::uint32_t>(layout.num_segments * pairs);
  layout.lists.items = memory.take<Item>(layout.num_segments * layout.max_items);
  layout.lists.num_items = memory.take<int>(layout.num_segments);
  layout.lists.attended = memory.take<std::uint64_t>(total_q * problem.num_kv_heads);
  layout.lists.tickets = memory.take<int>(layout.num_launches);
  layout.lists.num_tickets = static_cast<int>(layout.num_launches);
  layout.lists.window = static_cast<int>(layout.window);
  layout.lists.max_items = static_cast<int>(layout.max_items);
  layout.partials.out = memory.take<std::uint16_t>(rows * problem.head_dim);
  layout.partials.lse = memory.take<float>(rows);
  layout.partials.exponents = memory.take<std::int8_t>(rows);
  layout.bytes = memory.bytes();
  return layout;
}

/// Boxes of one block of one head: 64 columns, its keys, panels.
CUtensorMap make_kv_map(const TensorView& kv, const Problem& problem, bool paged) {
  const auto panels = static_cast<std::uint32_t>(problem.head_dim / 64);
  const auto heads = static_cast<std::uint64_t>(problem.num_kv_heads);
  const auto keys = static_cast<std::uint64_t>(kv.shape[paged ? 2 : 0]);
  const auto pages = static_cast<std::uint64_t>(paged ? kv.shape[0] : 1);
  const std::uint64_t dims[] = {64, keys, panels, heads, pages};
  const std::uint64_t strides[] = {stride_bytes(kv, paged ? 2 : 0), 128, stride_bytes(kv, 1),
                                   paged ? stride_bytes(kv, 0) : 16};
  const std::uint32_t box[] = {64, static_cast<std::uint32_t>(problem.block_size), panels, 1, 1};
  return make_tensor_map(kv.data, kv.dtype, dims, strides, box);
}

template <class T, int kDim, int kBlock>
void run_shape(const SparseAttentionForward& args, ColdTiles cold, std::byte* workspace,
               cudaStream_t stream) {
  const Problem& problem = args.problem;
  const std::int64_t total_q = args.q.shape[0];
  const bool paged = args.batch.page_table.given();
  const Layout layout = make_layout(args, workspace);
  const int log2_group = std::countr_zero(static_cast<unsigned>(problem.group_size()));
  const auto scale_log2 = static_cast<float>(
      scale_or_default(args.softmax_scale, problem.head_dim) * 1.4426950408889634);
  const Selection selection{
      .batch = make_device_batch(args),
      .block_ids = static_cast<const std::int32_t*>(args.block_ids.data),
      .head_stride = args.block_ids.stride[0],
      .token_stride = args.block_ids.stride[1],
      .slot_stride = args.block_ids.stride[2],
      .tile_is_cold = cold.flags,
      .any_cold = cold.any,
      .num_tiles = ceil_div(total_q, kTokensPerColdTile),
      .num_kv_heads = problem.num_kv_heads,
      .top_k = problem.top_k,
  };
  launch(build_lists_kernel,
         {.grid = dim3(static_cast<unsigned>(layout.num_segments)),
          .threads = kListThreads,
          .smem_bytes = kBinsPerPass * sizeof(int)},
         stream, selection, layout.lists);

  // Without keys no item refers to them.
  const bool keys = args.k.shape[0] > 0;
  const CUtensorMap q_map = map_of_groups(args.q, problem);
  const CUtensorMap k_map = keys ? make_kv_map(args.k, problem, paged) : q_map;
  const CUtensorMap v_map = keys ? make_kv_map(args.v, problem, paged) : q_map;
  AttendParams attend{.lists = layout.lists,
                      .partials = layout.partials,
                      .any_cold = cold.any,
                      .first_segment = 0,
                      .num_segments = 0,
                      .ticket = 0,
                      .num_kv_heads = problem.num_kv_heads,
                      .log2_group_size = log2_group,
                      .top_k = problem.top_k,
                      .scale_log2 = scale_log2};
  const TensorView& out = args.out;
  const auto aligned = [&](std::int64_t elements) { return elements % 8 == 0; };
  MergeParams merge{
      .selection = selection,
      .attended = layout.lists.attended,
      .partials = layout.partials,
      .num_tokens = 0,
      .num_q_heads = problem.num_q_heads,
      .log2_group_size = log2_group,
      .scale_log2 = scale_log2,
      .vector_stores = reinterpret_cast<std::uintptr_t>(out.data) % 16 == 0 &&
                       aligned(out.stride[0]) && aligned(out.stride[1]),
      .tensors = tensors_of(args),
      .out = out.data,
      .out_stride = out.stride[0],
      .out_head_stride = out.stride[1],
      .lse = static_cast<float*>(args.lse.given() ? args.lse.data : nullptr),
      .lse_stride = args.lse.stride[0],
      .lse_head_stride = args.lse.stride[1],
  };
  const std::int64_t launch_segments = layout.launch_tokens / layout.window * problem.num_kv_heads;
  for (std::int64_t i = 0; i < layout.num_launches; ++i) {
    const std::int64_t first_token = i * layout.launch_tokens;
    attend.partials.first_token = merge.partials.first_token = first_token;
    attend.first_segment = i * launch_segments;
    attend.num_segments =
        static_cast<int>(std::min(launch_segments, layout.num_segments - attend.first_segment));
    attend.ticket = static_cast<int>(i);
    launch(attend_kernel<T, kDim, kBlock>,
           {.grid = dim3(static_cast<unsigned>(num_sms(args.q.device.index))),
            .threads = kThreads,
            .smem_bytes = Smem<kDim, kBlock>::kBytes},
           stream, q_map, k_map, v_map, attend);
    merge.num_tokens = std::min(layout.launch_tokens, total_q - first_token);
    constexpr std::int64_t kMergeCtasPerSm = 128;  // enough to balance, few to start for nothing
    const std::int64_t tiles =
        ceil_div(merge.num_tokens, kTokensPerColdTile) * problem.num_kv_heads;
    launch(merge_kernel<T, kDim>,
           {.grid = dim3(static_cast<unsigned>(
                std::min(tiles, kMergeCtasPerSm * num_sms(args.q.device.index)))),
            .threads = kMergeThreads},
           stream, merge);
  }
}

template <class T>
void run_dtype(const SparseAttentionForward& args, ColdTiles cold, std::byte* workspace,
               cudaStream_t stream) {
  const bool wide = args.problem.head_dim == 128;
  if (args.problem.block_size == 128) {
    (wide ? run_shape<T, 128, 128> : run_shape<T, 64, 128>)(args, cold, workspace, stream);
  } else {
    (wide ? run_shape<T, 128, 64> : run_shape<T, 64, 64>)(args, cold, workspace, stream);
  }
}

}  // namespace

std::optional<std::string> kv_outer_declines(const SparseAttentionForward& args, const Options&) {
  if (auto reason = declines_device(args, 90, true)) return reason;
  const Problem& problem = args.problem;
  if (args.q.dtype != DType::bf16 && args.q.dtype != DType::f16) {
    return core::concat("q is ", name_of(args.q.dtype), ", not bf16 or f16");
  }
  for (const auto& [name, view] : {std::pair{"k", &args.k}, {"v", &args.v}, {"out", &args.out}}) {
    if (view->dtype != args.q.dtype) {
      return core::concat(name, " is ", name_of(view->dtype), ", not ", name_of(args.q.dtype),
                          " as q");
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
  if (group > 16 || !std::has_single_bit(static_cast<unsigned>(group))) {
    return core::concat("group size ", group, " is not 1, 2, 4, 8 or 16");
  }
  if (problem.top_k > kMaxTopK) {
    return core::concat("top_k ", problem.top_k, " is above ", kMaxTopK);
  }
  if (problem.num_kv_heads > kMaxSegments) {
    return core::concat("num_kv_heads ", problem.num_kv_heads, " is above ", kMaxSegments);
  }
  if (args.softmax_scale < 0.0f) {
    return core::concat("softmax_scale ", args.softmax_scale, " is negative");
  }
  if (auto reason = declines_tma("q", args.q)) return reason;
  if (auto reason = declines_tma("k", args.k)) return reason;
  return declines_tma("v", args.v);
}

std::size_t kv_outer_workspace_bytes(const SparseAttentionForward& args) {
  return make_layout(args, nullptr).bytes;
}

void kv_outer_run(const SparseAttentionForward& args, ColdTiles cold,
                  std::span<std::byte> workspace, Stream stream) {
  if (args.q.shape[0] == 0) return;
  (args.q.dtype == DType::bf16 ? run_dtype<__nv_bfloat16> : run_dtype<__half>)(args, cold,
                                                                               workspace.data(),
                                                                               stream_of(stream));
}

const ::msa::detail::Implementation<SparseAttentionForward> kSparseAttentionForwardKvOuter = {
    .name = "cuda_sm90_kv_outer",
    .dtypes = "bf16 f16",
    .declines = kv_outer_declines,
    .workspace_bytes = kv_outer_workspace_bytes,
    .run = [](const SparseAttentionForward& args, std::span<std::byte> workspace, Stream stream) {
      kv_outer_run(args, {}, workspace, stream);
    }};

}  // namespace msa::cuda::sm90
