// SPDX-License-Identifier: Apache-2.0
//
// Host side of the union kernel: one file per element type includes this.
#pragma once

#include <algorithm>
#include <array>

#include "cuda/common/launch.hpp"
#include "cuda/common/tensor_map.hpp"
#include "cuda/sm90/sparse_attention_fwd.cuh"
#include "cuda/sm90/sparse_attention_fwd.hpp"

namespace msa::cuda::sm90 {

inline constexpr std::size_t kSmemLimit = 227 * 1024;  // of a CTA of compute capability 9.0

inline std::uint64_t bytes_of(std::int64_t elements, DType dtype) {
  return static_cast<std::uint64_t>(elements) * size_of(dtype);
}

/// k or v as (dim, token, head, page), ragged keys as one page; boxes of 128 bytes a row. Without
/// keys a tensor of one token, which nothing reads.
inline CUtensorMap map_of_keys(const TensorView& view, const SparseAttentionForward& args) {
  const Problem& problem = args.problem;
  const bool paged = args.batch.page_table.given();
  const bool empty = view.shape[0] == 0;
  const auto dim = static_cast<std::uint64_t>(problem.head_dim);
  const auto heads = static_cast<std::uint64_t>(problem.num_kv_heads);
  const std::uint64_t tokens = empty   ? 1
                               : paged ? static_cast<std::uint64_t>(problem.block_size)
                                       : static_cast<std::uint64_t>(view.shape[0]);
  const std::uint64_t pages = paged && !empty ? static_cast<std::uint64_t>(view.shape[0]) : 1;
  const std::uint64_t token_stride = bytes_of(view.stride[paged ? 2 : 0], view.dtype);
  const std::uint64_t head_stride = bytes_of(view.stride[1], view.dtype);
  const std::uint64_t page_stride = paged ? bytes_of(view.stride[0], view.dtype) : 16;
  const auto positive = [](std::uint64_t stride) { return std::max<std::uint64_t>(stride, 16); };
  return make_tensor_map(
      empty ? args.q.data : view.data, view.dtype, std::array{dim, tokens, heads, pages},
      std::array{positive(token_stride), positive(head_stride), positive(page_stride)},
      std::array<std::uint32_t, 4>{static_cast<std::uint32_t>(kPanelBytes / size_of(view.dtype)),
                                   static_cast<std::uint32_t>(problem.block_size), 1, 1});
}

inline CUtensorMap map_of_queries(const SparseAttentionForward& args, int slot_rows) {
  const Problem& problem = args.problem;
  return make_tensor_map(
      args.q.data, args.q.dtype,
      std::array{static_cast<std::uint64_t>(problem.head_dim),
                 static_cast<std::uint64_t>(problem.num_q_heads),
                 static_cast<std::uint64_t>(args.q.shape[0])},
      std::array{std::max<std::uint64_t>(bytes_of(args.q.stride[1], args.q.dtype), 16),
                 std::max<std::uint64_t>(bytes_of(args.q.stride[0], args.q.dtype), 16)},
      std::array<std::uint32_t, 3>{64, static_cast<std::uint32_t>(slot_rows),
                                   static_cast<std::uint32_t>(64 / slot_rows)});
}

template <class T, int kDim, int kBlock, bool kWiden>
void launch_union(const SparseAttentionForward& args, ColdTiles cold, cudaStream_t stream) {
  const Problem& problem = args.problem;
  UnionParams g{};
  g.tensors = tensors_of(args);
  g.slot_rows = std::max(problem.group_size(), 4);
  g.tile_is_cold = cold.flags;
  g.any_cold = cold.any;
  g.num_cold_tiles = ceil_div(args.q.shape[0], kColdTile);
  const int tile_tokens = kTileRows / g.slot_rows;
  g.num_tiles = args.q.shape[0] / tile_tokens + g.tensors.batch.batch_size;
  const int lanes_per_token = 32 / tile_tokens;
  g.ids_per_lane = static_cast<int>(ceil_div(problem.top_k, lanes_per_token));
  constexpr std::size_t kQBytes = std::size_t{kTileRows} * kDim * 2;
  constexpr std::size_t kStageBytes = std::size_t{2} * kBlock * kDim * 2;
  constexpr std::size_t kRawBytes =
      kWiden ? kRawSlots * kRawTileBytes<kBlock> + sizeof(WidenShared) : 0;
  const std::size_t fixed = kQBytes + kRawBytes + sizeof(UnionShared) +
                            static_cast<std::size_t>(g.ids_per_lane) * 32 * sizeof(int);
  g.stages =
      static_cast<int>(std::min<std::size_t>(kMaxStages, (kSmemLimit - fixed) / kStageBytes));
  const std::int64_t items = g.num_tiles * problem.num_kv_heads;
  const std::int64_t grid = std::min<std::int64_t>(items, num_sms(args.q.device.index));
  launch(union_kernel<T, kDim, kBlock, kWiden>,
         {.grid = dim3(static_cast<unsigned>(grid)),
          .threads = kUnionThreads + (kWiden ? kWidenThreads : 0),
          .smem_bytes = fixed + static_cast<std::size_t>(g.stages) * kStageBytes},
         stream, g, map_of_queries(args, g.slot_rows), map_of_keys(args.k, args),
         map_of_keys(args.v, args));
}

/// Starts the union kernel for T.
template <class T, bool kWiden = false>
void launch_for(const SparseAttentionForward& args, ColdTiles cold, cudaStream_t stream) {
  const bool wide = args.problem.block_size == 128;
  if (args.problem.head_dim == 128) {
    wide ? launch_union<T, 128, 128, kWiden>(args, cold, stream)
         : launch_union<T, 128, 64, kWiden>(args, cold, stream);
  } else {
    wide ? launch_union<T, 64, 128, kWiden>(args, cold, stream)
         : launch_union<T, 64, 64, kWiden>(args, cold, stream);
  }
}

}  // namespace msa::cuda::sm90
