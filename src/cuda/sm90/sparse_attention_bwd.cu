// SPDX-License-Identifier: Apache-2.0
//
// The row of SparseAttentionBackward on sm_90.
#include <algorithm>
#include <bit>

#include "cuda/common/launch.hpp"
#include "cuda/common/scan.cuh"
#include "cuda/cuda.hpp"
#include "cuda/sm90/sparse_attention_bwd_dkv.cuh"
#include "cuda/sm90/sparse_attention_bwd_dq.cuh"
#include "cuda/sm90/tensor_maps.hpp"

namespace msa::cuda::sm90 {
namespace {

using namespace bwd;

constexpr std::size_t kSmemLimit = 227 * 1024;  // of a CTA of compute capability 9.0

// Items

constexpr int kItemThreads = 1024;

struct Counts {
  int items;
  int slots;
  int splits;
};

/// How a block of `count` entries is cut: `pieces` of `length`, the last one shorter.
struct Cut {
  int pieces;
  int length;
};
__device__ __forceinline__ Cut cut_of(std::int64_t count, int piece_entries, int tile_queries) {
  if (count <= piece_entries) return {1, static_cast<int>(count)};
  const std::int64_t pieces = (count + piece_entries - 1) / piece_entries;
  const std::int64_t even = (count + pieces - 1) / pieces;
  const std::int64_t length = (even + tile_queries - 1) / tile_queries * tile_queries;
  return {static_cast<int>((count + length - 1) / length), static_cast<int>(length)};
}

/// One CTA. Head by head, so that CTAs at work at the same time read the same queries; old blocks
/// first: later queries attend them too, so they have the longer lists, and the short ones fill up
/// the end.
__global__ void __launch_bounds__(kItemThreads)
    items_kernel(const __grid_constant__ BackwardParams params, int num_kv_heads) {
  __shared__ int scratch[kItemThreads / 32];
  const AttentionGradients& g = params.g;
  const Work& work = params.work;
  const int tile_queries = kDkvRows >> params.log2_group_size;
  const std::int64_t total = work.num_bins * num_kv_heads;
  const std::int64_t share = (total + kItemThreads - 1) / kItemThreads;
  const std::int64_t from = min(share * threadIdx.x, total);
  const std::int64_t to = min(from + share, total);
  const auto for_each = [&](const auto& visit) {
    for (std::int64_t i = from; i < to; ++i) {
      const int head = static_cast<int>(i / work.num_bins);
      const std::int64_t bin = i % work.num_bins;
      const KeyBlock key_block = key_block_of_bin(g.batch, bin);
      if (!key_block.exists) continue;
      const QueryList list = queries(g.batch, g.lists, head, bin, key_block);
      visit(head, bin, key_block, list, cut_of(list.count, work.piece_entries, tile_queries));
    }
  };
  Counts mine{0, 0, 0};
  for_each([&](int, std::int64_t, const KeyBlock&, const QueryList&, const Cut& cut) {
    mine.items += cut.pieces;
    mine.slots += cut.pieces > 1 ? cut.pieces : 0;
    mine.splits += cut.pieces > 1 ? 1 : 0;
  });
  int num_items, num_slots, num_splits;
  Counts at;
  at.items = exclusive_sum<kItemThreads>(mine.items, scratch, num_items);
  at.slots = exclusive_sum<kItemThreads>(mine.slots, scratch, num_slots);
  at.splits = exclusive_sum<kItemThreads>(mine.splits, scratch, num_splits);
  for_each([&](int head, std::int64_t bin, const KeyBlock& key_block, const QueryList& list,
               const Cut& cut) {
    const DeviceSequence& sequence = key_block.sequence;
    Item item;
    item.head = head;
    item.bin = static_cast<int>(bin);
    item.row = static_cast<int>(key_block.first_key(kBlock));
    item.num_tokens = key_block.num_tokens(kBlock);
    item.unseen = static_cast<int>(sequence.q_begin + key_block.block * kBlock - 1 -
                                   (sequence.k_len - sequence.q_len));
    // Without lists the first query; with them the place in the head's rows.
    const std::int64_t begin = g.lists.rows == nullptr
                                   ? list.first
                                   : list.rows - (g.lists.rows + head * g.lists.rows_per_head);
    const bool split = cut.pieces > 1;
    if (split) {
      work.splits[at.splits++] = {.head = head,
                                  .bin = item.bin,
                                  .row = item.row,
                                  .num_tokens = item.num_tokens,
                                  .slot = at.slots,
                                  .count = cut.pieces};
    }
    for (int piece = 0; piece < cut.pieces; ++piece) {
      const std::int64_t done = std::int64_t{piece} * cut.length;
      item.begin = static_cast<int>(begin + done);
      item.count = static_cast<int>(min(std::int64_t{cut.length}, list.count - done));
      item.slot = split ? at.slots++ : -1;
      work.items[at.items++] = item;
    }
  });
  if (threadIdx.x == 0) *work.counters = {num_items, num_splits, 0};
}

// Sums of pieces

constexpr int kAddThreads = 256;

/// A CTA per block that was cut and per tensor.
template <class T, int kDim>
__global__ void __launch_bounds__(kAddThreads)
    add_pieces_kernel(const __grid_constant__ BackwardParams params) {
  const Work& work = params.work;
  if (static_cast<int>(blockIdx.x) >= work.counters->num_splits) return;
  const Split split = work.splits[blockIdx.x];
  const int which = static_cast<int>(blockIdx.y);  // 0: dK, 1: dV
  const TokenRows& to = which == 0 ? params.g.dk : params.g.dv;
  const float* const first =
      work.partials + (std::int64_t{split.slot} * 2 + which) * (kBlock * kDim);
  bool bad = false;
  for (int at = static_cast<int>(threadIdx.x) * 4; at < split.num_tokens * kDim;
       at += kAddThreads * 4) {
    float4 sum = *reinterpret_cast<const float4*>(first + at);
    for (int piece = 1; piece < split.count; ++piece) {
      const float4 more =
          *reinterpret_cast<const float4*>(first + std::int64_t{piece} * (2 * kBlock * kDim) + at);
      sum.x += more.x;
      sum.y += more.y;
      sum.z += more.z;
      sum.w += more.w;
    }
    const float largest = ptx::max_nan(ptx::max_nan(fabsf(sum.x), fabsf(sum.y)),
                                       ptx::max_nan(fabsf(sum.z), fabsf(sum.w)));
    bad |= !(largest <= kLargest<T>);
    T* const row = reinterpret_cast<T*>(to.at(split.row + at / kDim, split.head));
    *reinterpret_cast<uint2*>(row + at % kDim) =
        make_uint2(ptx::pack<T>(sum.x, sum.y), ptx::pack<T>(sum.z, sum.w));
  }
  if (bad) work.redo_kv[split.head * work.num_bins + split.bin] = 1;
}

// What came out not finite

constexpr int kRedoThreads = 256;

template <class T>
__global__ void __launch_bounds__(kRedoThreads)
    redo_q_kernel(const __grid_constant__ BackwardParams params) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t rows = params.g.batch.total_q * params.g.num_q_heads;
  const std::int64_t step = std::int64_t{gridDim.x} * kRedoThreads;
  for (std::int64_t base = (std::int64_t{blockIdx.x} * kRedoThreads + threadIdx.x) / 32 * 32;
       base < rows; base += step) {
    const bool mine = base + lane < rows && params.work.redo_q[base + lane] != 0;
    for (std::uint32_t left = __ballot_sync(~0u, mine); left != 0; left &= left - 1) {
      const std::int64_t at = base + __ffs(left) - 1;
      dq_row<T>(params.g, at / params.g.num_q_heads, static_cast<int>(at % params.g.num_q_heads));
    }
  }
}

/// A CTA per (bin, KV head).
template <class T>
__global__ void __launch_bounds__(kRedoThreads)
    redo_kv_kernel(const __grid_constant__ BackwardParams params) {
  const std::int64_t bin = blockIdx.x;
  const int head = static_cast<int>(blockIdx.y);
  if (params.work.redo_kv[head * params.work.num_bins + bin] == 0) return;
  const KeyBlock key_block = key_block_of_bin(params.g.batch, bin);
  const int num_tokens = key_block.num_tokens(kBlock);
  for (int token = static_cast<int>(threadIdx.x) / 32; token < num_tokens;
       token += kRedoThreads / 32) {
    dkv_row<T>(params.g, bin, key_block, token, head);
  }
}

// Host

struct Layout {
  GradientWorkspace gradients;
  Work work;
  std::int64_t max_slots;
  std::size_t bytes;
};

Layout make_layout(const SparseAttentionBackward& args, std::byte* workspace) {
  const Problem& problem = args.problem;
  core::WorkspaceLayout memory(workspace);
  Layout layout{};
  layout.gradients = lay_out_gradients(args, memory);
  Work& work = layout.work;
  const std::int64_t total_q = args.q.shape[0];
  const std::int64_t heads = problem.num_kv_heads;
  work.num_bins = layout.gradients.build.num_bins;
  const std::int64_t entries =
      heads * total_q * (args.block_ids.given() ? problem.top_k : work.num_bins);
  // Pieces so short that the GPU's end is even, so long that at most about 2,048 are held (128 KB
  // each at head_dim 128): those of a cut block are on average longer than half of this.
  constexpr std::int64_t kShortest = 512;
  constexpr std::int64_t kSlots = 2048;
  const std::int64_t piece = std::max(kShortest, ceil_div(2 * entries, kSlots));
  work.piece_entries = static_cast<int>(std::min<std::int64_t>(piece, INT32_MAX / 2));
  layout.max_slots = 2 * entries / work.piece_entries;
  work.max_splits = static_cast<int>(layout.max_slots / 2);
  work.max_items = static_cast<int>(work.num_bins * heads + layout.max_slots);
  work.counters = memory.take<Counters>(1);
  work.redo_kv = memory.take<std::uint8_t>(heads * work.num_bins);
  work.redo_q = memory.take<std::uint8_t>(total_q * problem.num_q_heads);
  work.items = memory.take<Item>(work.max_items);
  work.splits = memory.take<Split>(work.max_splits);
  work.partials = memory.take<float>(layout.max_slots * 2 * kBlock * problem.head_dim);
  layout.bytes = memory.bytes();
  return layout;
}

template <int kDim>
void run_dim(const SparseAttentionBackward& args, std::byte* workspace, cudaStream_t stream) {
  using T = __nv_bfloat16;
  const Problem& problem = args.problem;
  const Layout layout = make_layout(args, workspace);
  BackwardParams params{};
  params.g = make_attention_gradients(args, layout.gradients);
  params.work = layout.work;
  params.log2_group_size = std::countr_zero(static_cast<unsigned>(problem.group_size()));
  params.scale = static_cast<float>(params.g.scale);
  params.scale_log2 = static_cast<float>(params.g.scale * 1.4426950408889634);
  const int device = args.q.device.index;

  MSA_CUDA_CHECK(cudaMemsetAsync(
      layout.work.redo_kv, 0, static_cast<std::size_t>(problem.num_kv_heads * layout.work.num_bins),
      stream));
  build_query_lists(layout.gradients.build, stream);
  compute_row_statistics(params.g, args.q.dtype, stream);

  // A map needs a tensor. Without keys no query attends one; without queries no item has one.
  const bool any_queries = args.q.shape[0] > 0;
  if (!any_queries && args.k.shape[0] == 0) return;
  const CUtensorMap k_map = map_of_keys(args.k, problem, false, args.q.data);
  const CUtensorMap v_map = map_of_keys(args.v, problem, false, args.q.data);
  DqParams dq{};
  dq.backward = params;
  UnionParams& walk = dq.walk;
  walk.tensors.batch = params.g.batch;
  walk.tensors.block_ids = params.g.block_ids;
  walk.tensors.ids_head_stride = params.g.ids_head_stride;
  walk.tensors.ids_token_stride = params.g.ids_token_stride;
  walk.tensors.num_kv_heads = problem.num_kv_heads;
  walk.tensors.group_size = problem.group_size();
  walk.tensors.top_k = problem.top_k;
  walk.slot_rows = std::max(problem.group_size(), 4);
  const int tile_tokens = kTileRows / walk.slot_rows;
  walk.num_tiles = args.q.shape[0] / tile_tokens + params.g.batch.batch_size;
  walk.ids_per_lane = static_cast<int>(ceil_div(problem.top_k, 32 / tile_tokens));
  constexpr std::size_t kRowsBytes = std::size_t{2} * kTileRows * kDim * 2;
  constexpr std::size_t kStageBytes = std::size_t{2} * kBlock * kDim * 2;
  const std::size_t fixed = kRowsBytes + sizeof(UnionShared) +
                            static_cast<std::size_t>(walk.ids_per_lane) * 32 * sizeof(int);
  walk.stages =
      static_cast<int>(std::min<std::size_t>(kMaxStages, (kSmemLimit - fixed) / kStageBytes));
  const std::int64_t tiles = any_queries ? walk.num_tiles * problem.num_kv_heads : 0;
  const auto map_of_tiles = [&](const TensorView& view) {
    return any_queries ? map_of_queries(view, problem, walk.slot_rows) : k_map;
  };
  const auto map_of_rows = [&](const TensorView& view) {
    return any_queries ? map_of_groups(view, problem) : k_map;
  };
  launch(dq_kernel<T, kDim>,
         {.grid = dim3(static_cast<unsigned>(std::min<std::int64_t>(tiles, num_sms(device)))),
          .threads = kUnionThreads,
          .smem_bytes = fixed + static_cast<std::size_t>(walk.stages) * kStageBytes},
         stream, dq, map_of_tiles(args.q), k_map, v_map, map_of_tiles(args.dout));

  launch(items_kernel, {.threads = kItemThreads}, stream, params, problem.num_kv_heads);
  launch(dkv_kernel<T, kDim>,
         {.grid = dim3(static_cast<unsigned>(num_sms(device))),
          .threads = kDkvThreads,
          .smem_bytes = DkvSmem<kDim>::kBytes},
         stream, params, map_of_rows(args.q), k_map, v_map, map_of_rows(args.dout));
  launch(add_pieces_kernel<T, kDim>,
         {.grid = dim3(static_cast<unsigned>(layout.work.max_splits), 2), .threads = kAddThreads},
         stream, params);

  const std::int64_t rows = args.q.shape[0] * problem.num_q_heads;
  launch(redo_q_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(
              std::min<std::int64_t>(ceil_div(rows, kRedoThreads), 8 * num_sms(device)))),
          .threads = kRedoThreads},
         stream, params);
  launch(redo_kv_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(layout.work.num_bins),
                       static_cast<unsigned>(problem.num_kv_heads)),
          .threads = kRedoThreads},
         stream, params);
}

std::optional<std::string> declines(const SparseAttentionBackward& args, const Options&) {
  const Problem& problem = args.problem;
  if (auto reason = declines_device(args, 90, true)) return reason;
  if (auto reason = declines_gradients(args, {DType::bf16})) return reason;
  if (problem.head_dim != 64 && problem.head_dim != 128) {
    return core::concat("head_dim ", problem.head_dim, " is not 64 or 128");
  }
  if (problem.block_size != kBlock) {
    return core::concat("block_size ", problem.block_size, " is not ", kBlock);
  }
  const int group = problem.group_size();
  if (group > 16 || (group & (group - 1)) != 0) {
    return core::concat("group size ", group, " is not 1, 2, 4, 8 or 16");
  }
  if (problem.top_k > 64) return core::concat("top_k ", problem.top_k, " is above 64");
  if (args.softmax_scale < 0.0f || !std::isfinite(args.softmax_scale)) {
    return core::concat("softmax_scale ", args.softmax_scale, " is not positive");
  }
  for (const auto& [name, view] : {std::pair{"q", args.q},
                                   {"k", args.k},
                                   {"v", args.v},
                                   {"dout", args.dout},
                                   {"dq", args.dq},
                                   {"dk", args.dk},
                                   {"dv", args.dv}}) {
    if (auto reason = declines_tma(name, view)) return reason;
  }
  return std::nullopt;
}

void run(const SparseAttentionBackward& args, std::span<std::byte> workspace, Stream stream) {
  (args.problem.head_dim == 128 ? run_dim<128> : run_dim<64>)(args, workspace.data(),
                                                              stream_of(stream));
}

}  // namespace

const ::msa::detail::Implementation<SparseAttentionBackward> kSparseAttentionBackward = {
    .name = "cuda_sm90",
    .dtypes = "bf16",
    .declines = declines,
    .workspace_bytes =
        [](const SparseAttentionBackward& args) { return make_layout(args, nullptr).bytes; },
    .run = run};

}  // namespace msa::cuda::sm90
