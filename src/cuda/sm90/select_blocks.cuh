// SPDX-License-Identifier: Apache-2.0
//
// The indexer with its selection: block maxima go from the accumulators into lists of the best
// blocks in registers, and nothing of size queries x blocks is written. kPlaces is the length of a
// row's list, the largest top_k.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <bit>

#include "core/workspace.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/sm90/index_tile.cuh"
#include "cuda/sm90/top_list.cuh"

namespace msa::cuda::sm90 {

/// Lists of 16 leave registers for 256 rows a CTA; longer ones do not.
template <int kPlaces>
inline constexpr int kConsumersOf = kPlaces == 16 ? 4 : 2;
template <int kPlaces>
inline constexpr int kRowsOf = kConsumersOf<kPlaces> * 64;

/// A place of a list that goes through memory: the lists of a row's chunks, best place first.
struct Entry {
  float score;
  int id;
};

template <int kPlaces>
struct SelectParams {
  std::int32_t* block_ids;
  std::int64_t head_stride;
  std::int64_t query_stride;
  int log2_block_size;
  int top_k;
  int num_local_blocks;
  int num_init_blocks;
  int num_heads;
  int log2_heads;
  Entry* partial;  ///< [chunk][query][head][kPlaces], null where there is one chunk
  std::int64_t num_rows;

  __device__ std::int32_t* ids_of(std::int64_t query, int head) const {
    return block_ids + head * head_stride + query * query_stride;
  }
  __device__ Entry* partial_of(int chunk, std::int64_t query, int head) const {
    return partial + (chunk * num_rows + (query << log2_heads) + head) * kPlaces;
  }
  __device__ RowRule rule_at(int position) const {
    return RowRule(top_k, num_local_blocks, num_init_blocks,
                   position < 0 ? -1 : position >> log2_block_size);
  }
};

/// The best blocks in registers.
template <int kPlaces>
struct SelectBlocks {
  using Params = SelectParams<kPlaces>;
  static constexpr int kEntries = kPlaces / 2;

  const Params& params;
  IndexRow row;
  int first;  ///< candidates
  int last;
  TopList<kEntries> list;

  __device__ SelectBlocks(const Params& params, const IndexTile&, const IndexRow& row)
      : params(params), row(row) {
    const RowRule rule = params.rule_at(row.position);
    first = rule.first();
    last = rule.last();
    list.start(rule);
  }

  static __device__ bool finishes_without_keys(const Params& params) {
    return params.partial == nullptr;
  }

  __device__ void take(int block, float score) {
    const bool better = score >= list.score[0] && block >= first && block <= last;
    if (!__any_sync(~0u, better)) return;
    // Blocks come with falling ids, so that the new one wins every tie.
    list.insert(better ? score : __int_as_float(0x7fc00000), block,
                [](float s, int, float x, int) { return s <= x; });
  }

  __device__ void finish() {
    if (params.partial == nullptr) {
      list.store_ids(params.ids_of(row.query, row.head), params.top_k, row.live);
    } else if (row.live) {
      Entry* const to = params.partial_of(static_cast<int>(blockIdx.y), row.query, row.head) +
                        (list.upper() ? 0 : kEntries);
#pragma unroll
      for (int i = 0; i < kEntries; ++i) {
        to[i] = {.score = list.score[kEntries - 1 - i], .id = list.id[kEntries - 1 - i]};
      }
    }
  }
};

template <class Element, int kBlockSize, int kPlaces>
__global__ void __launch_bounds__(kIndexThreads<kConsumersOf<kPlaces>>, 1)
    indexer_kernel(const __grid_constant__ IndexTileParams params,
                   const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ SelectParams<kPlaces> select) {
  score_index_tile<Element, kBlockSize, kConsumersOf<kPlaces>, SelectBlocks<kPlaces>>(
      params, q_map, k_map, select);
}

inline constexpr int kMergeThreads = 128;
inline constexpr int kMergeRows = kMergeThreads / 2;  // of a CTA: two lanes a row

/// The best of the lists of a row's chunks.
template <int kPlaces>
__global__ void __launch_bounds__(kMergeThreads)
    merge_chunks_kernel(const __grid_constant__ DeviceBatch batch,
                        const __grid_constant__ SelectParams<kPlaces> select, int chunks,
                        int chunk_tiles) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kMergeRows +
                             threadIdx.x / 32 * 16 + lane / 4 + lane % 2 * 8;
  const std::int64_t row = min(index, select.num_rows - 1);
  const std::int64_t query = row >> select.log2_heads;
  const int head = static_cast<int>(row) & ((1 << select.log2_heads) - 1);
  const bool live = index < select.num_rows && head < select.num_heads;
  const DeviceSequence sequence = sequence_of_query(batch, query);
  const int position =
      static_cast<int>(max(sequence.position(query - sequence.q_begin), std::int64_t{-1}));
  // Chunks beyond hold nothing that the row sees, and may not have been written.
  const int row_chunks =
      !live || position < 0 ? 0 : min(position / kIndexTileKeys / chunk_tiles + 1, chunks);

  TopList<kPlaces / 2> list;
  list.start(select.rule_at(position));
  const auto worse = [](float s, int id, float x, int x_id) {
    return s < x || (s == x && id > x_id);
  };
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    if (!__any_sync(~0u, chunk < row_chunks)) continue;
    const Entry* const from = select.partial_of(chunk, query, head);
    constexpr int kBatch = 8;  // loads in flight
#pragma unroll 1
    for (int place = 0; place < kPlaces; place += kBatch) {
      Entry entries[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        entries[i] = {.score = __int_as_float(0x7fc00000), .id = kNoBlock};
        if (chunk < row_chunks) entries[i] = from[place + i];
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        // NaN marks forced blocks, which the list has already, and rows without this chunk.
        const bool better = worse(list.score[0], list.id[0], entries[i].score, entries[i].id);
        if (__any_sync(~0u, better)) {
          list.insert(better ? entries[i].score : __int_as_float(0x7fc00000), entries[i].id, worse);
        }
      }
    }
  }
  list.store_ids(select.ids_of(query, head), select.top_k, live);
}

template <int kPlaces>
Entry* partial_of(const Indexer& args, const IndexGrid& grid, core::WorkspaceLayout& layout) {
  if (grid.chunks == 1) return nullptr;
  return layout.take<Entry>(
      (grid.chunks * args.index_q.shape[0] << log2_index_heads(args.problem)) * kPlaces);
}

/// Each list is written once and read once.
template <int kPlaces>
IndexGrid grid_of(const Indexer& args) {
  return index_grid(args, kRowsOf<kPlaces>, 2.0 * kPlaces * sizeof(Entry));
}

template <int kPlaces>
std::size_t select_workspace_bytes(const Indexer& args) {
  core::WorkspaceLayout layout;
  partial_of<kPlaces>(args, grid_of<kPlaces>(args), layout);
  return layout.bytes();
}

template <class Element, int kPlaces>
void run_select(const Indexer& args, std::span<std::byte> workspace, Stream stream) {
  const Problem& p = args.problem;
  const IndexGrid grid = grid_of<kPlaces>(args);
  const IndexTileParams params = make_index_params(args, 0.0f, grid);
  core::WorkspaceLayout layout(workspace.data());
  const SelectParams<kPlaces> select{
      .block_ids = static_cast<std::int32_t*>(args.block_ids.data),
      .head_stride = args.block_ids.stride[0],
      .query_stride = args.block_ids.stride[1],
      .log2_block_size = std::countr_zero(static_cast<unsigned>(p.block_size)),
      .top_k = p.top_k,
      .num_local_blocks = p.num_local_blocks,
      .num_init_blocks = p.num_init_blocks,
      .num_heads = p.num_kv_heads,
      .log2_heads = params.log2_heads,
      .partial = partial_of<kPlaces>(args, grid, layout),
      .num_rows = args.index_q.shape[0] << params.log2_heads};
  const auto kernel = p.block_size == 64 ? indexer_kernel<Element, 64, kPlaces>
                                         : indexer_kernel<Element, 128, kPlaces>;
  launch(kernel, index_launch<Element, kConsumersOf<kPlaces>>(grid), stream_of(stream), params,
         index_q_map(args.index_q, p, kRowsOf<kPlaces>), index_k_map(args), select);
  if (grid.chunks > 1) {
    const LaunchConfig merge{
        .grid = dim3(static_cast<unsigned>(ceil_div(select.num_rows, kMergeRows))),
        .threads = kMergeThreads};
    launch(merge_chunks_kernel<kPlaces>, merge, stream_of(stream), params.batch, select,
           grid.chunks, grid.chunk_tiles);
  }
}

/// By dtype.
template <int kPlaces>
void run_select(const Indexer& args, std::span<std::byte> workspace, Stream stream) {
  switch (args.index_q.dtype) {
    case DType::bf16:
      return run_select<__nv_bfloat16, kPlaces>(args, workspace, stream);
    case DType::f16:
      return run_select<__half, kPlaces>(args, workspace, stream);
    default:
      return run_select<__nv_fp8_e4m3, kPlaces>(args, workspace, stream);
  }
}

}  // namespace msa::cuda::sm90
