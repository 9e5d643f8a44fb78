// SPDX-License-Identifier: Apache-2.0
//
// Index Branch scores and the fused indexer (paper eqs. 5-7). A tile is some neighbouring queries
// with all index heads: they share the one index key head, so each KV block is packed once per tile
// and multiplied with all its rows. The block maximum is taken in registers; token scores never
// reach memory. A score is one chain of fused multiply-adds over index_dim, then one product with
// the scale: the same bits however queries and blocks are divided, so the selection of a prompt
// does not depend on chunks, tiles or threads.
#include <cmath>
#include <limits>

#include "core/scalar.hpp"
#include "core/sequences.hpp"
#include "cpu/support.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/indexer.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as Highway requires.
#include <hwy/highway.h>

#include "cpu/screen-inl.hpp"
#include "cpu/select-inl.hpp"
#include "cpu/tile-inl.hpp"

#ifndef MSA_CPU_INDEXER_ONCE
#define MSA_CPU_INDEXER_ONCE
namespace msa::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kMaxRows = 128;      ///< of a tile, if there are not more index heads
constexpr std::int64_t kTilesPerSlice = 4;  ///< whose block scores a worker's memory holds
/// Rows up to which the keys are not packed first: tokens are transposed in registers and
/// multiplied with all rows at once (decode). Such tiles are also screened by int8 codes, if there
/// are any.
constexpr std::int64_t kFewRows = 8;

struct IndexRequest {
  const Problem& problem;
  const Batch& batch;
  TensorView index_q, index_k;
  float scale;
};

template <class Args>
IndexRequest request_of(const Args& args) {
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

std::int64_t max_queries_per_tile(const Problem& p) {
  return std::clamp<std::int64_t>(kMaxRows / p.num_kv_heads, 1, 64);
}

IndexScratch lay_out(const Problem& p, core::WorkspaceLayout& layout) {
  const std::int64_t rows = max_queries_per_tile(p) * p.num_kv_heads;
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

std::size_t scratch_bytes(const Problem& p) {
  core::WorkspaceLayout layout;
  lay_out(p, layout);
  return layout.bytes();
}

}  // namespace
}  // namespace msa::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

/// Maxima over the tokens of one packed block for rows [first_row, num_rows); `base` is the
/// block's first token.
void block_maxima(const IndexRequest& request, const IndexTile& tile, std::int64_t first_row,
                  std::int64_t num_tokens, std::int64_t base, const IndexScratch& scratch) {
  const FloatTag d;
  const std::int64_t n = lanes();
  const Problem& p = request.problem;
  const std::int64_t heads = p.num_kv_heads;
  const std::int64_t padded_dim = round_up(p.index_dim, kMaxLanes);
  const auto lowest = hn::Set(d, -kInfinity);
  const Panel panel{scratch.panel, p.index_dim, core::ceil_div(num_tokens, n)};
  const std::int64_t num_rows = tile.count * heads;
  for (std::int64_t row = first_row; row < num_rows; ++row) {
    hn::StoreU(lowest, d, scratch.partial + row * kMaxLanes);
  }
  for_each_tile(num_rows - first_row, panel.num_vectors,
                [&](auto rows, auto vectors, std::int64_t first, std::int64_t vector) {
                  const float* a[rows];
                  Sums<rows, vectors> sums;
                  for (std::int64_t r = 0; r < rows; ++r) {
                    a[r] = scratch.q + (first_row + first + r) * padded_dim;
                    for (std::int64_t v = 0; v < vectors; ++v) sums[r][v] = hn::Zero(d);
                  }
                  multiply<rows, vectors>(a, panel.strip(vector), panel.depth, sums);
                  const std::int64_t end = (vector + vectors) * n;
                  for (std::int64_t r = 0; r < rows; ++r) {
                    const std::int64_t row = first_row + first + r;
                    const std::int64_t limit = tile.position(row / heads) + 1 - base;
                    auto highest = hn::LoadU(d, scratch.partial + row * kMaxLanes);
                    for (std::int64_t v = 0; v < vectors; ++v) {
                      // A NaN is greater than nothing, on every target.
                      auto better = hn::Gt(sums[r][v], highest);
                      if (limit < end) {
                        const std::int64_t visible =
                            std::clamp<std::int64_t>(limit - (vector + v) * n, 0, n);
                        better = hn::And(better, hn::FirstN(d, static_cast<std::size_t>(visible)));
                      }
                      highest = hn::IfThenElse(better, sums[r][v], highest);
                    }
                    hn::StoreU(highest, d, scratch.partial + row * kMaxLanes);
                  }
                });
}

/// Tokens [first, first + kVectors * lanes) of a block times kRows rows of q: the same chain of
/// multiply-adds per score as in a panel.
template <std::int64_t kRows, std::int64_t kVectors, class T, class Stride>
HWY_INLINE void multiply_tokens(const float* const (&q)[kRows], const T* const (&tokens)[kVectors],
                                Stride stride, std::int64_t dim, Sums<kRows, kVectors>& sums) {
  const FloatTag d;
  const auto step = [&](std::int64_t k, std::int64_t count) HWY_ATTR {
    FloatVector columns[kVectors][kPieceDims<T>];
#pragma GCC unroll 2
    for (std::int64_t v = 0; v < kVectors; ++v) load_columns(tokens[v] + k, stride, columns[v]);
#pragma GCC unroll 8
    for (std::int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 8
      for (std::int64_t r = 0; r < kRows; ++r) {
        const auto factor = hn::Set(d, q[r][k + i]);
#pragma GCC unroll 2
        for (std::int64_t v = 0; v < kVectors; ++v) {
          sums[r][v] = hn::MulAdd(factor, columns[v][i], sums[r][v]);
        }
      }
    }
  };
  std::int64_t k = 0;
  for (; k + kPieceDims<T> <= dim; k += kPieceDims<T>) step(k, kPieceDims<T>);
  if (k < dim) step(k, dim - k);
}

/// block_maxima for at most kRows rows from first_row on, from the keys as they lie.
template <std::int64_t kRows, class T>
void few_rows_maxima(const T* block, std::int64_t token_stride, const IndexTile& tile,
                     const Problem& p, std::int64_t first_row, std::int64_t num_tokens,
                     std::int64_t base, const NextRows& next, const IndexScratch& scratch) {
  // A chain of multiply-adds waits for its last step: eight of them keep two ports busy.
  constexpr std::int64_t kVectors = kRows <= 4 && kTileVectors > 2 ? 2 : 1;
  const FloatTag d;
  const std::int64_t n = lanes();
  const std::int64_t dim = p.index_dim;
  const std::int64_t padded_dim = round_up(dim, kMaxLanes);
  const std::int64_t num_rows = std::min(kRows, tile.count * p.num_kv_heads - first_row);
  const float* q[kRows];
  std::int64_t limit[kRows];
  FloatVector highest[kRows];
  for (std::int64_t r = 0; r < kRows; ++r) {
    const std::int64_t row = first_row + std::min(r, num_rows - 1);
    q[r] = scratch.q + row * padded_dim;
    limit[r] = tile.position(row / p.num_kv_heads) + 1 - base;
    highest[r] = hn::Set(d, -kInfinity);
  }
  for (std::int64_t first = 0; first < num_tokens; first += kVectors * n) {
    const std::int64_t end = std::min(first + kVectors * n, num_tokens);
    for (std::int64_t token = first; token < end; ++token) {
      prefetch_row(block, token_stride, num_tokens, dim, token, next);
    }
    const T* tokens[kVectors];
    std::int64_t stride = token_stride;
    if (end - first == kVectors * n && dim % kPieceDims<T> == 0) {
      for (std::int64_t v = 0; v < kVectors; ++v)
        tokens[v] = block + (first + v * n) * token_stride;
    } else {
      stride = round_up(dim, kPieceDims<T>);
      T* const copy = reinterpret_cast<T*>(scratch.pack);
      copy_rows(block + first * token_stride, token_stride, end - first, dim, kVectors * n, copy);
      for (std::int64_t v = 0; v < kVectors; ++v) tokens[v] = copy + v * n * stride;
    }
    Sums<kRows, kVectors> sums;
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (std::int64_t v = 0; v < kVectors; ++v) sums[r][v] = hn::Zero(d);
    }
    with_stride(stride, [&](auto row) { multiply_tokens<kRows>(q, tokens, row, dim, sums); });
    for (std::int64_t r = 0; r < kRows; ++r) {
      for (std::int64_t v = 0; v < kVectors; ++v) {
        const std::int64_t visible = std::clamp<std::int64_t>(limit[r] - first - v * n, 0, n);
        const auto better = hn::And(hn::Gt(sums[r][v], highest[r]),
                                    hn::FirstN(d, static_cast<std::size_t>(visible)));
        highest[r] = hn::IfThenElse(better, sums[r][v], highest[r]);
      }
    }
  }
  for (std::int64_t r = 0; r < num_rows; ++r) {
    hn::StoreU(highest[r], d, scratch.partial + (first_row + r) * kMaxLanes);
  }
}

void load_queries(const IndexRequest& request, const IndexTile& tile, const IndexScratch& scratch) {
  const FloatTag d;
  const Problem& p = request.problem;
  const std::int64_t padded_dim = round_up(p.index_dim, kMaxLanes);
  for (std::int64_t row = 0; row < tile.count * p.num_kv_heads; ++row) {
    const std::int64_t offset =
        core::offset_of(request.index_q, tile.sequence.q_begin + tile.first + row / p.num_kv_heads,
                        row % p.num_kv_heads);
    float* const to = scratch.q + row * padded_dim;
    with_elements(request.index_q, offset,
                  [&](const auto* from) { convert_row(from, p.index_dim, to); });
    if (request.scale >= 0.0f) continue;
    // The maximum is taken before the scale, which then has to be positive.
    for (std::int64_t i = 0; i < p.index_dim; i += lanes()) {
      hn::StoreU(hn::Neg(hn::LoadU(d, to + i)), d, to + i);
    }
  }
}

/// Scores blocks [block_begin, block_end) of every row into scratch.target; -inf where a block has
/// no visible token. Of a screened tile only the blocks that open_blocks() left open.
void score_tile(const IndexRequest& request, const IndexTile& tile, const IndexScratch& scratch) {
  const FloatTag d;
  const Problem& p = request.problem;
  const std::int64_t heads = p.num_kv_heads;
  const std::int64_t num_rows = tile.count * heads;
  const float scale = std::fabs(request.scale);
  load_queries(request, tile, scratch);
  const std::int64_t end =
      std::min(tile.block_end, core::ceil_div(tile.position(tile.count - 1) + 1, p.block_size));
  const auto rows_of = [&](std::int64_t block) {
    return block < end ? core::block_rows(request.index_k, request.batch, p.block_size,
                                          tile.sequence, 0, block)
                       : core::BlockRows{};
  };
  const auto next_open = [&](std::int64_t block) {
    while (tile.screened && block < tile.block_end && scratch.lower[0][block] == 0.0f) ++block;
    return block;
  };
  const auto score_block = [&](std::int64_t block, std::int64_t following) HWY_ATTR {
    const std::int64_t base = block * p.block_size;
    const std::int64_t num_tokens =
        std::min<std::int64_t>(tile.position(tile.count - 1) + 1 - base, p.block_size);
    const std::int64_t first_query =
        std::clamp<std::int64_t>(base - tile.position(0), 0, tile.count);
    std::int64_t first_row = first_query * heads;
    const core::BlockRows keys = rows_of(block);
    if (keys.num_tokens == 0) first_row = num_rows;  // invisible, or a page id out of range
    for (std::int64_t row = 0; row < first_row; ++row) scratch.target[row][block] = -kInfinity;
    if (first_row == num_rows) return;
    const NextRows next = next_rows(request.index_k, rows_of(following));
    with_elements(request.index_k, keys.offset, [&](const auto* from) {
      const std::int64_t rows = num_rows - first_row;
      const auto few_rows = [&](auto count) {
        few_rows_maxima<count>(from, keys.token_stride, tile, p, first_row, num_tokens, base, next,
                               scratch);
      };
      if (rows <= 2) return few_rows(Constant<2>());
      if (rows <= 4) return few_rows(Constant<4>());
      if (rows <= kFewRows) return few_rows(Constant<kFewRows>());
      pack_keys(from, keys.token_stride, num_tokens, p.index_dim, next, scratch.pack,
                scratch.panel);
      block_maxima(request, tile, first_row, num_tokens, base, scratch);
    });
    for (std::int64_t row = first_row; row < num_rows; ++row) {
      const auto partial = hn::LoadU(d, scratch.partial + row * kMaxLanes);
      const float score = hn::GetLane(hn::MaxOfLanes(d, partial)) * scale;
      scratch.target[row][block] = std::isnan(score) ? -kInfinity : score;
    }
  };
  for (std::int64_t block = next_open(tile.block_begin); block < tile.block_end;) {
    const std::int64_t following = next_open(block + 1);
    score_block(block, following);
    block = following;
  }
}

/// Codes the queries of a tile of few rows; false where one has an element that is not finite.
bool encode_queries(const Indexer& args, const IndexTile& tile, const IndexScratch& scratch) {
  const Problem& p = args.problem;
  const std::int64_t num_rows = tile.count * p.num_kv_heads;
  load_queries(request_of(args), tile, scratch);
  bool coded = true;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    coded = coded && encode_query(scratch.q + row * round_up(p.index_dim, kMaxLanes), p.index_dim,
                                  scratch.coded[row],
                                  scratch.pairs + row * round_up(p.index_dim, kCodesPerPiece));
  }
  return coded;
}

/// Bounds the scores of blocks [block_begin, block_end) for coded queries: from below into
/// scratch.lower, from above into scratch.target.
void screen_tile(const Indexer& args, const IndexTile& tile, const IndexScratch& scratch) {
  const Problem& p = args.problem;
  const std::int64_t num_rows = tile.count * p.num_kv_heads;
  const std::int64_t num_tokens = tile.position(tile.count - 1) + 1;
  const std::int64_t end = std::min(tile.block_end, core::ceil_div(num_tokens, p.block_size));
  const auto rows_of = [&](const TensorView& view, std::int64_t block) {
    return block < end ? core::block_rows(view, args.batch, p.block_size, tile.sequence, 0, block)
                       : core::BlockRows{};
  };
  const auto screen = [&](auto count, std::int64_t block) HWY_ATTR {
    constexpr std::int64_t kRows = count;
    const ScreenRow* coded[kRows];
    const std::int16_t* pairs[kRows];
    std::int64_t limit[kRows];
    float lower[kRows];
    float upper[kRows];
    const std::int64_t base = block * p.block_size;
    for (std::int64_t r = 0; r < kRows; ++r) {
      const std::int64_t row = std::min(r, num_rows - 1);
      coded[r] = scratch.coded + row;
      pairs[r] = scratch.pairs + row * round_up(p.index_dim, kCodesPerPiece);
      limit[r] = tile.position(row / p.num_kv_heads) + 1 - base;
    }
    const core::BlockRows codes = rows_of(args.index_k_codes, block);
    const core::BlockRows scales = rows_of(args.index_k_scales, block);
    screen_block({.codes = reinterpret_cast<const std::int8_t*>(
                      core::address_at(args.index_k_codes, codes.offset)),
                  .code_stride = codes.token_stride,
                  .scales = reinterpret_cast<const std::uint16_t*>(
                      core::address_at(args.index_k_scales, scales.offset)),
                  .scale_stride = scales.token_stride,
                  .num_tokens = std::min(num_tokens - base, codes.num_tokens)},
                 p.index_dim, coded, pairs, limit,
                 next_rows(args.index_k_codes, rows_of(args.index_k_codes, block + 1)),
                 next_rows(args.index_k_scales, rows_of(args.index_k_scales, block + 1)),
                 reinterpret_cast<std::int8_t*>(scratch.pack), lower, upper);
    for (std::int64_t row = 0; row < num_rows; ++row) {
      scratch.lower[row][block] = lower[row];
      scratch.target[row][block] = upper[row];
    }
  };
  for (std::int64_t block = tile.block_begin; block < end; ++block) {
    if (num_rows <= 2) {
      screen(Constant<2>(), block);
    } else if (num_rows <= 4) {
      screen(Constant<4>(), block);
    } else {
      screen(Constant<kFewRows>(), block);
    }
  }
}

/// From the bounds of whole rows to what is left open: scratch.lower[0][block] becomes 1 where a
/// row might select the block for its score, else 0; all scores become -inf. A block is out when as
/// many blocks as a row selects have lower bounds above its upper bound.
void open_blocks(const Indexer& args, const IndexTile& tile, const IndexScratch& scratch) {
  const Problem& p = args.problem;
  const std::int64_t num_rows = tile.count * p.num_kv_heads;
  const std::int64_t count = p.top_k - p.num_init_blocks - p.num_local_blocks;
  std::int64_t limits[kFewRows];  // blocks [num_init_blocks, limit) compete
  float thresholds[kFewRows];
  for (std::int64_t row = 0; row < num_rows; ++row) {
    const std::int64_t position = tile.position(row / p.num_kv_heads);
    const std::int64_t visible = position < 0 ? 0 : position / p.block_size + 1;
    limits[row] = visible > p.top_k && count > 0 ? visible - p.num_local_blocks : 0;
    if (limits[row] == 0) continue;
    scan_best(scratch.lower[row], p.num_init_blocks, limits[row], count, scratch.best);
    thresholds[row] = scratch.lower[row][block_of(scratch.best[0])];
  }
  for (std::int64_t block = 0; block < tile.block_end; ++block) {
    bool open = false;
    for (std::int64_t row = 0; row < num_rows; ++row) {
      float& score = scratch.target[row][block];
      if (block >= p.num_init_blocks && block < limits[row]) {
        open = open || score >= thresholds[row];
      }
      score = -kInfinity;
    }
    scratch.lower[0][block] = open ? 1.0f : 0.0f;
  }
}

/// Selects the blocks of every row of the tile from scratch.target.
void select_tile(const Indexer& args, const IndexTile& tile, const IndexScratch& scratch) {
  const Problem& p = args.problem;
  for (std::int64_t row = 0; row < tile.count * p.num_kv_heads; ++row) {
    const std::int64_t query = row / p.num_kv_heads;
    const std::int64_t position = tile.position(query);
    const std::int64_t visible = position < 0 ? 0 : position / p.block_size + 1;
    select_row(scratch.target[row], visible, p, scratch.best, scratch.ids);
    for (std::int64_t slot = 0; slot < p.top_k; ++slot) {
      core::store_i32(args.block_ids, scratch.ids[slot], row % p.num_kv_heads,
                      tile.sequence.q_begin + tile.first + query, slot);
    }
  }
}

}  // namespace msa::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace msa::cpu {
HWY_EXPORT(score_tile);
HWY_EXPORT(select_tile);
HWY_EXPORT(encode_queries);
HWY_EXPORT(screen_tile);
HWY_EXPORT(open_blocks);

namespace {

/// Packed queries cut into tiles, and block columns cut into ranges where there are too few tiles
/// to keep all threads busy (decode).
struct IndexGrid {
  std::int64_t queries = 0;  ///< per tile
  std::int64_t num_tiles = 0;
  std::int64_t num_blocks = 0;  ///< columns
  std::int64_t blocks = 0;      ///< per range
  std::int64_t num_ranges = 1;

  IndexGrid(const Problem& p, std::int64_t total_q, std::int64_t columns)
      : queries(max_queries_per_tile(p)),
        num_tiles(core::ceil_div(total_q, queries)),
        num_blocks(columns),
        blocks(columns) {}

  void divide_blocks(std::int64_t threads) {
    constexpr std::int64_t kMinBlocks = 8;
    if (num_tiles == 0 || num_blocks == 0) return;
    const std::int64_t wanted = core::ceil_div(4 * threads, num_tiles);
    blocks = std::clamp(core::ceil_div(num_blocks, wanted), std::min(kMinBlocks, num_blocks),
                        num_blocks);
    num_ranges = core::ceil_div(num_blocks, blocks);
  }

  /// Calls visit(tile, rows before it in its grid tile) for the sequences of one grid tile.
  template <class Visit>
  void for_each_sequence(const core::Sequences& sequences, std::int64_t total_q, std::int64_t tile,
                         std::int64_t range, Visit visit) const {
    const std::int64_t begin = tile * queries;
    const std::int64_t end = std::min(begin + queries, total_q);
    for (std::int64_t row = begin; row < end;) {
      const core::Sequence sequence = sequences.of_query(row);
      const std::int64_t first = row - sequence.q_begin;
      const std::int64_t count = std::min(end - row, sequence.q_len - first);
      visit(IndexTile{.sequence = sequence,
                      .first = first,
                      .count = count,
                      .block_begin = range * blocks,
                      .block_end = std::min((range + 1) * blocks, num_blocks)},
            row - begin);
      row += count;
    }
  }
};

std::size_t slice_bytes(const IndexerScores& args) { return scratch_bytes(args.problem); }

void run(const IndexerScores& args, std::span<std::byte> workspace, Stream) {
  const core::Sequences sequences(args);
  const IndexRequest request = request_of(args);
  const Problem& p = args.problem;
  const std::int64_t total_q = args.index_q.shape[0];
  IndexGrid grid(p, total_q, args.block_scores.shape[2]);
  grid.divide_blocks(num_threads());
  for_each_item(
      grid.num_tiles * grid.num_ranges, workspace, slice_bytes(args),
      [&](std::int64_t item, std::byte* memory) {
        core::WorkspaceLayout layout(memory);
        const IndexScratch scratch = lay_out(p, layout);
        // The last queries see most keys: heavy items first.
        const std::int64_t tile_idx = grid.num_tiles - 1 - item / grid.num_ranges;
        grid.for_each_sequence(
            sequences, total_q, tile_idx, item % grid.num_ranges,
            [&](const IndexTile& tile, std::int64_t) {
              for (std::int64_t row = 0; row < tile.count * p.num_kv_heads; ++row) {
                scratch.target[row] = reinterpret_cast<float*>(core::address_at(
                    args.block_scores,
                    core::offset_of(args.block_scores, row % p.num_kv_heads,
                                    tile.sequence.q_begin + tile.first + row / p.num_kv_heads)));
              }
              HWY_DYNAMIC_DISPATCH(score_tile)(request, tile, scratch);
            });
      });
}

/// Floats per row of a grid tile, behind the scratch of a slice: scores of all blocks and, where
/// there are codes, lower bounds.
std::int64_t floats_per_row(const Indexer& args) {
  const std::int64_t columns = core::ceil_div(core::max_seq_len_k(args), args.problem.block_size);
  return args.index_k_codes.given() ? 2 * columns : columns;
}

std::size_t tile_scores_bytes(const Indexer& args) {
  core::WorkspaceLayout layout;
  layout.take<float>(max_queries_per_tile(args.problem) * args.problem.num_kv_heads *
                     floats_per_row(args));
  return layout.bytes();
}

std::int64_t tiles_per_slice(const Indexer& args) {
  const IndexGrid grid(args.problem, args.index_q.shape[0], 1);
  return std::clamp<std::int64_t>(grid.num_tiles, 1, kTilesPerSlice);
}

std::size_t slice_bytes(const Indexer& args) {
  return scratch_bytes(args.problem) +
         static_cast<std::size_t>(tiles_per_slice(args)) * tile_scores_bytes(args);
}

/// Whether the tile is screened by its codes; then its queries are coded.
bool screens(const Indexer& args, const IndexTile& tile, const IndexScratch& scratch) {
  const Problem& p = args.problem;
  return args.index_k_codes.given() && tile.count * p.num_kv_heads <= kFewRows &&
         tile.position(tile.count - 1) / p.block_size >= p.top_k &&
         HWY_DYNAMIC_DISPATCH(encode_queries)(args, tile, scratch);
}

void run(const Indexer& args, std::span<std::byte> workspace, Stream) {
  const core::Sequences sequences(args);
  const IndexRequest request = request_of(args);
  const Problem& p = args.problem;
  const std::int64_t total_q = args.index_q.shape[0];
  const std::int64_t columns = core::ceil_div(core::max_seq_len_k(args), p.block_size);
  const std::size_t bytes = slice_bytes(args);
  const auto slices = static_cast<std::int64_t>(workspace.size() / bytes);
  const IndexGrid grid(p, total_q, columns);

  const auto point_rows = [&](const IndexScratch& scratch, const IndexTile& tile,
                              std::int64_t row_begin, std::byte* slice, std::int64_t slot) {
    auto* scores = reinterpret_cast<float*>(
        slice + scratch_bytes(p) + static_cast<std::size_t>(slot) * tile_scores_bytes(args));
    scores += row_begin * p.num_kv_heads * floats_per_row(args);
    for (std::int64_t row = 0; row < tile.count * p.num_kv_heads; ++row) {
      scratch.target[row] = scores;
      if (row < kFewRows) scratch.lower[row] = scores + columns;
      scores += floats_per_row(args);
    }
  };

  if (grid.num_tiles > slices * tiles_per_slice(args)) {
    for_each_item(grid.num_tiles, workspace, bytes, [&](std::int64_t item, std::byte* memory) {
      core::WorkspaceLayout layout(memory);
      const IndexScratch scratch = lay_out(p, layout);
      grid.for_each_sequence(sequences, total_q, grid.num_tiles - 1 - item, 0,
                             [&](IndexTile tile, std::int64_t row_begin) {
                               point_rows(scratch, tile, row_begin, memory, 0);
                               tile.block_end = core::ceil_div(tile.sequence.k_len, p.block_size);
                               tile.screened = screens(args, tile, scratch);
                               if (tile.screened) {
                                 HWY_DYNAMIC_DISPATCH(screen_tile)(args, tile, scratch);
                                 HWY_DYNAMIC_DISPATCH(open_blocks)(args, tile, scratch);
                               }
                               HWY_DYNAMIC_DISPATCH(score_tile)(request, tile, scratch);
                               HWY_DYNAMIC_DISPATCH(select_tile)(args, tile, scratch);
                             });
    });
    return;
  }

  // Few queries: the scores of all of them fit, so that threads can divide the blocks. Each pass
  // goes over all tiles before the next begins.
  const auto pass = [&](const IndexGrid& over, auto work) {
    for_each_item(over.num_tiles * over.num_ranges, workspace, bytes,
                  [&](std::int64_t item, std::byte* memory) {
                    core::WorkspaceLayout layout(memory);
                    const IndexScratch scratch = lay_out(p, layout);
                    const std::int64_t idx = over.num_tiles - 1 - item / over.num_ranges;
                    std::byte* const slice =
                        workspace.data() +
                        static_cast<std::size_t>(idx / tiles_per_slice(args)) * bytes;
                    over.for_each_sequence(sequences, total_q, idx, item % over.num_ranges,
                                           [&](IndexTile tile, std::int64_t row_begin) {
                                             point_rows(scratch, tile, row_begin, slice,
                                                        idx % tiles_per_slice(args));
                                             work(tile, scratch);
                                           });
                  });
  };
  IndexGrid divided = grid;
  divided.divide_blocks(std::min<std::int64_t>(slices, num_threads()));
  pass(divided, [&](const IndexTile& tile, const IndexScratch& scratch) {
    if (screens(args, tile, scratch)) {
      HWY_DYNAMIC_DISPATCH(screen_tile)(args, tile, scratch);
    } else {
      HWY_DYNAMIC_DISPATCH(score_tile)(request, tile, scratch);
    }
  });
  if (args.index_k_codes.given()) {
    pass(grid, [&](const IndexTile& tile, const IndexScratch& scratch) {
      if (screens(args, tile, scratch)) HWY_DYNAMIC_DISPATCH(open_blocks)(args, tile, scratch);
    });
    pass(divided, [&](IndexTile& tile, const IndexScratch& scratch) {
      tile.screened = screens(args, tile, scratch);
      if (tile.screened) HWY_DYNAMIC_DISPATCH(score_tile)(request, tile, scratch);
    });
  }
  pass(grid, [&](const IndexTile& tile, const IndexScratch& scratch) {
    HWY_DYNAMIC_DISPATCH(select_tile)(args, tile, scratch);
  });
}

}  // namespace

const detail::Implementation<IndexerScores> kIndexerScores = {
    .name = "cpu",
    .dtypes = "f32 f16 bf16",
    .declines = declines<IndexerScores>,
    .workspace_bytes =
        [](const IndexerScores& args) { return workspace_of_slices(slice_bytes(args)); },
    .run = run};

const detail::Implementation<Indexer> kIndexer = {
    .name = "cpu",
    .dtypes = "f32 f16 bf16",
    .declines = declines<Indexer>,
    .workspace_bytes = [](const Indexer& args) { return workspace_of_slices(slice_bytes(args)); },
    .run = run};

}  // namespace msa::cpu
#endif
