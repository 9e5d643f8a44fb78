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
inline constexpr int kGroup = 16;       // heads
inline constexpr int kQueries = 32;     // at a time, a lane each
inline constexpr int kOctet = 8;        // queries whose dS are finished at a time
inline constexpr int kStudents = 16;    // queries of the student's product
inline constexpr int kTileQueries = 4;  // of the teacher's
inline constexpr int kTileHeads = kTileQueries * kGroup;
inline constexpr int kWarps = 8;  // 16 tokens each; the first one also starts the loads
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kTilesAhead = 2;  // of the one that is multiplied
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
inline constexpr std::uint32_t kLse = kIndexQ + kQueries * kDim * 2;     // two tiles of each warp
inline constexpr std::uint32_t kLimits = kLse + kWarps * 2 * kLseBytes;  // of each warp
inline constexpr std::uint32_t kPairs = kLimits + kWarps * kQueries * 8;
inline constexpr std::uint32_t kLosses = kPairs + kWarps * kQueries * 4;
inline constexpr std::uint32_t kKeysFull = kLosses + kWarps * sizeof(double);
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

/// The loads of a CTA, which one warp starts. Its lane n has row n of the 32 queries at hand, less
/// than 0 for none.
struct Loads {
  const CUtensorMap& q_map;
  const CUtensorMap& index_q_map;
  int head;
  std::uint32_t smem;

  __device__ __forceinline__ void keys(const CUtensorMap& k_map, const CUtensorMap& index_k_map,
                                       std::int64_t first_key) const {
    if (threadIdx.x != 0) return;
    const auto key = static_cast<int>(first_key);
    ptx::mbarrier_expect_tx(smem + kKeysFull, 2 * kKeyBytes);
    ptx::tma_load_4d(smem + kK, &k_map, 0, key, 0, head, smem + kKeysFull);
    ptx::tma_load_4d(smem + kIndexK, &index_k_map, 0, key, 0, 0, smem + kKeysFull);
  }

  /// Index queries of turn `turn`.
  __device__ __forceinline__ void index_queries(std::uint32_t turn, int row) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    ptx::mbarrier_wait(smem + kIndexQEmpty, (turn & 1) ^ 1);
    const int count = __popc(__ballot_sync(~0u, row >= 0));
    if (lane == 0) {
      ptx::mbarrier_expect_tx(smem + kIndexQFull, static_cast<std::uint32_t>(count) * kDim * 2);
    }
    __syncwarp();
    if (row < 0) return;
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const int to = (panel * kQueries + lane) * 128;
      ptx::tma_load_4d(smem + kIndexQ + static_cast<std::uint32_t>(to), &index_q_map, 0, head,
                       panel, row, smem + kIndexQFull);
    }
  }

  /// Tile n of the 32 queries, the CTA's tile number `use`. Those that do not exist stay what they
  /// were: nothing of theirs is used.
  __device__ __forceinline__ void tile(std::uint32_t use, int n, int row) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const std::uint32_t stage = use % kStages;
    const std::uint32_t full = smem + kQFull + stage * 8;
    // Keys are what the last stages have to be rid of first.
    const std::uint32_t fresh = stage < kStages - kStagesOfKeys ? 1 : 0;
    ptx::mbarrier_wait(smem + kQEmpty + stage * 8, (use / kStages & 1) ^ fresh);
    const bool loads = lane / kOctet == n / 2 && lane % 2 == n % 2 && row >= 0;
    const int tokens = __popc(__ballot_sync(~0u, loads));
    if (lane == 0) {
      ptx::mbarrier_expect_tx(full, static_cast<std::uint32_t>(tokens) * kTokenBytes);
    }
    __syncwarp();
    if (loads) {
      ptx::tma_load_5d(smem + kQ + stage * kTileBytes +
                           static_cast<std::uint32_t>(lane % kOctet / 2) * kTokenBytes,
                       &q_map, 0, 0, 0, head * (kGroup / 8), row, full);
    }
  }
};

/// The lse of a tile's 4 queries x 16 heads goes through shared memory that is the warp's own: lane
/// l loads heads 2 (l % 8) and the next of query l / 8, and needs heads 2 t, 2 t + 1, 8 + 2 t and
/// 9 + 2 t of every query, t being l % 4.
struct LseRows {
  const float* data;  ///< row 0 of the lane's first head
  std::int64_t token_stride;
  std::int64_t head_stride;
  float scale;  ///< to base 2

  __device__ __forceinline__ LseRows(const Params& g, int head) {
    const bool given = g.given_lse != nullptr;
    token_stride = given ? g.lse_token_stride : g.num_kv_heads * kGroup;
    head_stride = given ? g.lse_head_stride : 1;
    scale = given ? 1.44269504088896341f : 1.0f;
    data = (given ? g.given_lse : g.teacher_lse) +
           (head * kGroup + static_cast<int>(threadIdx.x) % 8 * 2) * head_stride;
  }
  __device__ __forceinline__ float2 operator[](int row) const {
    const float* const from = data + row * token_stride;
    return {from[0], from[head_stride]};
  }
};
__device__ __forceinline__ void put_lse(char* slot, float2 lse) {
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

/// What finish_octet asks of a query, in shared memory that is the warp's own.
struct Limit {
  int tokens;  ///< of the block that the query sees; 0: no such query
  float lse;   ///< of the student, base 2
};

/// Lane n tells of query n: `row`, or less than 0 for none.
__device__ __forceinline__ void share_query(const Params& g, int head, int block,
                                            std::int64_t first_slot, int first_limit,
                                            int num_tokens, int row, Limit* limits, int* pairs) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int pair = -1;
  Limit limit{0, 0.0f};
  if (row >= 0) {
    std::int64_t slot = first_slot;
    bool found = true;
    if (g.block_ids != nullptr) {
      const std::int32_t* const ids =
          g.block_ids + head * g.ids_head_stride + row * g.ids_token_stride;
      int at = g.top_k;
      // To the end in any case, so that several loads are under way.
#pragma unroll 4
      for (int i = 0; i < g.top_k; ++i) {
        if (ids[i] == block) at = min(at, i);
      }
      found = at < g.top_k;
      slot += std::int64_t{at} * g.pieces_per_block;
    }
    const int tokens = found ? max(0, min(row + first_limit, num_tokens)) : 0;
    if (tokens > 0) {
      limit = {tokens, g.student_lse[std::int64_t{row} * g.num_kv_heads + head]};
      pair = static_cast<int>(g.pair(row, head, slot));
    }
  }
  limits[lane] = limit;
  pairs[lane] = pair;
}

/// dS of an octet, from sums[half] of both tiles and the student's products: accumulator 2 r + e is
/// token lane / 4 + 8 r of the warp's and query 2 (lane % 4) + e, as sums[e][r] are. Returns the
/// lane's share of the loss, base 2.
template <class T>
__device__ __forceinline__ float finish_octet(const Params& g, const float (&sums)[2][2],
                                              const float* student, const Limit* limits,
                                              const int* pairs) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int token = static_cast<int>(threadIdx.x) / 32 * 16 + lane / 4;
  float loss = 0.0f;
  float ds[2][2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const Limit limit = limits[query_in_octet(e, lane % 4)];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float p = sums[e][r] * (1.0f / kGroup);
      // log P_idx = score - lse stays finite where P_idx underflows.
      const float log_student = difference_of(student[2 * r + e], g.student_scale, limit.lse);
      const float p_student = limit.lse == -INFINITY ? 0.0f : probability(log_student);
      const bool visible = token + 8 * r < limit.tokens;
      ds[r][e] = visible ? (p_student - p) * g.ds_scale : 0.0f;
      if (visible && p != 0.0f) loss += p * (log2f(p) - log_student);
    }
  }
  if (g.dindex_q.data == nullptr) return loss;
  const uint2 four = four_in_order(ptx::transpose_8x8(ptx::pack<T>(ds[0][0], ds[0][1])),
                                   ptx::transpose_8x8(ptx::pack<T>(ds[1][0], ds[1][1])));
  const int pair = pairs[lane / 4];
  if (pair >= 0) {
    T* const to =
        static_cast<T*>(g.ds) + std::int64_t{pair} * kKeys + token / 16 * 16 + lane % 4 * 4;
    *reinterpret_cast<uint2*>(to) = four;
  }
  return loss;
}

/// The sum over the threads of the CTA.
__device__ __forceinline__ double sum_of_cta(double x, char* smem) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  auto* const sums = reinterpret_cast<double*>(smem + kLosses);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp];
  return sum;
}

template <class T>
__device__ __forceinline__ void walk(const Params& g, const Piece& piece, const Loads& loads,
                                     char* smem_generic) {
  const std::uint32_t smem = ptx::smem_address(smem_generic);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  char* const lse_slots = smem_generic + kLse + warp * 2 * static_cast<int>(kLseBytes);
  // Up to here a difference is known to within 2^-6, and no power is much above 1.
  constexpr float kLarge = 0x1p16f;

  auto* const limits = reinterpret_cast<Limit*>(smem_generic + kLimits) + warp * kQueries;
  auto* const pairs = reinterpret_cast<int*>(smem_generic + kPairs) + warp * kQueries;

  // Of the piece, what is needed again and again, in few registers.
  const QueryList& queries = piece.queries;
  const int end = static_cast<int>(piece.end);
  const int block = static_cast<int>(piece.key_block.block);
  const int num_tokens = piece.num_tokens;
  const int first_limit =  // of row 0, were it of the sequence
      static_cast<int>(piece.key_block.sequence.position(-piece.key_block.sequence.q_begin) + 1 -
                       piece.first_token);

  // Row and lse of queries are asked for ahead of the tile that needs them.
  const auto row_at = [&](int entry) {
    return entry < end ? static_cast<int>(queries[entry]) : -1;
  };
  int first = static_cast<int>(piece.begin);
  int row = row_at(first + lane);
  int next_row = row_at(first + kQueries + lane);
  const LseRows lse_rows(g, piece.head);
  const auto lse_of_tile = [&](int n) {
    const int query = n / 2 * kOctet + query_in_octet(n % 2, lane / 8);
    return lse_rows[max(0, __shfl_sync(~0u, n < 8 ? row : next_row, query % kQueries))];
  };
  float2 next_lse = lse_of_tile(0);
  if (warp == 0) {
    loads.index_queries(0, row);
    for (int n = 0; n < kTilesAhead; ++n) loads.tile(static_cast<std::uint32_t>(n), n, row);
  }

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
  for (; first < end; first += kQueries, ++turn) {
    const int count = min(kQueries, end - first);
    ptx::mbarrier_wait(smem + kIndexQFull, turn & 1);
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kStudents) {
      float student[kStudents / 2];
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        const auto number = static_cast<std::uint32_t>(step);
        const auto keys = static_cast<std::uint32_t>(warp / 4 * 64 * 128);
        const auto rows = static_cast<std::uint32_t>(begin * 128);
        ptx::Wgmma<T, kStudents>::template ss<0>(
            student,
            ptx::advance(ptx::k_major_descriptor(smem + kIndexK + keys),
                         k_major_step(kKeys, number)),
            ptx::advance(ptx::k_major_descriptor(smem + kIndexQ + rows),
                         k_major_step(kQueries, number)),
            step != 0);
      }
      ptx::wgmma_commit();
      if (begin == 0) {
        share_query(g, piece.head, block, piece.first_slot, first_limit, num_tokens, row, limits,
                    pairs);
      }
      ptx::wgmma_wait<0>();
      ptx::pin(student);
      __syncwarp();
      if (lane == 0 && begin + kStudents >= count) ptx::mbarrier_arrive(smem + kIndexQEmpty);
#pragma unroll
      for (int octet = 0; octet < kStudents / kOctet; ++octet) {
        const int query = begin + octet * kOctet;
        if (query >= count) break;
        float sums[2][2];
#pragma unroll
        for (int half = 0; half < 2; ++half, ++use) {
          start_tile();
          const int n = query / kOctet * 2 + half;
          if (warp == 0) {
            // Of the next turn, behind its index queries.
            const bool beyond = n + kTilesAhead >= kQueries / kTileQueries;
            if (beyond && half == 0 && first + kQueries < end) {
              loads.index_queries(turn + 1, next_row);
            }
            const int next = (n + kTilesAhead) % (kQueries / kTileQueries);
            if ((beyond ? first + kQueries : first) + next / 2 * kOctet < end) {
              loads.tile(use + kTilesAhead, next, beyond ? next_row : row);
            }
          }
          const float2 lse = {next_lse.x * lse_rows.scale, next_lse.y * lse_rows.scale};
          const bool large = __any_sync(~0u, fabsf(lse.x) > kLarge || fabsf(lse.y) > kLarge);
          char* const slot = lse_slots + half * static_cast<int>(kLseBytes);
          put_lse(slot, lse);
          __syncwarp();
          next_lse = lse_of_tile(n + 1);
          ptx::wgmma_wait<0>();
          ptx::pin(s);
          __syncwarp();
          if (lane == 0) ptx::mbarrier_arrive(smem + kQEmpty + use % kStages * 8);
          sum_heads(sums[half], s, slot, large, g.teacher_scale);
        }
        loss += static_cast<double>(
            finish_octet<T>(g, sums, student + 4 * octet, limits + query, pairs + query));
      }
    }
    __syncwarp();  // limits and pairs are written again
    row = next_row;
    next_row = row_at(first + 2 * kQueries + lane);
  }
  constexpr double kLn2 = 0.69314718055994530942;
  const double sum = sum_of_cta(loss * kLn2, smem_generic);
  // This CTA's own number, to which it adds window by window.
  if (threadIdx.x == 0) g.losses[blockIdx.y * gridDim.x + blockIdx.x] += sum;
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
  const Loads loads{q_map, index_q_map, piece.head, smem};
  loads.keys(k_map, index_k_map, piece.key_block.sequence.k_begin + piece.first_token);
  walk<T>(g, piece, loads, smem_generic);
}

}  // namespace msa::cuda::sm90::key_rows
