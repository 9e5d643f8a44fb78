// SPDX-License-Identifier: Apache-2.0
//
// Bounds of index scores from int8 codes, and exact scores of the blocks they leave. The stream of
// codes is that of indexer_decode_scores.cuh. docs/kernels/sm90_decode_indexer.md proves the bound.
#include "cuda/sm90/indexer_decode_scores.cuh"
#include "cuda/sm90/indexer_screen.hpp"

namespace msa::cuda::sm90 {
namespace {

constexpr int kDim = 128;
constexpr int kLimbs = 2;
constexpr int kCodePitch = kDim + 16;           // bytes; spreads columns over the banks
constexpr float kCodedQuery = 127.0f * 128.0f;  // the largest |m|: 128 hi + lo, in int8 each
constexpr float kMaxCoded = 0x1p40f;            // core::kMaxCodedElement
constexpr float kLeastScaled = 0x1p-60f;        // smaller queries count as remainder alone

/// What turns a key's scale c, error e and integer product D into bounds:
/// c scale D -+ (of_error e + of_scale c + rest).
struct QueryBound {
  float scale, of_error, of_scale, rest;
};

/// Codes a query: a warp, four dimensions a lane.
template <class T>
__device__ void code_query(const T* query, std::uint8_t* codes, QueryBound* bound) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float q[4] = {};
  if (query != nullptr) {
    const uint2 words = *reinterpret_cast<const uint2*>(query + 4 * lane);
    T elements[4];
    memcpy(elements, &words, sizeof(words));
#pragma unroll
    for (int i = 0; i < 4; ++i) q[i] = static_cast<float>(elements[i]);
  }
  float largest = 0.0f;
  float squares = 0.0f;
  bool coded = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    coded = coded && fabsf(q[i]) <= kMaxCoded;  // a NaN is not
    largest = fmaxf(largest, fabsf(q[i]));
    squares += q[i] * q[i];
  }
  coded = __all_sync(~0u, coded);
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, distance));
    squares += __shfl_xor_sync(~0u, squares, distance);
  }
  const bool scaled = coded && largest >= kLeastScaled;
  const float scale = scaled ? largest / kCodedQuery : 0.0f;
  std::uint32_t high = 0;
  std::uint32_t low = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float code = scaled ? fminf(fmaxf(rintf(q[i] / scale), -kCodedQuery), kCodedQuery) : 0.0f;
    const int limb = static_cast<int>(rintf(code * (1.0f / 128.0f)));
    const int remainder = static_cast<int>(code) - 128 * limb;  // -64..64
    high |= (static_cast<std::uint32_t>(limb) & 255u) << (8 * i);
    low |= (static_cast<std::uint32_t>(remainder) & 255u) << (8 * i);
  }
  *reinterpret_cast<std::uint32_t*>(codes + 4 * lane) = high;
  *reinterpret_cast<std::uint32_t*>(codes + kCodePitch + 4 * lane) = low;
  if (lane != 0) return;
  constexpr float kSlack = 1.0f + 0x1p-9f;  // more than every rounding here
  constexpr float kNorm = 1437.0f;          // of a key's codes, 127 sqrt(128) at most
  // 8 steps of the exact path's mma, and the roundings of the estimate.
  constexpr float kSums = 8.0f * 40.0f * 0x1p-23f + 0x1p-20f;
  const float norm = scaled ? sqrtf(squares) : 12.0f * largest;
  const float remainder = scaled ? 6.0f * scale : norm;
  // What underflows: at most 2^-100, and sqrt(128) norm 2^-126 should a subnormal key count as 0.
  const float underflow = 0x1p-100f + norm * 0x1p-120f;
  *bound = coded ? QueryBound{scale, norm * kSlack + 0x1p-100f,
                              kNorm * (remainder + norm * kSums) * kSlack, underflow}
                 : QueryBound{0.0f, 1.0f, 0.0f, INFINITY};
}

constexpr int kStages = 4;  // a block that is multiplied, and those on their way
constexpr int kAhead = kStages - 1;

/// Codes and scales of kStages blocks. Every thread copies what it will read itself: of its keys g
/// and g + 8 the 16-byte pieces t and t + 4, and both scales.
struct CodedRing {
  uint4 codes[kStages][2][2][kDecodeThreads];
  std::uint32_t scales[kStages][2][kDecodeThreads];
};

struct CodedBlock {
  const std::byte* codes;  ///< null where there is no page
  const std::byte* scales;
};

__device__ __forceinline__ CodedBlock coded_block(const ScreenParams& params,
                                                  const DecodeItem& item) {
  const std::int64_t page = page_of(params.exact.batch, item.batch_idx, item.block);
  if (page < 0) return {};
  return {params.codes + page * params.codes_page_stride,
          params.scales + page * params.scales_page_stride};
}

template <class T>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    screen_kernel(const __grid_constant__ ScreenParams params) {
  extern __shared__ __align__(16) std::uint8_t smem[];
  const int pass_rows = params.exact.pass_rows;
  auto& ring = *reinterpret_cast<CodedRing*>(smem);
  auto* const queries = smem + sizeof(CodedRing);  // [pass_rows][limb][kCodePitch]
  auto* const bounds = reinterpret_cast<QueryBound*>(queries + pass_rows * kLimbs * kCodePitch);
  auto* const maxima = reinterpret_cast<float2*>(bounds + pass_rows);  // [2][warps][pass_rows]
  auto* const ends = reinterpret_cast<int*>(maxima + 2 * kDecodeWarps * pass_rows);
  __shared__ int warp_sums[kDecodeWarps];

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int key_row = warp * 16 + lane / 4;  // and + 8, of the block
  const int heads = params.exact.heads;

  ptx::let_dependents_start();
  prefetch_metadata(params.exact);
  ptx::wait_for_dependencies();
  const auto cta = static_cast<int>(blockIdx.x);
  const std::int64_t words = params.exact.batch.batch_size * params.seen_words;
  for (std::int64_t i = std::int64_t{cta} * kDecodeThreads + thread; i < words;
       i += std::int64_t{gridDim.x} * kDecodeThreads) {
    params.seen[i] = 0;
  }
  if (cta == 0 && thread == 0) *params.num_survivors = 0;
  sum_items(params.exact, ends, warp_sums);
  const int total = ends[params.exact.batch.batch_size - 1];
  const int least = total / static_cast<int>(gridDim.x);
  const int rest = total - least * static_cast<int>(gridDim.x);
  const int begin = cta * least + min(cta, rest);
  const int end = begin + least + (cta < rest ? 1 : 0);
  if (begin == end) return;

  /// Brings a block into its slot; one group of copies even where there is nothing to copy.
  const auto load = [&](int index, const DecodeItem& item, const CodedBlock& block) {
    const int slot = index % kStages;
#pragma unroll
    for (int i = 0; i < 2 && index < end; ++i) {
      const int key = key_row + 8 * i;
      const bool there = block.codes != nullptr && key < item.k_len - item.block * kDecodeBlock;
      const std::byte* const codes =
          there ? block.codes + key * params.codes_token_stride + lane % 4 * 16 : params.codes;
      const std::byte* const scales =
          there ? block.scales + key * params.scales_token_stride : params.scales;
      ptx::cp_async_16(ptx::smem_address(&ring.codes[slot][i][0][thread]), codes, there ? 16 : 0);
      ptx::cp_async_16(ptx::smem_address(&ring.codes[slot][i][1][thread]), codes + 64,
                       there ? 16 : 0);
      ptx::cp_async_4(ptx::smem_address(&ring.scales[slot][i][thread]), scales, there ? 4 : 0);
    }
    ptx::cp_async_commit();
  };

  DecodeCursor ahead{params.exact, ends, {}};
  ahead.seek(begin);
  DecodeCursor current = ahead;
  DecodeItem items[kStages] = {};  // the first ones, all of whose pages are asked for at once
  CodedBlock blocks[kStages] = {};
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (begin + i < end) {
      if (i > 0) ahead.advance();
      items[i] = ahead.item;
      blocks[i] = coded_block(params, ahead.item);
    }
  }
  std::uint32_t missing = 0;  // a bit a slot: its block has no page
  const auto note = [&](int index, const CodedBlock& block) {
    const std::uint32_t bit = 1u << (index % kStages);
    missing = block.codes == nullptr ? missing | bit : missing & ~bit;
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    load(begin + i, items[i], blocks[i]);
    note(begin + i, blocks[i]);
  }
  CodedBlock next_block = blocks[kAhead];
  int loaded_sequence = -1;
  int loaded_pass = -1;
  for (int index = begin; index < end; ++index) {
    const DecodeItem item = current.item;
    if (index + 1 < end) current.advance();
    load(index + kAhead, ahead.item, next_block);
    note(index + kAhead, next_block);
    if (index + kStages < end) {
      ahead.advance();
      next_block = coded_block(params, ahead.item);
    }
    const int row0 = item.pass * pass_rows;
    const int num_rows = min(item.q_len * heads - row0, pass_rows);
    if (item.batch_idx != loaded_sequence || item.pass != loaded_pass) {
      for (int row = warp; row < round_up_div(num_rows, 4) * 4; row += kDecodeWarps) {
        const int token = (row0 + row) / heads;
        const int head = (row0 + row) % heads;
        const std::byte* const query =
            row < num_rows ? params.exact.index_q +
                                 (std::int64_t{item.q_begin} + token) * params.exact.query_stride +
                                 head * params.exact.query_head_stride
                           : nullptr;
        code_query(reinterpret_cast<const T*>(query), queries + row * kLimbs * kCodePitch,
                   bounds + row);
      }
      __syncthreads();
      loaded_sequence = item.batch_idx;
      loaded_pass = item.pass;
    }
    float2* const block_maxima = maxima + index % 2 * kDecodeWarps * pass_rows;
    const int first_key = item.block * kDecodeBlock + key_row;
    const int position = item.k_len - item.q_len;  // of the first query
    const bool masked = first_key - key_row + kDecodeBlock - 1 > position + row0 / heads;
    ptx::cp_async_wait<kAhead>();
    const int slot = index % kStages;
    uint4 codes[2][2];
    float scales[2];
    float errors[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      codes[i][0] = ring.codes[slot][i][0][thread];
      codes[i][1] = ring.codes[slot][i][1][thread];
      const std::uint32_t pair = ring.scales[slot][i][thread];
      scales[i] = __uint_as_float(pair << 16);
      errors[i] = __uint_as_float(pair & 0xffff0000u);
    }
    for (int tile = 0; tile * 4 < num_rows; ++tile) {
      int d[4] = {};  // row tile * 4 + lane % 4: high and low limb of key g, then of key g + 8
      const auto* const column = reinterpret_cast<const uint4*>(
          queries + (tile * 8 + lane / 4) * kCodePitch + lane % 4 * 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 b = column[4 * half];
        const uint4 k0 = codes[0][half];
        const uint4 k1 = codes[1][half];
        ptx::mma_m16n8k32_s8(d, {k0.x, k1.x, k0.y, k1.y}, b.x, b.y);
        ptx::mma_m16n8k32_s8(d, {k0.z, k1.z, k0.w, k1.w}, b.z, b.w);
      }
      const int row = tile * 4 + lane % 4;
      const QueryBound bound = bounds[row];
      const int limit = position + (row0 + row) / heads;
      float low = -INFINITY;
      float high = -INFINITY;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float middle =
            scales[i] * bound.scale * static_cast<float>(128 * d[2 * i] + d[2 * i + 1]);
        const float error = bound.of_error * errors[i] + bound.of_scale * scales[i] + bound.rest;
        if (masked && first_key + 8 * i > limit) continue;
        low = fmaxf(low, middle - error);
        high = fmaxf(high, middle + error);
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        low = fmaxf(low, __shfl_xor_sync(~0u, low, distance));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, distance));
      }
      if (lane < 4) block_maxima[warp * pass_rows + row] = {low, high};
    }
    __syncthreads();
    if (thread < num_rows) {
      float2 score = block_maxima[thread];
#pragma unroll
      for (int other = 1; other < kDecodeWarps; ++other) {
        const float2 of_warp = block_maxima[other * pass_rows + thread];
        score.x = fmaxf(score.x, of_warp.x);
        score.y = fmaxf(score.y, of_warp.y);
      }
      if ((missing >> slot & 1u) != 0) score = {-INFINITY, -INFINITY};
      const int token = (row0 + thread) / heads;
      const int head = (row0 + thread) % heads;
      const std::int64_t at = head * params.exact.head_stride +
                              (std::int64_t{item.q_begin} + token) * params.exact.row_stride +
                              item.block;
      params.exact.scores[at] = score.x;
      params.upper[at] = score.y;
    }
  }
}

/// A CTA takes a survivor at a time, for all rows of its sequence.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    rescore_kernel(const __grid_constant__ ScreenParams params) {
  using Keys = DecodeKeys<T, T, kDim>;
  constexpr int kPairs = Keys::kSteps / 2;
  __shared__ float maxima[2][kDecodeWarps][8];
  const DecodeScoreParams& exact = params.exact;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int key_row = warp * 16 + lane / 4;
  ptx::let_dependents_start();
  ptx::wait_for_dependencies();
  const int count = *params.num_survivors;
  int parity = 0;
  for (int index = static_cast<int>(blockIdx.x); index < count;
       index += static_cast<int>(gridDim.x)) {
    const Survivor survivor = params.survivors[index];
    DecodeCursor cursor{exact, nullptr, {}};
    cursor.enter(survivor.batch_idx);
    cursor.item.block = survivor.block;
    const DecodeItem& item = cursor.item;
    const std::byte* const block = cursor.keys();
    const int rest = item.k_len - item.block * kDecodeBlock;
    const std::byte* const from = block + key_row * exact.token_stride + lane % 4 * 16;
    Keys keys;
    keys.load(block == nullptr || key_row >= rest ? nullptr : from,
              block == nullptr || key_row + 8 >= rest ? nullptr : from + 8 * exact.token_stride);
    const int num_rows = item.q_len * exact.heads;
    const int first_key = item.block * kDecodeBlock + key_row;
    const int position = item.k_len - item.q_len;
    for (int row0 = 0; row0 < num_rows; row0 += 8, parity ^= 1) {
      const int column = row0 + lane / 4;
      const std::byte* const query =
          exact.index_q + (std::int64_t{item.q_begin} + column / exact.heads) * exact.query_stride +
          column % exact.heads * exact.query_head_stride;
      float d[4] = {};
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        uint4 b{};
        if (column < num_rows) b = Keys::query(query, pair, lane % 4);
        std::uint32_t a[4];
        keys.fragment(2 * pair, a);
        ptx::mma_m16n8k16<T>(d, a, b.x, b.y);
        keys.fragment(2 * pair + 1, a);
        ptx::mma_m16n8k16<T>(d, a, b.z, b.w);
      }
      const int row = row0 + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first_key + i / 2 * 8 > position + (row + i % 2) / exact.heads) d[i] = -INFINITY;
      }
      float low = fmaxf(fmaxf(d[0], -INFINITY), d[2]);
      float high = fmaxf(fmaxf(d[1], -INFINITY), d[3]);
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        low = fmaxf(low, __shfl_xor_sync(~0u, low, distance));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, distance));
      }
      if (lane < 4) {
        maxima[parity][warp][lane * 2] = low;
        maxima[parity][warp][lane * 2 + 1] = high;
      }
      __syncthreads();
      if (thread < 8 && row0 + thread < num_rows) {
        float score = maxima[parity][0][thread];
#pragma unroll
        for (int other = 1; other < kDecodeWarps; ++other) {
          score = fmaxf(score, maxima[parity][other][thread]);
        }
        if (block == nullptr) score = -INFINITY;
        const int token = (row0 + thread) / exact.heads;
        const int head = (row0 + thread) % exact.heads;
        exact.scores[head * exact.head_stride +
                     (std::int64_t{item.q_begin} + token) * exact.row_stride + item.block] = score;
      }
    }
  }
}

template <class T>
void start_screen(const ScreenParams& params, int grid, cudaStream_t stream) {
  const auto rows = static_cast<std::size_t>(params.exact.pass_rows);
  constexpr std::size_t kRowBytes =
      kLimbs * kCodePitch + sizeof(QueryBound) + 2 * kDecodeWarps * sizeof(float2);
  launch(screen_kernel<T>,
         {.grid = dim3(static_cast<unsigned>(grid)),
          .threads = kDecodeThreads,
          .smem_bytes = sizeof(CodedRing) + rows * kRowBytes +
                        static_cast<std::size_t>(params.exact.batch.batch_size) * sizeof(int),
          .dependent = true},
         stream, params);
}

}  // namespace

void run_screen(const ScreenParams& params, DType dtype, int grid, cudaStream_t stream) {
  dtype == DType::bf16 ? start_screen<__nv_bfloat16>(params, grid, stream)
                       : start_screen<__half>(params, grid, stream);
}

void run_rescore(const ScreenParams& params, DType dtype, int grid, cudaStream_t stream) {
  const LaunchConfig config{
      .grid = dim3(static_cast<unsigned>(grid)), .threads = kDecodeThreads, .dependent = true};
  dtype == DType::bf16 ? launch(rescore_kernel<__nv_bfloat16>, config, stream, params)
                       : launch(rescore_kernel<__half>, config, stream, params);
}

}  // namespace msa::cuda::sm90
