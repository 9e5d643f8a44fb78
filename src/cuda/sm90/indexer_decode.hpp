// SPDX-License-Identifier: Apache-2.0
//
// Index scores for few query tokens a sequence: the index keys are read once, as fast as memory
// gives them. What its kernels are called with.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "cuda/common/batch.cuh"

namespace msa::cuda::sm90 {

/// Rows (query token, index head) that are multiplied with the keys in one pass over them.
inline constexpr int kDecodeRows = 128;
inline constexpr int kDecodeBlock = 128;  ///< tokens
inline constexpr int kDecodeThreads = 256;

struct DecodeScoreParams {
  DeviceBatch batch;
  const std::byte* index_q;
  std::int64_t query_stride, query_head_stride;  ///< bytes
  const std::byte* index_k;
  std::int64_t page_stride;   ///< bytes; 0: ragged
  std::int64_t token_stride;  ///< bytes
  float* scores;              ///< [heads][total_q][columns]; of visible blocks only
  std::int64_t head_stride, row_stride;
  std::int64_t num_columns;
  int heads;
  int pass_rows;  ///< of a pass, a multiple of 8, at most kDecodeRows
};

/// Shared memory of a CTA in bytes.
std::size_t decode_score_smem(const DecodeScoreParams& params);

/// `dim` is 64 or 128, `grid` the number of CTAs.
void run_decode_scores_bf16(const DecodeScoreParams& params, int dim, int grid,
                            cudaStream_t stream);
void run_decode_scores_f16(const DecodeScoreParams& params, int dim, int grid, cudaStream_t stream);
void run_decode_scores_e4m3(const DecodeScoreParams& params, int dim, int grid,
                            cudaStream_t stream);

/// Rows [0, total_q) of every head: their scores, and where the ids go.
struct DecodeSelectParams {
  DeviceBatch batch;
  const float* scores;
  std::int64_t head_stride, row_stride;
  std::int32_t* ids;
  std::int64_t id_head_stride, id_row_stride;
  int top_k;  ///< at most kDecodeTopK
  int num_init_blocks;
  int num_local_blocks;
};
inline constexpr int kDecodeTopK = 64;

/// What cuda_sm90_decode calls its kernels with, for others that run them.
struct DecodeParams {
  DecodeScoreParams scores;
  DecodeSelectParams selection;
};
DecodeParams make_decode_params(const Indexer& args, std::span<std::byte> workspace);

void run_decode_select(const DecodeSelectParams& params, int heads, cudaStream_t stream);

}  // namespace msa::cuda::sm90
