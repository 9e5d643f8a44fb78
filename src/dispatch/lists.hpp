// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <span>

#include "core/implementation.hpp"
#include "core/indexed_attention.hpp"

namespace msa::dispatch {

/// The ordered list of an operation's implementations, best first, the reference last.
template <class Args>
std::span<const detail::Implementation<Args>* const> implementations_of();

/// Calls visit(Args{}) for every operation of the library.
template <class Visit>
void for_each_operation(Visit visit) {
  visit(IndexerScores{});
  visit(SelectTopK{});
  visit(Indexer{});
  visit(SparseAttentionForward{});
  visit(IndexedAttentionForward{});
  visit(DenseAttentionForward{});
  visit(SparseAttentionBackward{});
  visit(IndexerKlBackward{});
  visit(AppendKv{});
  visit(NormRopeAppendKv{});
}

}  // namespace msa::dispatch
