// SPDX-License-Identifier: Apache-2.0
//
// Host side of the union kernel: one file per element type includes this.
#pragma once

#include <algorithm>

#include "cuda/common/launch.hpp"
#include "cuda/sm90/sparse_attention_fwd.cuh"
#include "cuda/sm90/sparse_attention_fwd.hpp"
#include "cuda/sm90/tensor_maps.hpp"

namespace msa::cuda::sm90 {

inline constexpr std::size_t kSmemLimit = 227 * 1024;  // of a CTA of compute capability 9.0

template <class T, int kDim, int kBlock, bool kWiden>
void launch_union(const SparseAttentionForward& args, ColdTiles cold, cudaStream_t stream) {
  const Problem& problem = args.problem;
  const bool paged = args.batch.page_table.given();
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
         stream, g, map_of_queries(args.q, problem, g.slot_rows),
         map_of_keys(args.k, problem, paged, args.q.data),
         map_of_keys(args.v, problem, paged, args.q.data));
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
