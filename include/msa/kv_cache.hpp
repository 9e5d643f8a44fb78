// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "msa/export.h"
#include "msa/tensor.hpp"

namespace msa {

/// A page that must be copied, in K, V and index K of every layer, before the next append.
struct PageCopy {
  std::int32_t source_page = 0;
  std::int32_t destination_page = 0;
  std::int64_t num_tokens = 0;  ///< The first tokens of the page; the rest is unused.
};

/// Which page holds which block of which sequence: host bookkeeping only, it owns no keys or
/// values. One instance serves all layers. Sequences may share the pages of a common prefix. Not
/// thread-safe.
class MSA_API PagedKvCache {
 public:
  /// num_pages pages of block_size tokens each; the pages are the caller's, numbered from 0.
  PagedKvCache(std::int64_t num_pages, std::int64_t block_size);
  ~PagedKvCache();
  PagedKvCache(PagedKvCache&&) noexcept;
  PagedKvCache& operator=(PagedKvCache&&) noexcept;

  /// A new, empty sequence. Ids of released sequences are used again.
  std::int64_t create();
  /// A new sequence that shares the first num_tokens tokens of `sequence`, pages included.
  std::int64_t fork(std::int64_t sequence, std::int64_t num_tokens);
  /// Makes room for num_tokens more tokens. Where the last page is shared and only partly filled,
  /// it is replaced by a page of its own and the copy to make is returned: a prefix may end inside
  /// a block. Throws Error(out_of_memory) with both numbers, and changes nothing, where too few
  /// pages are free.
  std::optional<PageCopy> append(std::int64_t sequence, std::int64_t num_tokens);
  /// Forgets all tokens past the first num_tokens (a rejected draft, say).
  void truncate(std::int64_t sequence, std::int64_t num_tokens);
  /// Ends a sequence and frees the pages that nobody else holds.
  void release(std::int64_t sequence);

  std::int64_t length(std::int64_t sequence) const;  ///< tokens
  std::span<const std::int32_t> pages(std::int64_t sequence) const;
  std::int64_t num_free_pages() const;
  std::int64_t num_pages() const;
  std::int64_t block_size() const;

  /// Fills the rows of a batch in host memory: page_table i32 [batch_size, max_pages] (-1 past a
  /// sequence's pages) and seq_lens_k i32 [batch_size]. Throws where max_pages is too small.
  void fill(std::span<const std::int64_t> sequences, const TensorView& page_table,
            const TensorView& seq_lens_k) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace msa
