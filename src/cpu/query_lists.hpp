// SPDX-License-Identifier: Apache-2.0
//
// Which queries attend which KV block, seen from both sides: the backward operations walk the
// blocks of a tile of queries, and the queries of a block. Ragged keys only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "core/scalar.hpp"
#include "core/sequences.hpp"
#include "core/thread_pool.hpp"
#include "core/workspace.hpp"
#include "cpu/support.hpp"

namespace msa::cpu {

inline constexpr std::int32_t kNoBlock = std::numeric_limits<std::int32_t>::max();

/// Packed queries, ascending: rows[i], or first + i where rows is null.
struct QueryList {
  const std::int32_t* rows = nullptr;
  std::int64_t first = 0;
  std::int64_t count = 0;

  std::int64_t operator[](std::int64_t i) const { return rows != nullptr ? rows[i] : first + i; }
};

/// A KV block of a sequence.
struct KeyBlock {
  core::Sequence sequence;
  std::int64_t block = 0;

  std::int64_t num_tokens(std::int64_t block_size) const {
    return std::min(block_size, sequence.k_len - block * block_size);
  }
  /// Tokens of the block that packed query `row` sees.
  std::int64_t limit(std::int64_t block_size, std::int64_t row) const {
    const std::int64_t position = sequence.position(row - sequence.q_begin);
    return std::clamp<std::int64_t>(position + 1 - block * block_size, 0, num_tokens(block_size));
  }
};

/// The queries that attend each KV block, per KV head, by a counting sort of block_ids. Without
/// block_ids those that see any of its tokens.
class QueryLists {
 public:
  /// Memory comes from `layout`, which may count only.
  template <class Args>
  QueryLists(const Args& args, const core::Sequences* sequences, core::WorkspaceLayout& layout)
      : problem_(args.problem), block_ids_(args.block_ids), sequences_(sequences) {
    const std::int64_t num_sequences = core::batch_size(args.batch);
    // Each sequence ends with at most one block that is not full.
    most_blocks_ = args.k.shape[0] / problem_.block_size + num_sequences;
    most_entries_ = args.q.shape[0] * problem_.top_k;
    first_block_ = layout.take<std::int64_t>(num_sequences + 1);
    if (!block_ids_.given()) return;
    ends_ = layout.take<std::int64_t>(problem_.num_kv_heads * (most_blocks_ + 1));
    entries_ = layout.take<std::int32_t>(problem_.num_kv_heads * most_entries_);
  }

  /// Reads the lengths and block_ids.
  void build() {
    first_block_[0] = 0;
    for (std::int64_t b = 0; b < sequences_->size(); ++b) {
      first_block_[b + 1] =
          first_block_[b] + core::ceil_div((*sequences_)[b].k_len, problem_.block_size);
    }
    if (!block_ids_.given()) return;
    core::parallel_for(problem_.num_kv_heads, [&](std::int64_t head, int) { build_head(head); });
  }

  /// Of all sequences.
  std::int64_t num_blocks() const { return first_block_[sequences_->size()]; }

  KeyBlock block(std::int64_t index) const {
    const std::int64_t* const begin = first_block_;
    const std::int64_t* const end = begin + sequences_->size() + 1;
    const std::int64_t b = std::upper_bound(begin, end, index) - begin - 1;
    return {(*sequences_)[b], index - first_block_[b]};
  }

  QueryList queries(std::int64_t head, std::int64_t index) const {
    if (block_ids_.given()) {
      const std::int64_t* const ends = ends_ + head * (most_blocks_ + 1);
      const std::int64_t begin = index == 0 ? 0 : ends[index - 1];
      return {entries_ + head * most_entries_ + begin, 0, ends[index] - begin};
    }
    const KeyBlock key_block = block(index);
    const core::Sequence& sequence = key_block.sequence;
    const std::int64_t hidden = std::clamp<std::int64_t>(
        key_block.block * problem_.block_size - sequence.position(0), 0, sequence.q_len);
    return {nullptr, sequence.q_begin + hidden, sequence.q_len - hidden};
  }

 private:
  template <class Visit>
  void for_each_entry(std::int64_t head, Visit visit) const {
    for (std::int64_t b = 0; b < sequences_->size(); ++b) {
      const core::Sequence sequence = (*sequences_)[b];
      for (std::int64_t i = 0; i < sequence.q_len; ++i) {
        const std::int64_t position = sequence.position(i);
        if (position < 0) continue;
        for (std::int64_t slot = 0; slot < problem_.top_k; ++slot) {
          const std::int32_t id = core::load_i32(block_ids_, head, sequence.q_begin + i, slot);
          if (id < 0 || id > position / problem_.block_size) continue;
          visit(first_block_[b] + id, static_cast<std::int32_t>(sequence.q_begin + i));
        }
      }
    }
  }

  void build_head(std::int64_t head) {
    // While entries are placed, ends[i] is where the next of block i goes; at first, its begin.
    std::int64_t* const ends = ends_ + head * (most_blocks_ + 1);
    std::fill_n(ends, most_blocks_ + 1, 0);
    for_each_entry(head, [&](std::int64_t index, std::int32_t) { ++ends[index + 1]; });
    for (std::int64_t i = 0; i < most_blocks_; ++i) ends[i + 1] += ends[i];
    std::int32_t* const entries = entries_ + head * most_entries_;
    for_each_entry(head,
                   [&](std::int64_t index, std::int32_t row) { entries[ends[index]++] = row; });
  }

  const Problem& problem_;
  TensorView block_ids_;
  const core::Sequences* sequences_;
  std::int64_t most_blocks_ = 0;
  std::int64_t most_entries_ = 0;
  std::int64_t* first_block_ = nullptr;  ///< [sequences + 1], of each sequence, among all
  std::int64_t* ends_ = nullptr;         ///< [heads][most_blocks + 1], of each block's entries
  std::int32_t* entries_ = nullptr;      ///< [heads][most_entries], packed queries
};

/// Queries [first, first + count) of a sequence for one KV head.
struct QueryTile {
  core::Sequence sequence;
  std::int64_t head = 0;
  std::int64_t first = 0;
  std::int64_t count = 0;

  std::int64_t row(std::int64_t query) const { return sequence.q_begin + first + query; }
  std::int64_t position(std::int64_t query) const { return sequence.position(first + query); }
};

/// Calls visit(tile, scratch) for tiles of at most `queries` neighbouring queries of each KV head,
/// as for_each_item does.
template <class Visit>
void for_each_query_tile(const core::Sequences& sequences, std::int64_t total_q, std::int64_t heads,
                         std::int64_t queries, std::span<std::byte> slices, std::size_t slice_bytes,
                         Visit visit) {
  for_each_item(core::ceil_div(total_q, queries) * heads, slices, slice_bytes,
                [&](std::int64_t item, std::byte* memory) {
                  const std::int64_t begin = item / heads * queries;
                  const std::int64_t end = std::min(begin + queries, total_q);
                  for (std::int64_t row = begin; row < end;) {
                    const core::Sequence sequence = sequences.of_query(row);
                    const std::int64_t first = row - sequence.q_begin;
                    const std::int64_t count = std::min(end - row, sequence.q_len - first);
                    visit(QueryTile{sequence, item % heads, first, count}, memory);
                    row += count;
                  }
                });
}

/// The blocks that the queries of a tile attend.
class TileBlocks {
 public:
  TileBlocks(const Problem& problem, std::int64_t most_queries, core::WorkspaceLayout& layout)
      : problem_(problem) {
    ids_ = layout.take<std::int32_t>(most_queries * (problem.top_k + 1));
    cursor_ = layout.take<std::int32_t>(most_queries);
    active_ = layout.take<std::int32_t>(most_queries);
  }

  /// Calls visit(block, queries of the tile, how many, tokens of the block that they see) for every
  /// block that any query attends, ascending; where they see different numbers of tokens, for each
  /// query alone.
  template <class Visit>
  void for_each(const QueryTile& tile, const TensorView& block_ids, Visit visit) const {
    if (block_ids.given()) sort_ids(tile, block_ids);
    for (std::int64_t block = next(tile, block_ids, -1); block != kNoBlock;
         block = next(tile, block_ids, block)) {
      const KeyBlock key_block{tile.sequence, block};
      std::int64_t count = 0;
      for (std::int64_t query = 0; query < tile.count; ++query) {
        if (key_block.limit(problem_.block_size, tile.row(query)) == 0) continue;
        if (block_ids.given()) {
          std::int32_t& cursor = cursor_[query];
          if (ids_[query * (problem_.top_k + 1) + cursor] != block) continue;
          ++cursor;
        }
        active_[count++] = static_cast<std::int32_t>(query);
      }
      if (count == 0) continue;
      const auto limit = [&](std::int64_t i) {
        return key_block.limit(problem_.block_size, tile.row(active_[i]));
      };
      if (limit(0) == limit(count - 1)) {  // they ascend
        visit(block, active_, count, limit(0));
      } else {
        for (std::int64_t i = 0; i < count; ++i)
          visit(block, active_ + i, std::int64_t{1}, limit(i));
      }
    }
  }

 private:
  void sort_ids(const QueryTile& tile, const TensorView& block_ids) const {
    for (std::int64_t query = 0; query < tile.count; ++query) {
      std::int32_t* const ids = ids_ + query * (problem_.top_k + 1);
      const std::int64_t position = tile.position(query);
      std::int64_t count = 0;
      for (std::int64_t slot = 0; slot < problem_.top_k && position >= 0; ++slot) {
        const std::int32_t id = core::load_i32(block_ids, tile.head, tile.row(query), slot);
        if (id >= 0 && id <= position / problem_.block_size) ids[count++] = id;
      }
      std::sort(ids, ids + count);
      ids[count] = kNoBlock;
      cursor_[query] = 0;
    }
  }

  std::int64_t next(const QueryTile& tile, const TensorView& block_ids,
                    std::int64_t previous) const {
    if (!block_ids.given()) {
      const bool more = tile.position(tile.count - 1) >= (previous + 1) * problem_.block_size;
      return more ? previous + 1 : kNoBlock;
    }
    std::int64_t lowest = kNoBlock;
    for (std::int64_t query = 0; query < tile.count; ++query) {
      const std::int32_t id = ids_[query * (problem_.top_k + 1) + cursor_[query]];
      lowest = std::min<std::int64_t>(lowest, id);
    }
    return lowest;
  }

  const Problem& problem_;
  std::int32_t* ids_;     ///< [queries][top_k + 1], ascending, ends with kNoBlock
  std::int32_t* cursor_;  ///< [queries], into ids
  std::int32_t* active_;  ///< [queries]
};

}  // namespace msa::cpu
