// SPDX-License-Identifier: Apache-2.0
//
// Scores of decode: a stream of index keys from memory to tensor cores, without shared memory. The
// visible blocks of all sequences form one list, of which every CTA takes an equal part; the
// lengths are read here, so a captured graph follows them as they grow. A block's keys are divided
// among 8 warps, 16 each: rows of the A operand of mma.m16n8k16. A dot product does not care for
// the order of its dimensions, so a lane's 16-byte loads are its fragments: lane 4 g + t has of
// keys g and g + 8 the 16-byte pieces t, t + 4, ... Queries (token, head) are the columns, from
// shared memory in the same order. The next block's keys are on their way while one is multiplied,
// and the page of the block after that.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/common/launch.hpp"
#include "cuda/common/ptx/async_copy.cuh"
#include "cuda/common/ptx/barrier.cuh"
#include "cuda/common/ptx/mma.cuh"
#include "cuda/sm90/indexer_decode.hpp"
#include "cuda/sm90/sparse_attention_widen.cuh"

namespace msa::cuda::sm90 {

inline constexpr int kDecodeWarps = kDecodeThreads / 32;

__device__ __forceinline__ int round_up_div(int a, int b) { return (a + b - 1) / b; }

/// Element is the keys' type in memory (std::uint8_t: e4m3), Operand that of the tensor cores.
template <class Element, class Operand, int kDim>
struct DecodeKeys {
  static constexpr int kPieceDims = 16 / static_cast<int>(sizeof(Element));
  static constexpr int kPieces = kDim / kPieceDims / 4;  ///< of a row in a lane
  static constexpr int kStepsPerPiece =
      kPieceDims / 4;  ///< a lane has 4 dimensions of a step of 16
  static constexpr int kSteps = kDim / 16;

  uint4 rows[2][kPieces];

  __device__ __forceinline__ void load(const std::byte* key0, const std::byte* key1) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      rows[0][i] = key0 == nullptr ? uint4{} : __ldcs(reinterpret_cast<const uint4*>(key0) + 4 * i);
      rows[1][i] = key1 == nullptr ? uint4{} : __ldcs(reinterpret_cast<const uint4*>(key1) + 4 * i);
    }
  }

  /// The A fragment of a step.
  __device__ __forceinline__ void fragment(int step, std::uint32_t (&a)[4]) const {
    const int piece = step / kStepsPerPiece;
    const int part = step % kStepsPerPiece;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint4 words = rows[row][piece];
      if constexpr (sizeof(Element) == 2) {
        a[row] = part == 0 ? words.x : words.z;
        a[2 + row] = part == 0 ? words.y : words.w;
      } else {
        const std::uint32_t four = part == 0   ? words.x
                                   : part == 1 ? words.y
                                   : part == 2 ? words.z
                                               : words.w;
        const uint2 wide = widen4<Operand>(four);
        a[row] = wide.x;
        a[2 + row] = wide.y;
      }
    }
  }

  /// Dimensions of lane (0..3 of a row) that a pair of steps multiplies: 8 in a row, in memory too.
  static __device__ __forceinline__ int first_dim(int pair, int lane_of_row) {
    const int step = 2 * pair;
    return (lane_of_row + 4 * (step / kStepsPerPiece)) * kPieceDims + step % kStepsPerPiece * 4;
  }
  /// Those of a query, as B fragments of two steps.
  static __device__ __forceinline__ uint4 query(const std::byte* row, int pair, int lane_of_row) {
    const std::byte* const from = row + first_dim(pair, lane_of_row) * int{sizeof(Element)};
    if constexpr (sizeof(Element) == 2) {
      return *reinterpret_cast<const uint4*>(from);
    } else {
      const uint2 eight = *reinterpret_cast<const uint2*>(from);
      const uint2 low = widen4<Operand>(eight.x);
      const uint2 high = widen4<Operand>(eight.y);
      return {low.x, low.y, high.x, high.y};
    }
  }
};

/// A block to be multiplied with the rows of a pass.
struct DecodeItem {
  int batch_idx, q_begin, q_len, k_begin, k_len;  ///< of a DeviceSequence: all lengths are i32
  int num_blocks;                                 ///< visible ones of the sequence
  int block;
  int pass;
};

/// Calls a CTA's items in turn. `ends`: items of the sequences up to each, in shared memory.
struct DecodeCursor {
  const DecodeScoreParams& params;
  const int* ends;
  DecodeItem item;

  __device__ __forceinline__ void seek(int index) {
    int low = 0;
    int high = static_cast<int>(params.batch.batch_size) - 1;  // ends[high] > index
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ends[middle] > index) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    enter(low);
    const int local = index - (low == 0 ? 0 : ends[low - 1]);
    item.pass = local / item.num_blocks;
    item.block = local % item.num_blocks;
  }
  __device__ __forceinline__ void advance() {
    if (++item.block < item.num_blocks) return;
    item.block = 0;
    if (++item.pass * params.pass_rows < item.q_len * params.heads) return;
    item.pass = 0;
    int b = item.batch_idx + 1;
    while (b + 1 < params.batch.batch_size && ends[b] == ends[b - 1]) ++b;
    if (b < params.batch.batch_size) enter(b);
  }
  __device__ __forceinline__ void enter(int b) {
    const DeviceSequence sequence = sequence_at(params.batch, b);
    item.batch_idx = b;
    item.q_begin = static_cast<int>(sequence.q_begin);
    item.q_len = static_cast<int>(sequence.q_len);
    item.k_begin = static_cast<int>(sequence.k_begin);
    item.k_len = static_cast<int>(sequence.k_len);
    item.num_blocks = round_up_div(item.k_len, kDecodeBlock);
  }
  /// The first byte of the block's keys; null where its page does not exist.
  __device__ __forceinline__ const std::byte* keys() const {
    if (params.batch.page_table == nullptr) {
      return params.index_k +
             (std::int64_t{item.k_begin} + item.block * kDecodeBlock) * params.token_stride;
    }
    const std::int64_t page = page_of(params.batch, item.batch_idx, item.block);
    return page < 0 ? nullptr : params.index_k + page * params.page_stride;
  }
};

/// Items of each sequence, summed up; the same in every CTA.
__device__ __forceinline__ void sum_items(const DecodeScoreParams& params, int* ends,
                                          int (&warp_sums)[kDecodeWarps]) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto batch_size = static_cast<int>(params.batch.batch_size);
  int before = 0;
  for (int first = 0; first < batch_size; first += kDecodeThreads) {
    int sum = 0;
    if (first + thread < batch_size) {
      const DeviceSequence sequence = sequence_at(params.batch, first + thread);
      const int rows = static_cast<int>(sequence.q_len) * params.heads;
      sum = round_up_div(rows, params.pass_rows) *
            round_up_div(static_cast<int>(sequence.k_len), kDecodeBlock);
    }
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, sum, distance);
      if (thread % 32 >= distance) sum += other;
    }
    if (thread % 32 == 31) warp_sums[thread / 32] = sum;
    __syncthreads();
    for (int warp = 0; warp < thread / 32; ++warp) sum += warp_sums[warp];
    if (first + thread < batch_size) ends[first + thread] = before + sum;
    __syncthreads();
    before = ends[min(first + kDecodeThreads, batch_size) - 1];
  }
}

/// Lengths, then pages, then keys are three trips to memory, one after the other. Of small batches
/// the first two are brought into the L2 cache while the kernel ahead still runs: a hint, and
/// nothing is read.
__device__ __forceinline__ void prefetch_metadata(const DecodeScoreParams& params) {
  constexpr int kLineEntries = 32;
  const DeviceBatch& batch = params.batch;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0 && batch.seq_lens_k != nullptr) ptx::prefetch_l2(batch.seq_lens_k);
  if (batch.page_table == nullptr || batch.page_table_entry_stride != 1) return;
  const auto lines = static_cast<int>((params.num_columns + kLineEntries - 1) / kLineEntries);
  if (batch.batch_size * lines > kDecodeThreads || thread >= batch.batch_size * lines) return;
  ptx::prefetch_l2(batch.page_table + thread / lines * batch.page_table_stride +
                   thread % lines * kLineEntries);
}

/// What part `cta` of `num_ctas` has to score of all visible blocks.
template <class Element, class Operand, int kDim>
__device__ __forceinline__ void score_share(const DecodeScoreParams& params, std::uint8_t* smem,
                                            int cta, int num_ctas) {
  using Keys = DecodeKeys<Element, Operand, kDim>;
  constexpr int kPairs = Keys::kSteps / 2;
  auto* const queries = reinterpret_cast<uint4*>(smem);  // [tiles of 8 rows][kPairs][32 lanes]
  auto* const maxima = reinterpret_cast<float*>(queries + params.pass_rows / 8 * kPairs * 32);
  auto* const ends = reinterpret_cast<int*>(maxima + 2 * kDecodeWarps * params.pass_rows);
  __shared__ int warp_sums[kDecodeWarps];

  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int key_row = warp * 16 + lane / 4;  // and + 8, of the block

  sum_items(params, ends, warp_sums);
  const int total = ends[params.batch.batch_size - 1];
  const int least = total / num_ctas;
  const int rest = total - least * num_ctas;  // CTAs that have one more
  const int begin = cta * least + min(cta, rest);
  const int end = begin + least + (cta < rest ? 1 : 0);
  if (begin == end) return;

  const auto load = [&](Keys& keys, const DecodeItem& item, const std::byte* block) {
    const int rest = item.k_len - item.block * kDecodeBlock;
    const std::byte* const row = block + key_row * params.token_stride + lane % 4 * 16;
    // Ragged keys may end with the last block's.
    keys.load(block == nullptr || key_row >= rest ? nullptr : row,
              block == nullptr || key_row + 8 >= rest ? nullptr : row + 8 * params.token_stride);
  };

  DecodeCursor cursor{params, ends, {}};
  cursor.seek(begin);
  DecodeItem item = cursor.item;
  const std::byte* block = cursor.keys();
  Keys keys;
  load(keys, item, block);
  const std::byte* next_block = nullptr;
  if (begin + 1 < end) {
    cursor.advance();
    next_block = cursor.keys();
  }
  int loaded_sequence = -1;
  int loaded_pass = -1;
  for (int index = begin; index < end; ++index) {
    Keys next_keys;
    const DecodeItem next_item = cursor.item;
    const std::byte* const current_block = block;
    if (index + 1 < end) {
      load(next_keys, next_item, next_block);
      block = next_block;
      if (index + 2 < end) {
        cursor.advance();
        next_block = cursor.keys();
      }
    }
    const int row0 = item.pass * params.pass_rows;
    const int num_rows = min(item.q_len * params.heads - row0, params.pass_rows);
    if (item.batch_idx != loaded_sequence || item.pass != loaded_pass) {
      for (int i = thread; i < round_up_div(num_rows, 8) * kPairs * 32; i += kDecodeThreads) {
        const int row = i / (kPairs * 32) * 8 + i % 32 / 4;
        const int token = (row0 + row) / params.heads;
        const int head = (row0 + row) % params.heads;
        uint4 pair{};
        if (row < num_rows) {
          pair = Keys::query(params.index_q +
                                 (std::int64_t{item.q_begin} + token) * params.query_stride +
                                 head * params.query_head_stride,
                             i / 32 % kPairs, i % 4);
        }
        queries[i] = pair;
      }
      __syncthreads();
      loaded_sequence = item.batch_idx;
      loaded_pass = item.pass;
    }
    float* const block_maxima = maxima + index % 2 * kDecodeWarps * params.pass_rows;
    const int first_key = item.block * kDecodeBlock + key_row;
    const int position = item.k_len - item.q_len;  // of the first query
    const bool masked = first_key - key_row + kDecodeBlock - 1 > position + row0 / params.heads;
    for (int tile = 0; tile * 8 < num_rows; ++tile) {
      float d[4] = {};
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const uint4 b = queries[(tile * kPairs + pair) * 32 + lane];
        std::uint32_t a[4];
        keys.fragment(2 * pair, a);
        ptx::mma_m16n8k16<Operand>(d, a, b.x, b.y);
        keys.fragment(2 * pair + 1, a);
        ptx::mma_m16n8k16<Operand>(d, a, b.z, b.w);
      }
      const int row = tile * 8 + lane % 4 * 2;  // and + 1
      if (masked) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = (row0 + row + i % 2) / params.heads;
          if (first_key + i / 2 * 8 > position + token) d[i] = -INFINITY;
        }
      }
      // fmaxf drops NaN: such a token counts as -inf.
      float low = fmaxf(fmaxf(d[0], -INFINITY), d[2]);
      float high = fmaxf(fmaxf(d[1], -INFINITY), d[3]);
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        low = fmaxf(low, __shfl_xor_sync(~0u, low, distance));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, distance));
      }
      if (lane < 4) {
        block_maxima[warp * params.pass_rows + row] = low;
        block_maxima[warp * params.pass_rows + row + 1] = high;
      }
    }
    __syncthreads();
    if (thread < num_rows) {
      float score = block_maxima[thread];
#pragma unroll
      for (int other = 1; other < kDecodeWarps; ++other) {
        score = fmaxf(score, block_maxima[other * params.pass_rows + thread]);
      }
      if (current_block == nullptr) score = -INFINITY;
      const int token = (row0 + thread) / params.heads;
      const int head = (row0 + thread) % params.heads;
      params.scores[head * params.head_stride +
                    (std::int64_t{item.q_begin} + token) * params.row_stride + item.block] = score;
    }
    keys = next_keys;
    item = next_item;
  }
}

template <class Element, class Operand, int kDim>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    decode_scores_kernel(const __grid_constant__ DecodeScoreParams params) {
  extern __shared__ __align__(16) std::uint8_t smem[];
  ptx::let_dependents_start();
  prefetch_metadata(params);
  ptx::wait_for_dependencies();
  score_share<Element, Operand, kDim>(params, smem, static_cast<int>(blockIdx.x),
                                      static_cast<int>(gridDim.x));
}

template <class Element, class Operand>
void run_decode_scores(const DecodeScoreParams& params, int dim, int grid, cudaStream_t stream) {
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(grid)),
                            .threads = kDecodeThreads,
                            .smem_bytes = decode_score_smem(params),
                            .dependent = true};
  dim == 128 ? launch(decode_scores_kernel<Element, Operand, 128>, config, stream, params)
             : launch(decode_scores_kernel<Element, Operand, 64>, config, stream, params);
}

}  // namespace msa::cuda::sm90
