// SPDX-License-Identifier: Apache-2.0
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda/common/launch.hpp"
#include "cuda/cuda.hpp"
#include "cuda/sm90/index_tile.cuh"

namespace msa::cuda::sm90 {
namespace {

constexpr int kConsumers = 4;
constexpr int kRows = kConsumers * 64;

/// Block maxima to global memory.
struct StoreScores {
  struct Params {
    float* scores;
    std::int64_t head_stride;
    std::int64_t query_stride;
    int num_blocks;  ///< columns
    int blocks_per_tile;
    int chunk_tiles;
  };

  const Params& params;
  const IndexTile& tile;
  float* row;  ///< null: nothing to store
  bool live;

  __device__ StoreScores(const Params& params, const IndexTile& tile, const IndexRow& row)
      : params(params),
        tile(tile),
        row(params.scores + row.head * params.head_stride + row.query * params.query_stride),
        live(row.live) {}

  static __device__ bool finishes_without_keys(const Params&) { return true; }

  __device__ void take(int block, float score) {
    if (live && threadIdx.x % 4 < 2 && block < params.num_blocks) row[block] = score;
  }

  /// The rest of the chunk's columns, those beyond all chunks in the last one.
  __device__ void finish() {
    const int chunk = static_cast<int>(blockIdx.y);
    const int first = max(tile.end, chunk * params.chunk_tiles);
    const std::int64_t next = std::int64_t{chunk + 1} * params.chunk_tiles;
    const bool last = chunk + 1 == static_cast<int>(gridDim.y);
    const std::int64_t begin = std::int64_t{first} * params.blocks_per_tile;
    const std::int64_t end =
        last ? params.num_blocks
             : min(next * params.blocks_per_tile, static_cast<std::int64_t>(params.num_blocks));
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int owner = 0; owner < 32; ++owner) {
      if ((owner & 2) != 0) continue;  // the same rows as lanes 0 and 1 of the quad
      float* const to = reinterpret_cast<float*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(row), owner));
      if (!__shfl_sync(~0u, live, owner)) continue;
      for (std::int64_t block = begin + lane; block < end; block += 32) to[block] = -INFINITY;
    }
  }
};

template <class Element, int kBlockSize>
__global__ void __launch_bounds__(kIndexThreads<kConsumers>, 1)
    indexer_scores_kernel(const __grid_constant__ IndexTileParams params,
                          const __grid_constant__ CUtensorMap q_map,
                          const __grid_constant__ CUtensorMap k_map,
                          const __grid_constant__ StoreScores::Params sink) {
  score_index_tile<Element, kBlockSize, kConsumers, StoreScores>(params, q_map, k_map, sink);
}

template <class Element>
void run(const IndexerScores& args, Stream stream) {
  const Problem& p = args.problem;
  const IndexGrid grid = index_grid(args, kRows, 0.0);
  const IndexTileParams params = make_index_params(args, args.index_scale, grid);
  const StoreScores::Params sink{.scores = static_cast<float*>(args.block_scores.data),
                                 .head_stride = args.block_scores.stride[0],
                                 .query_stride = args.block_scores.stride[1],
                                 .num_blocks = static_cast<int>(args.block_scores.shape[2]),
                                 .blocks_per_tile = kIndexTileKeys / p.block_size,
                                 .chunk_tiles = grid.chunk_tiles};
  const auto kernel =
      p.block_size == 64 ? indexer_scores_kernel<Element, 64> : indexer_scores_kernel<Element, 128>;
  launch(kernel, index_launch<Element, kConsumers>(grid), stream_of(stream), params,
         index_q_map(args.index_q, p, kRows), index_k_map(args), sink);
}

}  // namespace

const msa::detail::Implementation<IndexerScores> kIndexerScores = {
    .name = "cuda_sm90",
    .dtypes = "f16 bf16 e4m3",
    .declines = [](const IndexerScores& args, const Options&) -> std::optional<std::string> {
      if (auto reason = declines_index(args)) return reason;
      if (args.block_scores.dtype != DType::f32) {
        return core::concat("block_scores is ", name_of(args.block_scores.dtype), ", not f32");
      }
      if (args.block_scores.shape[2] > INT32_MAX / 2) {
        return core::concat("block_scores has ", args.block_scores.shape[2], " block columns");
      }
      return std::nullopt;
    },
    .workspace_bytes = [](const IndexerScores&) -> std::size_t { return 0; },
    .run =
        [](const IndexerScores& args, std::span<std::byte>, Stream stream) {
          if (args.index_q.shape[0] == 0) return;
          switch (args.index_q.dtype) {
            case DType::bf16:
              return run<__nv_bfloat16>(args, stream);
            case DType::f16:
              return run<__half>(args, stream);
            default:
              return run<__nv_fp8_e4m3>(args, stream);
          }
        }};

}  // namespace msa::cuda::sm90
