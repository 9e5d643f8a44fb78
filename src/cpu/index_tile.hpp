// SPDX-License-Identifier: Apache-2.0
//
// What the indexer works on: a tile of queries with all index heads, and one worker's memory.
#pragma once

#include <cmath>
#include <limits>

#include "core/scalar.hpp"
#include "core/sequences.hpp"
#include "cpu/screen.hpp"
#include "cpu/support.hpp"

namespace msa::cpu {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr std::int64_t kMaxIndexRows =
    128;                                           ///< of a tile, if there are not more index heads
inline constexpr std::int64_t kTilesPerSlice = 4;  ///< whose block scores a worker's memory holds
/// Rows up to which the keys are not packed first: tokens are transposed in registers and
/// multiplied with all rows at once (decode). Such tiles are also screened by int8 codes, if there
/// are any.
inline constexpr std::int64_t kFewRows = 8;

struct IndexRequest {
  const Problem& problem;
  const Batch& batch;
  TensorView index_q, index_k;
  float scale;
};

template <class Args>
IndexRequest index_request_of(const Args& args) {
  float scale = 0.0f;
  if constexpr (requires { args.index_scale; }) scale = args.index_scale;
  if (scale == 0.0f) {
    scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(args.problem.index_dim)));
  }
  return {args.problem, args.batch, args.index_q, args.index_k, scale};
}

/// Queries [first, first + count) of a sequence, all index heads; rows are (query, head), heads
/// fastest.
struct IndexTile {
  core::Sequence sequence;
  std::int64_t first;
  std::int64_t count;
  std::int64_t block_begin;  ///< blocks to score: [block_begin, block_end)
  std::int64_t block_end;
  bool screened = false;  ///< score only blocks that screening left open

  std::int64_t position(std::int64_t query) const { return sequence.position(first + query); }
};

/// One worker's memory.
struct IndexScratch {
  float* q;        ///< [rows][padded_dim]
  float* partial;  ///< [rows][lanes], maxima per lane
  float** target;  ///< [rows], where the scores of the row's blocks go
  float** lower;   ///< [kFewRows], where lower bounds go, and then what is left open
  float* panel;    ///< depth index_dim, block_size columns
  float* pack;
  std::uint64_t* best;  ///< [top_k]
  std::int32_t* ids;    ///< [top_k]
  ScreenRow* coded;     ///< [kFewRows]
  std::int16_t* pairs;  ///< [kFewRows][index_dim, rounded up to kCodesPerPiece]
};

inline std::int64_t index_queries_per_tile(const Problem& p) {
  return std::clamp<std::int64_t>(kMaxIndexRows / p.num_kv_heads, 1, 64);
}

inline IndexScratch lay_out_index(const Problem& p, core::WorkspaceLayout& layout) {
  const std::int64_t rows = index_queries_per_tile(p) * p.num_kv_heads;
  IndexScratch scratch;
  scratch.q = layout.take<float>(rows * round_up(p.index_dim, kMaxLanes));
  scratch.partial = layout.take<float>(rows * kMaxLanes);
  scratch.target = layout.take<float*>(rows);
  scratch.lower = layout.take<float*>(kFewRows);
  scratch.panel = layout.take<float>(std::int64_t{p.block_size} * p.index_dim);
  scratch.pack = layout.take<float>(2 * pack_scratch(p.index_dim));
  scratch.best = layout.take<std::uint64_t>(p.top_k);
  scratch.ids = layout.take<std::int32_t>(p.top_k);
  scratch.coded = layout.take<ScreenRow>(kFewRows);
  scratch.pairs = layout.take<std::int16_t>(kFewRows * round_up(p.index_dim, kCodesPerPiece));
  return scratch;
}

inline std::size_t index_scratch_bytes(const Problem& p) {
  core::WorkspaceLayout layout;
  lay_out_index(p, layout);
  return layout.bytes();
}

}  // namespace msa::cpu
