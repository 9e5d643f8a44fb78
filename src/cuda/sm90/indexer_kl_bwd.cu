// SPDX-License-Identifier: Apache-2.0
//
// IndexerKlBackward on Hopper: the generic passes, but for the one that multiplies the teacher's
// queries with keys. There a CTA holds the keys and index keys of a KV block; a producer warp
// gathers queries by TMA, and a warpgroup takes 64 of them at a time: 16 products of 4 queries with
// 16 heads each, then one of all 64 with the index keys. Two CTAs share an SM, so that one
// multiplies while the other adds up. See docs/kernels/kl.md.
#include "cuda/common/indexer_kl.cuh"
#include "cuda/common/indexer_kl.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/wgmma.cuh"
#include "cuda/common/support.hpp"
#include "cuda/common/swizzle.cuh"
#include "cuda/common/tensor_map.hpp"
#include "cuda/cuda.hpp"
#include "cuda/sm90/indexer_kl_key_rows.cuh"

namespace msa::cuda::sm90 {
namespace {

using namespace kl;

using key_rows::kDim;
using key_rows::kGroup;
using key_rows::kKeyBytes;
using key_rows::kKeys;
using key_rows::kPanels;
using key_rows::kTokenBytes;
using key_rows::q_descriptor;

constexpr int kQueries = 64;  // at a time
constexpr int kWarps = 4;     // of the consumers; the producer follows
constexpr int kThreads = (kWarps + 1) * 32;
constexpr int kStages = 2;
constexpr std::uint32_t kTileBytes = kWarps * kTokenBytes;
constexpr std::uint32_t kIndexBytes = kQueries * kDim * 2;

// Shared memory.
constexpr std::uint32_t kIndexK = kKeyBytes;
constexpr std::uint32_t kQ = 2 * kKeyBytes;
constexpr std::uint32_t kIndexQ = kQ + kStages * kTileBytes;
constexpr std::uint32_t kKeysFull = kIndexQ + kIndexBytes;
constexpr std::uint32_t kQFull = kKeysFull + 8;
constexpr std::uint32_t kQEmpty = kQFull + kStages * 8;
constexpr std::uint32_t kIndexQFull = kQEmpty + kStages * 8;
constexpr std::uint32_t kIndexQEmpty = kIndexQFull + 8;
constexpr std::uint32_t kSmemBytes = kIndexQEmpty + 8;
static_assert(2 * (kSmemBytes + 1024) <= 228 * 1024);  // two CTAs, each with what CUDA takes

/// Query i of 64 is row i % 4 * 16 + i / 4: warp w has the queries 4 n + w, and n are its rows.
__device__ __forceinline__ int row_of_query(int i) { return i % kWarps * 16 + i / kWarps; }

/// One warp.
__device__ __forceinline__ void produce(const CUtensorMap& q_map, const CUtensorMap& k_map,
                                        const CUtensorMap& index_q_map,
                                        const CUtensorMap& index_k_map, const Piece& piece,
                                        std::uint32_t smem) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) {
    const auto key = static_cast<int>(piece.key_block.sequence.k_begin + piece.first_token);
    ptx::mbarrier_expect_tx(smem + kKeysFull, 2 * kKeyBytes);
    ptx::tma_load_4d(smem, &k_map, 0, key, 0, piece.head, smem + kKeysFull);
    ptx::tma_load_4d(smem + kIndexK, &index_k_map, 0, key, 0, 0, smem + kKeysFull);
  }
  std::uint32_t use = 0;  // tiles so far
  std::uint32_t turn = 0;
  for (std::int64_t first = piece.begin; first < piece.end; first += kQueries, ++turn) {
    const int count = static_cast<int>(min(std::int64_t{kQueries}, piece.end - first));
    int rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = lane + 32 * i;
      rows[i] = query < count ? static_cast<int>(piece.queries[first + query]) : 0;
    }
    const int num_tiles = (count + kWarps - 1) / kWarps;
    for (int n = 0; n < num_tiles; ++n, ++use) {
      const std::uint32_t stage = use % kStages;
      const std::uint32_t full = smem + kQFull + stage * 8;
      ptx::mbarrier_wait(smem + kQEmpty + stage * 8, (use / kStages & 1) ^ 1);
      if (lane == 0) {
        const int tokens = min(kWarps, count - n * kWarps);
        ptx::mbarrier_expect_tx(full, static_cast<std::uint32_t>(tokens) * kTokenBytes);
      }
      __syncwarp();
      const int query = n * kWarps + lane % kWarps;
      if (lane / kWarps == n % 8 && query < count) {
        ptx::tma_load_5d(smem + kQ + stage * kTileBytes +
                             static_cast<std::uint32_t>(lane % kWarps) * kTokenBytes,
                         &q_map, 0, 0, 0, piece.head * (kGroup / 8), n < 8 ? rows[0] : rows[1],
                         full);
      }
      __syncwarp();
      // Behind the first tiles, which need not wait for the last queries' index_q.
      if (n != min(kStages, num_tiles) - 1) continue;
      ptx::mbarrier_wait(smem + kIndexQEmpty, (turn & 1) ^ 1);
      if (lane == 0) {
        ptx::mbarrier_expect_tx(smem + kIndexQFull, static_cast<std::uint32_t>(count) * kDim * 2);
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (lane + 32 * i >= count) continue;
        for (int panel = 0; panel < kPanels; ++panel) {
          const int to = panel * kQueries * 128 + row_of_query(lane + 32 * i) * 128;
          ptx::tma_load_4d(smem + kIndexQ + static_cast<std::uint32_t>(to), &index_q_map, 0,
                           piece.head, panel, rows[i], smem + kIndexQFull);
        }
      }
      __syncwarp();
    }
  }
}

/// s = rows of a tile of q times the keys.
template <class T, class QDescriptor>
__device__ __forceinline__ void multiply(Scores<kKeys>& s, QDescriptor q, std::uint32_t keys) {
  auto& flat = reinterpret_cast<float(&)[kKeys / 2]>(s);
  const std::uint64_t k = ptx::k_major_descriptor(keys);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    ptx::Wgmma<T, kKeys>::template ss<0>(
        flat, q(step), ptx::advance(k, k_major_step(kKeys, static_cast<std::uint32_t>(step))),
        step != 0);
  }
  ptx::wgmma_commit();
}
__device__ __forceinline__ void wait(Scores<kKeys>& s) {
  ptx::wgmma_wait<0>();
  ptx::pin(reinterpret_cast<float(&)[kKeys / 2]>(s));
}

/// Four warps.
template <class T>
__device__ __forceinline__ void consume(const Params& g, const Piece& piece, std::uint32_t smem) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint32_t use = 0;
  std::uint32_t turn = 0;
  ptx::mbarrier_wait(smem + kKeysFull, 0);
  for (std::int64_t first = piece.begin; first < piece.end; first += kQueries, ++turn) {
    const int count = static_cast<int>(min(std::int64_t{kQueries}, piece.end - first));
    const int num_tiles = (count + kWarps - 1) / kWarps;
    // Lane n of a warp has its query n.
    const std::int64_t entry = lane < kQueries / kWarps ? first + lane * kWarps + warp : piece.end;
    const int own_row = entry < piece.end ? static_cast<int>(piece.queries[entry]) : 0;
    Scores<kKeys> s;
    Scores<kKeys> teacher = {};
    const auto add_half = [&]<int kHalf>() {
#pragma unroll 1
      for (int n = 8 * kHalf; n < min(8 * kHalf + 8, num_tiles); ++n, ++use) {
        const std::uint32_t stage = use % kStages;
        ptx::mbarrier_wait(smem + kQFull + stage * 8, use / kStages & 1);
        const std::uint32_t tile = smem + kQ + stage * kTileBytes;
        multiply<T>(s, [&](int step) { return q_descriptor(tile, step); }, smem);
        const std::int64_t row = __shfl_sync(~0u, own_row, n);
        const float lse[2] = {g.lse_of(row, piece.head * kGroup + lane / 4),
                              g.lse_of(row, piece.head * kGroup + lane / 4 + 8)};
        const bool exists[2] = {true, true};
        wait(s);
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(smem + kQEmpty + stage * 8);
        add_heads<kHalf, kKeys>(teacher, s, n, lse, exists, g.teacher_scale);
      }
    };
    add_half.template operator()<0>();
    add_half.template operator()<1>();
    ptx::mbarrier_wait(smem + kIndexQFull, turn & 1);
    multiply<T>(
        s,
        [&](int step) {
          return ptx::advance(ptx::k_major_descriptor(smem + kIndexQ),
                              k_major_step(kQueries, static_cast<std::uint32_t>(step)));
        },
        smem + kIndexK);
    wait(s);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(smem + kIndexQEmpty);
    const Query own = query_at(g, piece, entry);
    const auto query = [&](int n) -> Query {
      return {__shfl_sync(~0u, own.row, n), __shfl_sync(~0u, own.pair, n),
              __shfl_sync(~0u, own.limit, n)};
    };
    finish_query<T, 0, kKeys>(g, query(lane / 4), piece.head, teacher, s);
    finish_query<T, 1, kKeys>(g, query(lane / 4 + 8), piece.head, teacher, s);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    score_gradients_kernel(const __grid_constant__ CUtensorMap q_map,
                           const __grid_constant__ CUtensorMap k_map,
                           const __grid_constant__ CUtensorMap index_q_map,
                           const __grid_constant__ CUtensorMap index_k_map,
                           const __grid_constant__ Params g) {
  extern __shared__ __align__(1024) char smem_generic[];
  const std::uint32_t smem = ptx::smem_address(smem_generic);
  Piece piece;
  const int head = static_cast<int>(blockIdx.y) % g.num_kv_heads;
  if (!find_piece(g, blockIdx.x, head, static_cast<int>(blockIdx.y) / g.num_kv_heads, piece)) {
    return;
  }
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(smem + kKeysFull, 1);
    for (std::uint32_t stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(smem + kQFull + stage * 8, 1);
      ptx::mbarrier_init(smem + kQEmpty + stage * 8, kWarps);
    }
    ptx::mbarrier_init(smem + kIndexQFull, 1);
    ptx::mbarrier_init(smem + kIndexQEmpty, kWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp == kWarps) {
    produce(q_map, k_map, index_q_map, index_k_map, piece, smem);
  } else {
    consume<T>(g, piece, smem);
  }
}

std::uint64_t stride_bytes(const TensorView& view, std::size_t axis) {
  // Of an axis of one the stride means nothing, and TMA wants a multiple of 16.
  return view.shape[axis] > 1 ? static_cast<std::uint64_t>(view.stride[axis]) * 2 : 16;
}

/// Boxes of the 16 heads of a token's group: 64 columns, 8 heads, panels, twice.
CUtensorMap make_q_map(const TensorView& q) {
  const auto heads = static_cast<std::uint64_t>(q.shape[1]);
  const std::uint64_t head = stride_bytes(q, 1);
  const std::uint64_t dims[] = {64, 8, kPanels, heads / 8, static_cast<std::uint64_t>(q.shape[0])};
  const std::uint64_t strides[] = {head, 128, 8 * head, stride_bytes(q, 0)};
  const std::uint32_t box[] = {64, 8, kPanels, kGroup / 8, 1};
  return make_tensor_map(q.data, q.dtype, dims, strides, box);
}

/// Boxes of the tokens of a block of one head: 64 columns, keys, panels.
CUtensorMap make_k_map(const TensorView& k) {
  const std::uint64_t dims[] = {64, static_cast<std::uint64_t>(k.shape[0]), kPanels,
                                static_cast<std::uint64_t>(k.shape[1])};
  const std::uint64_t strides[] = {stride_bytes(k, 0), 128, stride_bytes(k, 1)};
  const std::uint32_t box[] = {64, kKeys, kPanels, 1};
  return make_tensor_map(k.data, k.dtype, dims, strides, box);
}

/// Boxes of a panel of one index query.
CUtensorMap make_index_q_map(const TensorView& q) {
  const std::uint64_t dims[] = {64, static_cast<std::uint64_t>(q.shape[1]), kPanels,
                                static_cast<std::uint64_t>(q.shape[0])};
  const std::uint64_t strides[] = {stride_bytes(q, 1), 128, stride_bytes(q, 0)};
  const std::uint32_t box[] = {64, 1, 1, 1};
  return make_tensor_map(q.data, q.dtype, dims, strides, box);
}

struct Maps {
  CUtensorMap q, k, index_q, index_k;
};

void launch_score_gradients(const void* context, const Params& g, DType dtype,
                            cudaStream_t stream) {
  const Maps& maps = *static_cast<const Maps*>(context);
  launch(
      dtype == DType::f16 ? score_gradients_kernel<__half> : score_gradients_kernel<__nv_bfloat16>,
      {.grid = grid_of(g), .threads = kThreads, .smem_bytes = kSmemBytes}, stream, maps.q, maps.k,
      maps.index_q, maps.index_k, g);
}

void launch_key_rows(const void* context, const Params& g, DType dtype, cudaStream_t stream) {
  const Maps& maps = *static_cast<const Maps*>(context);
  launch(dtype == DType::f16 ? key_rows::score_gradients_kernel<__half>
                             : key_rows::score_gradients_kernel<__nv_bfloat16>,
         {.grid = grid_of(g), .threads = key_rows::kThreads, .smem_bytes = key_rows::kSmemBytes},
         stream, maps.q, maps.k, maps.index_q, maps.index_k, g);
}

std::optional<std::string> declines(const IndexerKlBackward& args, const Options& options) {
  if (auto reason = declines_device(args, 90, true)) return reason;
  const Problem& p = args.problem;
  if (p.head_dim != kDim || p.index_dim != kDim) {
    return core::concat("head_dim ", p.head_dim, " and index_dim ", p.index_dim,
                        " are not both 128");
  }
  if (p.block_size < kKeys) return core::concat("block_size ", p.block_size, " is below 128");
  if (p.group_size() != kGroup) {
    return core::concat("group size ", p.group_size(), " is not 16");
  }
  if (auto reason = declines_tma("q", args.q)) return reason;
  if (auto reason = declines_tma("k", args.k)) return reason;
  if (auto reason = declines_tma("index_q", args.index_q)) return reason;
  if (auto reason = declines_tma("index_k", args.index_k)) return reason;
  return declines_indexer_kl(args, options);
}

void run_with(KlScoreGradients score_gradients, const IndexerKlBackward& args,
              std::span<std::byte> workspace, Stream stream) {
  Maps maps{};
  // Without queries or keys no kernel reads any.
  if (args.q.shape[0] > 0 && args.k.shape[0] > 0) {
    maps = {make_q_map(args.q), make_k_map(args.k), make_index_q_map(args.index_q),
            make_k_map(args.index_k)};
  }
  score_gradients.context = &maps;
  run_indexer_kl(args, kKlWindowBytes, score_gradients, workspace, stream);
}

}  // namespace

const ::msa::detail::Implementation<IndexerKlBackward> kIndexerKlBackward = {
    .name = "cuda_sm90",
    .dtypes = "f16 bf16",
    .declines = declines,
    .workspace_bytes = [](const IndexerKlBackward& args) -> std::size_t {
      return indexer_kl_workspace_bytes(args, kKlWindowBytes);
    },
    .run =
        [](const IndexerKlBackward& args, std::span<std::byte> workspace, Stream stream) {
          run_with({launch_score_gradients, nullptr}, args, workspace, stream);
        }};
const ::msa::detail::Implementation<IndexerKlBackward> kIndexerKlBackwardKeyRows = {
    .name = "cuda_sm90_key_rows",
    .dtypes = "f16 bf16",
    .declines = declines,
    .workspace_bytes = [](const IndexerKlBackward& args) -> std::size_t {
      return indexer_kl_workspace_bytes(args, kKlWindowBytes, KlLosses::of_ctas);
    },
    .run =
        [](const IndexerKlBackward& args, std::span<std::byte> workspace, Stream stream) {
          run_with({launch_key_rows, nullptr, KlLosses::of_ctas}, args, workspace, stream);
        }};

}  // namespace msa::cuda::sm90
