// SPDX-License-Identifier: Apache-2.0
//
// IndexerScores: a CTA multiplies 64 rows (neighbouring queries times index heads, which all share
// the one index key head) with tiles of 64 keys of its share of the blocks. A warp owns 16 rows and
// keeps each row's running maximum until the block ends. See docs/kernels/cuda_generic.md.
#include <algorithm>

#include "cuda/common/keys.cuh"
#include "cuda/common/launch.hpp"
#include "cuda/common/support.hpp"
#include "cuda/common/tile.cuh"
#include "cuda/cuda.hpp"
#include "cuda/generic/indexer_scores.hpp"

namespace msa::cuda::generic {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kKeys = 64;
constexpr int kStages = 2;

template <int kDim>
constexpr std::size_t kSmemBytes = sizeof(std::uint16_t) * kPitch<kDim> * (kRows + kStages * kKeys);

struct Params {
  DeviceBatch batch;
  ScoreRange range;
  KeyRows keys;
  const std::byte* q;
  std::int64_t q_token_stride, q_head_stride;  ///< bytes
  Load q_load;
  int num_heads;
  int heads_per_tile;
  int tokens_per_tile;
  int dim;
  float scale;
  std::int64_t blocks_per_split;
};

/// The queries [begin, end) of one sequence and the blocks of this CTA.
template <class T, int kDim>
__device__ __forceinline__ void score_queries(const Params& g, const DeviceSequence& sequence,
                                              std::int64_t begin, std::int64_t end, T* q_tile,
                                              T* k_tiles) {
  constexpr int kChunks = kKeys / 16;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int block_size = g.batch.block_size;
  const int head0 = static_cast<int>(blockIdx.z) * g.heads_per_tile;
  const int num_heads = min(g.heads_per_tile, g.num_heads - head0);
  const int num_rows = static_cast<int>(end - begin) * num_heads;
  const std::int64_t split_begin = blockIdx.y * g.blocks_per_split;
  const std::int64_t split_end = blockIdx.y + 1 == gridDim.y
                                     ? g.range.num_columns
                                     : min(split_begin + g.blocks_per_split, g.range.num_columns);
  const std::int64_t key_begin = split_begin * block_size;
  const std::int64_t key_end = min(split_end * block_size, num_visible_keys(sequence, end - 1));

  std::int64_t limit[2];  // keys that the thread's rows see
  float* to[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * 16 + lane / 4 + 8 * h;
    const std::int64_t query = begin + row / num_heads;
    limit[h] = row < num_rows ? num_visible_keys(sequence, query) : 0;
    to[h] = row < num_rows ? g.range.scores + (head0 + row % num_heads) * g.range.head_stride +
                                 (query - g.range.query_begin) * g.range.query_stride
                           : nullptr;
  }
  const auto load_keys = [&](std::int64_t first, int stage) {
    load_tile<T, kDim, kThreads>(k_tiles + stage * kKeys * kPitch<kDim>, kKeys, g.dim, g.keys.load,
                                 thread, [&](int row) -> const std::byte* {
                                   if (first + row >= key_end) return nullptr;
                                   return token_address(g.batch, sequence, g.keys, 0, first + row);
                                 });
  };

  __syncthreads();  // of the queries before
  if (key_begin < key_end) {
    load_tile<T, kDim, kThreads>(q_tile, kRows, g.dim, g.q_load, thread,
                                 [&](int row) -> const std::byte* {
                                   if (row >= num_rows) return nullptr;
                                   return g.q + (begin + row / num_heads) * g.q_token_stride +
                                          (head0 + row % num_heads) * g.q_head_stride;
                                 });
    load_keys(key_begin, 0);
  }
  ptx::cp_async_commit();
  float best[2] = {-INFINITY, -INFINITY};
  int stage = 0;
  for (std::int64_t first = key_begin; first < key_end; first += kKeys, stage ^= 1) {
    if (first + kKeys < key_end) load_keys(first + kKeys, stage ^ 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    float s[2 * kChunks][4];
    multiply_qk<T, kDim, kChunks>(s, q_tile + warp * 16 * kPitch<kDim>,
                                  k_tiles + stage * kKeys * kPitch<kDim>);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const std::int64_t key = first + 16 * c;
      if (key >= key_end) break;
      const std::int64_t block = key >> g.keys.block_shift;
      if (exists(g.batch, sequence, block)) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {  // fmaxf drops a NaN
            const bool visible = key + 8 * j + lane % 4 * 2 + i % 2 < limit[i / 2];
            if (visible) best[i / 2] = fmaxf(best[i / 2], s[2 * c + j][i]);
          }
        }
      }
      if (((key + 16) & (block_size - 1)) != 0 && key + 16 < key_end) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 1));
        best[h] = fmaxf(best[h], __shfl_xor_sync(~0u, best[h], 2));
        if (lane % 4 == 0 && to[h] != nullptr) to[h][block] = best[h] * g.scale;
        best[h] = -INFINITY;
      }
    }
    __syncthreads();
  }
  if (!g.range.fill) return;
  const std::int64_t first_unseen =
      max(split_begin, (key_end + block_size - 1) >> g.keys.block_shift);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (to[h] == nullptr) continue;
    for (std::int64_t block = first_unseen + lane % 4; block < split_end; block += 4) {
      to[h][block] = -INFINITY;
    }
  }
}

template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    indexer_scores_kernel(const __grid_constant__ Params g) {
  extern __shared__ uint4 smem[];
  T* const q_tile = reinterpret_cast<T*>(smem);
  T* const k_tiles = q_tile + kRows * kPitch<kDim>;
  // Late queries see the most keys: they come first.
  const std::int64_t tile = gridDim.x - 1 - blockIdx.x;
  const std::int64_t first = g.range.query_begin + tile * g.tokens_per_tile;
  for_each_sequence(g.batch, first, min(first + g.tokens_per_tile, g.range.query_end),
                    [&](const DeviceSequence& sequence, std::int64_t begin, std::int64_t end) {
                      score_queries<T, kDim>(g, sequence, begin, end, q_tile, k_tiles);
                    });
}

template <class T>
void launch_scores(const Params& params, dim3 grid, cudaStream_t stream) {
  const auto start = [&]<int kDim>() {
    launch(indexer_scores_kernel<T, kDim>,
           {.grid = grid, .threads = kThreads, .smem_bytes = kSmemBytes<kDim>}, stream, params);
  };
  with_padded_dim(params.dim, start);
}

}  // namespace

std::optional<std::string> declines_index_inputs(const TensorView& index_q,
                                                 const TensorView& index_k) {
  const DType dtype = index_k.dtype;
  if (dtype != DType::bf16 && dtype != DType::f16 && dtype != DType::e4m3) {
    return core::concat("index_k is ", name_of(dtype), ", not bf16, f16 or e4m3");
  }
  if (index_q.dtype != dtype) {
    return core::concat("index_q is ", name_of(index_q.dtype), " and index_k is ", name_of(dtype));
  }
  if (index_q.shape[2] > 256) {
    return core::concat("index_dim ", index_q.shape[2], " is above 256");
  }
  return std::nullopt;
}

void run_indexer_scores(const IndexerScores& args, const ScoreRange& range, cudaStream_t stream) {
  const Problem& p = args.problem;
  const auto size = static_cast<std::int64_t>(size_of(args.index_q.dtype));
  Params params{};
  params.batch = make_device_batch(args);
  params.range = range;
  params.keys = make_key_rows(args.index_k, args.batch, p.block_size);
  params.q = static_cast<const std::byte*>(args.index_q.data);
  params.q_token_stride = args.index_q.stride[0] * size;
  params.q_head_stride = args.index_q.stride[1] * size;
  params.q_load = load_of(args.index_q);
  params.num_heads = p.num_kv_heads;
  params.heads_per_tile = std::min(p.num_kv_heads, kRows);
  params.tokens_per_tile =
      tokens_per_tile(kRows, params.heads_per_tile, params.batch.total_q, params.batch.batch_size);
  params.dim = p.index_dim;
  params.scale = static_cast<float>(scale_or_default(args.index_scale, p.index_dim));

  // A few queries alone would not fill the GPU: their blocks are divided among CTAs.
  const std::int64_t tiles = ceil_div(range.query_end - range.query_begin, params.tokens_per_tile);
  const std::int64_t head_tiles = ceil_div(p.num_kv_heads, params.heads_per_tile);
  const std::int64_t wanted_ctas = 4 * std::max(num_sms(args.index_q.device.index), 1);
  const std::int64_t least_blocks = ceil_div(4 * kKeys, p.block_size);
  const std::int64_t num_blocks =
      std::max<std::int64_t>(ceil_div(params.batch.max_seq_len_k, p.block_size), 1);
  const std::int64_t splits = std::max<std::int64_t>(
      1, std::min({ceil_div(wanted_ctas, std::max<std::int64_t>(tiles * head_tiles, 1)),
                   num_blocks / least_blocks, std::int64_t{65535}}));
  params.blocks_per_split = ceil_div(num_blocks, splits);
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(ceil_div(num_blocks, params.blocks_per_split)),
                  static_cast<unsigned>(head_tiles));
  if (args.index_q.dtype == DType::f16) return launch_scores<__half>(params, grid, stream);
  launch_scores<__nv_bfloat16>(params, grid, stream);
}

const msa::detail::Implementation<IndexerScores> kIndexerScores = {
    .name = "cuda_generic",
    .dtypes = "f16 bf16 e4m3",
    .declines = [](const IndexerScores& args, const Options&) -> std::optional<std::string> {
      if (auto reason = declines_device(args, 80, false)) return reason;
      if (args.block_scores.dtype != DType::f32) {
        return core::concat("block_scores is ", name_of(args.block_scores.dtype), ", not f32");
      }
      return declines_index_inputs(args.index_q, args.index_k);
    },
    .workspace_bytes = [](const IndexerScores&) -> std::size_t { return 0; },
    .run =
        [](const IndexerScores& args, std::span<std::byte>, Stream stream) {
          run_indexer_scores(args,
                             {.query_begin = 0,
                              .query_end = args.index_q.shape[0],
                              .scores = static_cast<float*>(args.block_scores.data),
                              .head_stride = args.block_scores.stride[0],
                              .query_stride = args.block_scores.stride[1],
                              .num_columns = args.block_scores.shape[2],
                              .fill = true},
                             stream_of(stream));
        }};

}  // namespace msa::cuda::generic
