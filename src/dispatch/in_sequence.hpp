// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>

#include "core/implementation.hpp"
#include "core/indexed_attention.hpp"

namespace msa::dispatch {

/// A row of IndexedAttentionForward: a row of Indexer, then one of SparseAttentionForward. Both use
/// the same workspace, one after the other.
template <const detail::Implementation<Indexer>* kIndex,
          const detail::Implementation<SparseAttentionForward>* kAttend>
constexpr detail::Implementation<IndexedAttentionForward> in_sequence(const char* name,
                                                                      const char* dtypes) {
  using Args = IndexedAttentionForward;
  return {.name = name,
          .dtypes = dtypes,
          .declines = [](const Args& args, const Options& options) -> std::optional<std::string> {
            if (auto reason = kIndex->declines(core::indexer_of(args), options)) return reason;
            return kAttend->declines(core::attention_of(args), options);
          },
          .workspace_bytes = [](const Args& args) -> std::size_t {
            return std::max(kIndex->workspace_bytes(core::indexer_of(args)),
                            kAttend->workspace_bytes(core::attention_of(args)));
          },
          .run =
              [](const Args& args, std::span<std::byte> workspace, Stream stream) {
                kIndex->run(core::indexer_of(args), workspace, stream);
                kAttend->run(core::attention_of(args), workspace, stream);
              }};
}

}  // namespace msa::dispatch
