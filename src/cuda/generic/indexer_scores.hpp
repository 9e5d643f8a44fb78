// SPDX-License-Identifier: Apache-2.0
//
// Block scores of some queries, for IndexerScores and for the chunks of Indexer.
#pragma once

#include <cuda_runtime_api.h>

#include <optional>
#include <string>

#include "msa/ops.hpp"

namespace msa::cuda::generic {

/// Where scores of queries [query_begin, query_end) go: scores count from query_begin.
struct ScoreRange {
  std::int64_t query_begin, query_end;
  float* scores;
  std::int64_t head_stride, query_stride;
  std::int64_t num_columns;
  bool fill;  ///< -inf in columns of blocks that a query doesn't see; else they stay as they are
};

/// Why index queries and keys can't be multiplied here.
std::optional<std::string> declines_index_inputs(const TensorView& index_q,
                                                 const TensorView& index_k);

/// `args.block_scores` is not used. A scale of 0 is 1 / sqrt(index_dim).
void run_indexer_scores(const IndexerScores& args, const ScoreRange& range, cudaStream_t stream);

}  // namespace msa::cuda::generic
