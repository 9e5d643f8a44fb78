// SPDX-License-Identifier: Apache-2.0
//
// The top_k blocks of a row by one warp: a threshold by four passes over 8-bit digits of the
// scores' ordered bits, then one pass that writes the chosen ids in ascending order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/batch.cuh"

namespace msa::cuda::generic {

/// Rows [query_begin, query_begin + num_queries) of every head; scores count from query_begin.
struct SelectTopKParams {
  DeviceBatch batch;
  const float* scores;
  std::int64_t score_head_stride, score_query_stride;
  std::int64_t num_columns;  ///< blocks that a row of scores has
  std::int32_t* ids;
  std::int64_t id_head_stride, id_query_stride;
  std::int64_t query_begin, num_queries;
  int top_k;
  int num_init_blocks;
  int num_local_blocks;
};

void run_select_top_k(const SelectTopKParams& params, int num_heads, cudaStream_t stream);

}  // namespace msa::cuda::generic
