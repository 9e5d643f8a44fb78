// SPDX-License-Identifier: Apache-2.0
//
// Index Branch scores and the fused indexer (paper eqs. 5-7). A tile is some neighbouring queries
// with all index heads: they share the one index key head, so each KV block is packed once per tile
// and multiplied with all its rows. The block maximum is taken in registers; token scores never
// reach memory. A score is one chain of fused multiply-adds over index_dim, then one product with
// the scale: the same bits however queries and blocks are divided, so the selection of a prompt
// does not depend on chunks, tiles or threads.
#include "cpu/index_tile.hpp"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/indexer.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h, as Highway requires.
#include <hwy/highway.h>

#include "cpu/index_score-inl.hpp"
#include "cpu/screen-inl.hpp"
#include "cpu/select-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace msa::cpu::HWY_NAMESPACE {

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
      : queries(index_queries_per_tile(p)),
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

std::size_t slice_bytes(const IndexerScores& args) { return index_scratch_bytes(args.problem); }

void run(const IndexerScores& args, std::span<std::byte> workspace, Stream) {
  const core::Sequences sequences(args);
  const IndexRequest request = index_request_of(args);
  const Problem& p = args.problem;
  const std::int64_t total_q = args.index_q.shape[0];
  IndexGrid grid(p, total_q, args.block_scores.shape[2]);
  grid.divide_blocks(num_threads());
  for_each_item(
      grid.num_tiles * grid.num_ranges, workspace, slice_bytes(args),
      [&](std::int64_t item, std::byte* memory) {
        core::WorkspaceLayout layout(memory);
        const IndexScratch scratch = lay_out_index(p, layout);
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
  layout.take<float>(index_queries_per_tile(args.problem) * args.problem.num_kv_heads *
                     floats_per_row(args));
  return layout.bytes();
}

std::int64_t tiles_per_slice(const Indexer& args) {
  const IndexGrid grid(args.problem, args.index_q.shape[0], 1);
  return std::clamp<std::int64_t>(grid.num_tiles, 1, kTilesPerSlice);
}

std::size_t slice_bytes(const Indexer& args) {
  return index_scratch_bytes(args.problem) +
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
  const IndexRequest request = index_request_of(args);
  const Problem& p = args.problem;
  const std::int64_t total_q = args.index_q.shape[0];
  const std::int64_t columns = core::ceil_div(core::max_seq_len_k(args), p.block_size);
  const std::size_t bytes = slice_bytes(args);
  const auto slices = static_cast<std::int64_t>(workspace.size() / bytes);
  const IndexGrid grid(p, total_q, columns);

  const auto point_rows = [&](const IndexScratch& scratch, const IndexTile& tile,
                              std::int64_t row_begin, std::byte* slice, std::int64_t slot) {
    auto* scores = reinterpret_cast<float*>(
        slice + index_scratch_bytes(p) + static_cast<std::size_t>(slot) * tile_scores_bytes(args));
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
      const IndexScratch scratch = lay_out_index(p, layout);
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
                    const IndexScratch scratch = lay_out_index(p, layout);
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
