// SPDX-License-Identifier: Apache-2.0
//
// Score gradients of the KL loss with keys as the rows of products. A CTA holds a KV block of 128
// tokens and streams its queries by: two warpgroups have 64 tokens each, whose keys stay in
// registers, and multiply them with 4 queries of 16 heads at a time. A lane then has 4 of a query's
// 16 heads for a token, so that their sum takes 6 shuffles for 4 queries where heads as rows take
// 96, and lies where the student's product of 8 queries has the same (token, query): nothing is
// carried from tile to tile. Two CTAs share an SM. See docs/kernels/kl.md.
#pragma once

#include "cuda/common/indexer_kl.cuh"
#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "cuda/common/ptx/tma.cuh"
#include "cuda/common/ptx/wgmma.cuh"
#include "cuda/common/swizzle.cuh"

namespace msa::cuda::sm90::key_rows {

using namespace kl;

inline constexpr int kDim = 128;
inline constexpr int kKeys = 128;
inline constexpr int kGroup = 16;         // heads
inline constexpr int kQueries = 32;       // at a time, a lane each
inline constexpr int kOctet = 8;          // queries whose dS are finished at a time
inline constexpr int kTileQueries = 4;    // of a product
inline constexpr int kTileHeads = kTileQueries * kGroup;
inline constexpr int kConsumerWarps = 8;  // 16 tokens each; the producer follows
inline constexpr int kConsumers = kConsumerWarps * 32;
inline constexpr int kThreads = kConsumers + 32;
inline constexpr int kPanels = kDim / 64;
inline constexpr std::uint32_t kStages = 4;
inline constexpr std::uint32_t kKeyBytes = kKeys * kDim * 2;
inline constexpr std::uint32_t kTokenBytes = kGroup * kDim * 2;
inline constexpr std::uint32_t kTileBytes = kTileQueries * kTokenBytes;
inline constexpr std::uint32_t kLseBytes = kTileHeads * sizeof(float);

// Shared memory. Keys lie where the last stages will be, until they are in registers.
inline constexpr std::uint32_t kIndexK = 0;
inline constexpr std::uint32_t kQ = kKeyBytes;
inline constexpr std::uint32_t kStagesOfKeys = kKeyBytes / kTileBytes;
inline constexpr std::uint32_t kK = kQ + (kStages - kStagesOfKeys) * kTileBytes;
inline constexpr std::uint32_t kIndexQ = kQ + kStages * kTileBytes;
inline constexpr std::uint32_t kLse = kIndexQ + kQueries * kDim * 2;  // two tiles of each warp
inline constexpr std::uint32_t kLosses = kLse + kConsumerWarps * 2 * kLseBytes;
inline constexpr std::uint32_t kKeysFull = kLosses + kConsumerWarps * sizeof(double);
inline constexpr std::uint32_t kQFull = kKeysFull + 8;
inline constexpr std::uint32_t kQEmpty = kQFull + kStages * 8;
inline constexpr std::uint32_t kIndexQFull = kQEmpty + kStages * 8;
inline constexpr std::uint32_t kIndexQEmpty = kIndexQFull + 8;
inline constexpr std::uint32_t kSmemBytes = kIndexQEmpty + 8;
static_assert(2 * (kSmemBytes + 1024) <= 228 * 1024);  // two CTAs, each with what CUDA takes

/// q: rows in groups of 8, each kPanels panels of 8 x 128 bytes, so that one box is one query.
__device__ __forceinline__ std::uint64_t q_descriptor(std::uint32_t address, int step) {
  const std::uint32_t from = address + static_cast<std::uint32_t>(step / 4 * 1024 + step % 4 * 32);
  const std::uint32_t low = (from & 0x3FFFF) >> 4 | 1u << 16;
  constexpr std::uint32_t kHigh = kPanels * 1024 >> 4 | 1u << 30;
  return std::uint64_t{kHigh} << 32 | low;
}

/// Tile `half` of an octet has its queries of that parity, so that a lane's sums of both are those
/// of two neighbouring queries.
__device__ __forceinline__ int query_in_octet(int half, int in_tile) { return 2 * in_tile + half; }

/// One warp; lane n has query n.
__device__ __forceinline__ void produce(const CUtensorMap& q_map, const CUtensorMap& k_map,
                                        const CUtensorMap& index_q_map,
                                        const CUtensorMap& index_k_map, const Piece& piece,
                                        std::uint32_t smem) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) {
    const auto key = static_cast<int>(piece.key_block.sequence.k_begin + piece.first_token);
    ptx::mbarrier_expect_tx(smem + kKeysFull, 2 * kKeyBytes);
    ptx::tma_load_4d(smem + kK, &k_map, 0, key, 0, piece.head, smem + kKeysFull);
    ptx::tma_load_4d(smem + kIndexK, &index_k_map, 0, key, 0, 0, smem + kKeysFull);
  }
  std::uint32_t use = 0;  // tiles so far
  std::uint32_t turn = 0;
  for (std::int64_t first = piece.begin; first < piece.end; first += kQueries, ++turn) {
    const int count = static_cast<int>(min(std::int64_t{kQueries}, piece.end - first));
    const int row = lane < count ? static_cast<int>(piece.queries[first + lane]) : 0;
    ptx::mbarrier_wait(smem + kIndexQEmpty, (turn & 1) ^ 1);
    if (lane == 0) {
      ptx::mbarrier_expect_tx(smem + kIndexQFull, static_cast<std::uint32_t>(count) * kDim * 2);
    }
    __syncwarp();
    if (lane < count) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const int to = (panel * kQueries + lane) * 128;
        ptx::tma_load_4d(smem + kIndexQ + static_cast<std::uint32_t>(to), &index_q_map, 0,
                         piece.head, panel, row, smem + kIndexQFull);
      }
    }
    const int num_tiles = 2 * ((count + kOctet - 1) / kOctet);
    for (int n = 0; n < num_tiles; ++n, ++use) {
      const std::uint32_t stage = use % kStages;
      const std::uint32_t full = smem + kQFull + stage * 8;
      // Keys are what the last stages have to be rid of first.
      const std::uint32_t fresh = stage < kStages - kStagesOfKeys ? 1 : 0;
      ptx::mbarrier_wait(smem + kQEmpty + stage * 8, (use / kStages & 1) ^ fresh);
      const int in_octet = lane - n / 2 * kOctet;
      const bool loads = in_octet >= 0 && in_octet < kOctet && in_octet % 2 == n % 2 && lane < count;
      const int tokens = __popc(__ballot_sync(~0u, loads));
      if (lane == 0) {
        ptx::mbarrier_expect_tx(full, static_cast<std::uint32_t>(tokens) * kTokenBytes);
      }
      __syncwarp();
      if (loads) {
        ptx::tma_load_5d(smem + kQ + stage * kTileBytes +
                             static_cast<std::uint32_t>(in_octet / 2) * kTokenBytes,
                         &q_map, 0, 0, 0, piece.head * (kGroup / 8), row, full);
      }
    }
  }
}

/// The lse of a tile's 4 queries x 16 heads goes through shared memory that is the warp's own: lane
/// l loads heads 2 (l % 8) and the next of query l / 8, and needs heads 2 t, 2 t + 1, 8 + 2 t and
/// 9 + 2 t of every query, t being l % 4.
__device__ __forceinline__ float2 load_lse(const Params& g, int head, int row) {
  const int first = head * kGroup + static_cast<int>(threadIdx.x) % 8 * 2;
  return {g.lse_of(row, first), g.lse_of(row, first + 1)};
}
__device__ __forceinline__ void share_lse(char* slot, float2 lse) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  reinterpret_cast<float2*>(slot)[lane / 8 * 8 + lane % 4 * 2 + lane % 8 / 4] = lse;
}
__device__ __forceinline__ float4 shared_lse(const char* slot, int query) {
  return reinterpret_cast<const float4*>(slot)[query * 4 + static_cast<int>(threadIdx.x) % 4];
}

/// Sums over heads of 2^(score - lse) for tokens lane / 4 and lane / 4 + 8 of the warp's 16: of
/// query lane % 4 of the tile.
template <class Power>
__device__ __forceinline__ void sum_heads(float (&sums)[2], const float (&s)[kTileHeads / 2],
                                          const char* lse_slot, Power power) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float own[kTileQueries][2];
#pragma unroll
  for (int query = 0; query < kTileQueries; ++query) {
    const float4 lse = shared_lse(lse_slot, query);
    const float* const heads = s + 8 * query;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      own[query][r] = (power(heads[2 * r], lse.x) + power(heads[2 * r + 1], lse.y)) +
                      (power(heads[4 + 2 * r], lse.z) + power(heads[5 + 2 * r], lse.w));
    }
  }
  // Each exchange halves the queries that a lane has sums of.
  const bool upper = (lane & 2) != 0;
  float pair[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sent = upper ? own[i][r] : own[i + 2][r];
      pair[i][r] = (upper ? own[i + 2][r] : own[i][r]) + __shfl_xor_sync(~0u, sent, 2);
    }
  }
  const bool odd = (lane & 1) != 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sent = odd ? pair[0][r] : pair[1][r];
    sums[r] = (odd ? pair[1][r] : pair[0][r]) + __shfl_xor_sync(~0u, sent, 1);
  }
}

__device__ __forceinline__ void sum_heads(float (&sums)[2], const float (&s)[kTileHeads / 2],
                                          const char* lse_slot, bool large, float scale) {
  if (large) {
    // Where all scores are -inf, and lse is, nothing weighs anything.
    sum_heads(sums, s, lse_slot, [scale](float x, float lse) {
      return probability(difference_of(x, scale, lse == -INFINITY ? INFINITY : lse));
    });
  } else {
    sum_heads(sums, s, lse_slot,
              [scale](float x, float lse) { return ptx::ex2(fmaf(x, scale, -lse)); });
  }
}

/// A lane has tokens 2 t, 2 t + 1 (low) and 8 + 2 t, 9 + 2 t (high) of a query, t being lane % 4:
/// its quad's 16 tokens in order, four for each lane.
__device__ __forceinline__ uint2 four_in_order(std::uint32_t low, std::uint32_t high) {
  const bool upper = (threadIdx.x & 2) != 0;
  const bool odd = (threadIdx.x & 1) != 0;
  const std::uint32_t across = __shfl_xor_sync(~0u, upper ? low : high, 2);
  const std::uint32_t a = upper ? across : low;
  const std::uint32_t b = upper ? high : across;
  const std::uint32_t beside = __shfl_xor_sync(~0u, odd ? a : b, 1);
  return odd ? uint2{beside, b} : uint2{a, beside};
}

/// dS of an octet, from sums[half] of both tiles and the student's products: accumulator 2 r + e is
/// token lane / 4 + 8 r of the warp's and query 2 (lane % 4) + e, as sums[e][r] are. Returns the
/// lane's share of the loss, base 2.
template <class T>
__device__ __forceinline__ float finish_octet(const Params& g, const float (&sums)[2][2],
                                              const float* student, const Query& own,
                                              float own_lse, int octet) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int token = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  float loss = 0.0f;
  float ds[2][2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int query = octet * kOctet + query_in_octet(e, lane % 4);
    const int limit = __shfl_sync(~0u, own.limit, query);
    const float lse = __shfl_sync(~0u, own_lse, query);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float p = sums[e][r] * (1.0f / kGroup);
      // log P_idx = score - lse stays finite where P_idx underflows.
      const float log_student = difference_of(student[2 * r + e], g.student_scale, lse);
      const float p_student = lse == -INFINITY ? 0.0f : probability(log_student);
      const bool visible = token + 8 * r < limit;
      ds[r][e] = visible ? (p_student - p) * g.ds_scale : 0.0f;
      if (visible && p != 0.0f) loss += p * (log2f(p) - log_student);
    }
  }
  if (g.dindex_q.data == nullptr) return loss;
  const uint2 four = four_in_order(ptx::transpose_8x8(ptx::pack<T>(ds[0][0], ds[0][1])),
                                   ptx::transpose_8x8(ptx::pack<T>(ds[1][0], ds[1][1])));
  const int query = octet * kOctet + lane / 4;
  const std::int64_t pair = __shfl_sync(~0u, own.pair, query);
  if (__shfl_sync(~0u, own.limit, query) > 0) {
    T* const to = static_cast<T*>(g.ds) + pair * kKeys + token / 16 * 16 + lane % 4 * 4;
    *reinterpret_cast<uint2*>(to) = four;
  }
  return loss;
}

/// The sum over the consumers, in thread 0.
__device__ __forceinline__ double sum_of_cta(double x, char* smem) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  auto* const sums = reinterpret_cast<double*>(smem + kLosses);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  ptx::named_barrier_sync(1, kConsumers);
  double sum = 0.0;
  for (int warp = 0; warp < kConsumerWarps; ++warp) sum += sums[warp];
  return sum;
}

/// Eight warps.
template <class T>
__device__ __forceinline__ void consume(const Params& g, const Piece& piece, char* smem_generic) {
  const std::uint32_t smem = ptx::smem_address(smem_generic);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  char* const lse_slots = smem_generic + kLse + warp * 2 * static_cast<int>(kLseBytes);
  // Up to here a difference is known to within 2^-6, and no power is much above 1.
  constexpr float kLarge = 0x1p16f;

  // Row and lse of queries are asked for ahead of the tile that needs them.
  const auto row_at = [&](std::int64_t entry) {
    return entry < piece.end ? static_cast<int>(piece.queries[entry]) : 0;
  };
  int row = row_at(piece.begin + lane);
  int next_row = row_at(piece.begin + kQueries + lane);
  const auto lse_of_tile = [&](int n) {
    const int query = n / 2 * kOctet + query_in_octet(n % 2, lane / 8);
    return load_lse(g, piece.head, __shfl_sync(~0u, n < 8 ? row : next_row, query % kQueries));
  };
  float2 lse = lse_of_tile(0);

  ptx::mbarrier_wait(smem + kKeysFull, 0);
  std::uint32_t k[kDim / 16][4];
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    ptx::ldmatrix_x4(k[step], smem + kK +
                                  k_major(kKeys, static_cast<std::uint32_t>(16 * warp + lane % 16),
                                          static_cast<std::uint32_t>(step * 32 + lane / 16 * 16)));
  }
  __syncwarp();
  if (lane < static_cast<int>(kStagesOfKeys)) {
    const auto stage = kStages - kStagesOfKeys + static_cast<std::uint32_t>(lane);
    ptx::mbarrier_arrive(smem + kQEmpty + stage * 8);
  }

  float s[kTileHeads / 2];
  std::uint32_t use = 0;
  std::uint32_t turn = 0;
  const auto start_tile = [&] {
    const std::uint32_t stage = use % kStages;
    ptx::mbarrier_wait(smem + kQFull + stage * 8, use / kStages & 1);
    const std::uint32_t tile = smem + kQ + stage * kTileBytes;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      ptx::Wgmma<T, kTileHeads>::template rs<0>(s, k[step], q_descriptor(tile, step), step != 0);
    }
    ptx::wgmma_commit();
  };
  double loss = 0.0;
#pragma unroll 1
  for (std::int64_t first = piece.begin; first < piece.end; first += kQueries, ++turn) {
    const int count = static_cast<int>(min(std::int64_t{kQueries}, piece.end - first));
    float student[kQueries / 2];
    ptx::mbarrier_wait(smem + kIndexQFull, turn & 1);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const auto number = static_cast<std::uint32_t>(step);
      const auto rows = static_cast<std::uint32_t>(warp / 4 * 64 * 128);
      ptx::Wgmma<T, kQueries>::template ss<0>(
          student,
          ptx::advance(ptx::k_major_descriptor(smem + kIndexK + rows), k_major_step(kKeys, number)),
          ptx::advance(ptx::k_major_descriptor(smem + kIndexQ), k_major_step(kQueries, number)),
          step != 0);
    }
    ptx::wgmma_commit();
    start_tile();
    const Query own = query_at(g, piece, first + lane);
    const float own_lse =
        own.limit > 0 ? g.student_lse[own.row * g.num_kv_heads + piece.head] : 0.0f;
    ptx::wgmma_wait<1>();
    ptx::pin(student);
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(smem + kIndexQEmpty);
#pragma unroll
    for (int octet = 0; octet < kQueries / kOctet; ++octet) {
      if (octet * kOctet >= count) break;
      float sums[2][2];
#pragma unroll
      for (int half = 0; half < 2; ++half, ++use) {
        if (octet + half > 0) start_tile();
        const bool large = __any_sync(~0u, fabsf(lse.x) > kLarge || fabsf(lse.y) > kLarge);
        char* const slot = lse_slots + half * static_cast<int>(kLseBytes);
        share_lse(slot, lse);
        __syncwarp();
        lse = lse_of_tile(2 * octet + half + 1);
        ptx::wgmma_wait<0>();
        ptx::pin(s);
        if (lane == 0) ptx::mbarrier_arrive(smem + kQEmpty + use % kStages * 8);
        sum_heads(sums[half], s, slot, large, g.teacher_scale);
      }
      loss += static_cast<double>(
          finish_octet<T>(g, sums, student + 4 * octet, own, own_lse, octet));
    }
    row = next_row;
    next_row = row_at(first + 2 * kQueries + lane);
  }
  constexpr double kLn2 = 0.69314718055994530942;
  const double sum = sum_of_cta(loss * kLn2, smem_generic);
  // This CTA's own number, to which it adds window by window.
  if (threadIdx.x == 0) g.losses[blockIdx.y * gridDim.x + blockIdx.x] += sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
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
      ptx::mbarrier_init(smem + kQEmpty + stage * 8, kConsumerWarps);
    }
    ptx::mbarrier_init(smem + kIndexQFull, 1);
    ptx::mbarrier_init(smem + kIndexQEmpty, kConsumerWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (__shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0) == kConsumerWarps) {
    produce(q_map, k_map, index_q_map, index_k_map, piece, smem);
  } else {
    consume<T>(g, piece, smem_generic);
  }
}

}  // namespace msa::cuda::sm90::key_rows
