// SPDX-License-Identifier: Apache-2.0
//
// What operation.hpp has of the other operations, for IndexedAttentionForward, and the two
// operations that it consists of.
#pragma once

#include "core/operation.hpp"
#include "msa/indexed_attention.hpp"

/// apply(Args) for every operation of the library.
// clang-format off
#define MSA_FOR_EACH_OPERATION(apply) \
  apply(IndexerScores) \
  apply(SelectTopK) \
  apply(Indexer) \
  apply(SparseAttentionForward) \
  apply(IndexedAttentionForward) \
  apply(DenseAttentionForward) \
  apply(SparseAttentionBackward) \
  apply(IndexerKlBackward) \
  apply(AppendKv) \
  apply(NormRopeAppendKv)
// clang-format on

namespace msa::core {

constexpr const char* operation_name(const IndexedAttentionForward&) {
  return "IndexedAttentionForward";
}

template <class Visit>
void for_each_tensor(const IndexedAttentionForward& args, Visit visit) {
  for_each_tensor(args.batch, visit);
  visit("index_q", args.index_q, Use::input);
  visit("index_k", args.index_k, Use::input);
  visit("index_k_codes", args.index_k_codes, Use::input);
  visit("index_k_scales", args.index_k_scales, Use::input);
  visit("q", args.q, Use::input);
  visit("k", args.k, Use::input);
  visit("v", args.v, Use::input);
  visit("block_ids", args.block_ids, Use::output);
  visit("out", args.out, Use::output);
  visit("lse", args.lse, Use::output);
  visit("k_scale", args.k_scale, Use::input);
  visit("v_scale", args.v_scale, Use::input);
}

void validate(const IndexedAttentionForward&);

inline Indexer indexer_of(const IndexedAttentionForward& args) {
  return {.problem = args.problem,
          .batch = args.batch,
          .index_q = args.index_q,
          .index_k = args.index_k,
          .index_k_codes = args.index_k_codes,
          .index_k_scales = args.index_k_scales,
          .block_ids = args.block_ids};
}

inline SparseAttentionForward attention_of(const IndexedAttentionForward& args) {
  return {.problem = args.problem,
          .batch = args.batch,
          .q = args.q,
          .k = args.k,
          .v = args.v,
          .block_ids = args.block_ids,
          .softmax_scale = args.softmax_scale,
          .out = args.out,
          .lse = args.lse,
          .k_scale = args.k_scale,
          .v_scale = args.v_scale};
}

}  // namespace msa::core
