// SPDX-License-Identifier: Apache-2.0
//
// What the library must know of an operation beside its kernel: its name, its tensors, its shape
// rules. A new operation adds one struct in ops.hpp and one block here and in operation.cpp.
#pragma once

#include "msa/ops.hpp"

namespace msa::core {

/// How an operation uses a tensor.
enum class Use { input, output };

constexpr const char* operation_name(const IndexerScores&) { return "IndexerScores"; }
constexpr const char* operation_name(const SelectTopK&) { return "SelectTopK"; }
constexpr const char* operation_name(const Indexer&) { return "Indexer"; }
constexpr const char* operation_name(const SparseAttentionForward&) {
  return "SparseAttentionForward";
}
constexpr const char* operation_name(const DenseAttentionForward&) {
  return "DenseAttentionForward";
}
constexpr const char* operation_name(const SparseAttentionBackward&) {
  return "SparseAttentionBackward";
}
constexpr const char* operation_name(const IndexerKlBackward&) { return "IndexerKlBackward"; }
constexpr const char* operation_name(const AppendKv&) { return "AppendKv"; }
constexpr const char* operation_name(const NormRopeAppendKv&) { return "NormRopeAppendKv"; }

/// Calls visit(name, view, use) for every tensor field, Batch first.
template <class Visit>
void for_each_tensor(const Batch& batch, Visit visit) {
  visit("cu_seqlens_q", batch.cu_seqlens_q, Use::input);
  visit("cu_seqlens_k", batch.cu_seqlens_k, Use::input);
  visit("page_table", batch.page_table, Use::input);
  visit("seq_lens_k", batch.seq_lens_k, Use::input);
}

template <class Visit>
void for_each_tensor(const IndexerScores& args, Visit visit) {
  for_each_tensor(args.batch, visit);
  visit("index_q", args.index_q, Use::input);
  visit("index_k", args.index_k, Use::input);
  visit("block_scores", args.block_scores, Use::output);
}

template <class Visit>
void for_each_tensor(const SelectTopK& args, Visit visit) {
  for_each_tensor(args.batch, visit);
  visit("block_scores", args.block_scores, Use::input);
  visit("block_ids", args.block_ids, Use::output);
}

template <class Visit>
void for_each_tensor(const Indexer& args, Visit visit) {
  for_each_tensor(args.batch, visit);
  visit("index_q", args.index_q, Use::input);
  visit("index_k", args.index_k, Use::input);
  visit("index_k_codes", args.index_k_codes, Use::input);
  visit("index_k_scales", args.index_k_scales, Use::input);
  visit("block_ids", args.block_ids, Use::output);
}

template <class Visit>
void for_each_tensor(const SparseAttentionForward& args, Visit visit) {
  for_each_tensor(args.batch, visit);
  visit("q", args.q, Use::input);
  visit("k", args.k, Use::input);
  visit("v", args.v, Use::input);
  visit("block_ids", args.block_ids, Use::input);
  visit("out", args.out, Use::output);
  visit("lse", args.lse, Use::output);
  visit("k_scale", args.k_scale, Use::input);
  visit("v_scale", args.v_scale, Use::input);
}

template <class Visit>
void for_each_tensor(const DenseAttentionForward& args, Visit visit) {
  for_each_tensor(args.batch, visit);
  visit("q", args.q, Use::input);
  visit("k", args.k, Use::input);
  visit("v", args.v, Use::input);
  visit("out", args.out, Use::output);
  visit("lse", args.lse, Use::output);
  visit("k_scale", args.k_scale, Use::input);
  visit("v_scale", args.v_scale, Use::input);
}

template <class Visit>
void for_each_tensor(const SparseAttentionBackward& args, Visit visit) {
  for_each_tensor(args.batch, visit);
  visit("q", args.q, Use::input);
  visit("k", args.k, Use::input);
  visit("v", args.v, Use::input);
  visit("block_ids", args.block_ids, Use::input);
  visit("out", args.out, Use::input);
  visit("lse", args.lse, Use::input);
  visit("dout", args.dout, Use::input);
  visit("dq", args.dq, Use::output);
  visit("dk", args.dk, Use::output);
  visit("dv", args.dv, Use::output);
}

template <class Visit>
void for_each_tensor(const IndexerKlBackward& args, Visit visit) {
  for_each_tensor(args.batch, visit);
  visit("q", args.q, Use::input);
  visit("k", args.k, Use::input);
  visit("index_q", args.index_q, Use::input);
  visit("index_k", args.index_k, Use::input);
  visit("block_ids", args.block_ids, Use::input);
  visit("loss", args.loss, Use::output);
  visit("dindex_q", args.dindex_q, Use::output);
  visit("dindex_k", args.dindex_k, Use::output);
  visit("lse", args.lse, Use::input);
}

template <class Visit>
void for_each_tensor(const AppendKv& args, Visit visit) {
  for_each_tensor(args.batch, visit);
  visit("k", args.k, Use::input);
  visit("v", args.v, Use::input);
  visit("index_k", args.index_k, Use::input);
  visit("k_pages", args.k_pages, Use::output);
  visit("v_pages", args.v_pages, Use::output);
  visit("index_k_pages", args.index_k_pages, Use::output);
  visit("index_k_codes_pages", args.index_k_codes_pages, Use::output);
  visit("index_k_scales_pages", args.index_k_scales_pages, Use::output);
}

template <class Visit>
void for_each_tensor(const NormRopeAppendKv& args, Visit visit) {
  for_each_tensor(args.batch, visit);
  visit("q", args.q, Use::input);
  visit("k", args.k, Use::input);
  visit("v", args.v, Use::input);
  visit("index_q", args.index_q, Use::input);
  visit("index_k", args.index_k, Use::input);
  visit("q_weight", args.q_weight, Use::input);
  visit("k_weight", args.k_weight, Use::input);
  visit("index_q_weight", args.index_q_weight, Use::input);
  visit("index_k_weight", args.index_k_weight, Use::input);
  visit("cos_sin", args.cos_sin, Use::input);
  visit("positions", args.positions, Use::input);
  visit("q_out", args.q_out, Use::output);
  visit("index_q_out", args.index_q_out, Use::output);
  visit("k_pages", args.k_pages, Use::output);
  visit("v_pages", args.v_pages, Use::output);
  visit("index_k_pages", args.index_k_pages, Use::output);
  visit("index_k_codes_pages", args.index_k_codes_pages, Use::output);
  visit("index_k_scales_pages", args.index_k_scales_pages, Use::output);
  visit("k_scale", args.k_scale, Use::input);
  visit("v_scale", args.v_scale, Use::input);
}

/// Throw Error(invalid_argument) naming the field, its shape and the expected one.
void validate(const IndexerScores&);
void validate(const SelectTopK&);
void validate(const Indexer&);
void validate(const SparseAttentionForward&);
void validate(const DenseAttentionForward&);
void validate(const SparseAttentionBackward&);
void validate(const IndexerKlBackward&);
void validate(const AppendKv&);
void validate(const NormRopeAppendKv&);

/// The number of packed queries of a validated request.
template <class Args>
std::int64_t total_q(const Args& args) {
  if constexpr (requires { args.k_pages; }) {
    return args.k.given()   ? args.k.shape[0]
           : args.v.given() ? args.v.shape[0]
                            : args.index_k.shape[0];
  } else if constexpr (requires { args.q; }) {
    return args.q.shape[0];
  } else if constexpr (requires { args.index_q; }) {
    return args.index_q.shape[0];
  } else {
    return args.block_scores.shape[1];
  }
}

/// The tensor whose leading axis holds the keys (or pages); rank 0 where the operation reads none.
template <class Args>
TensorView key_tensor(const Args& args) {
  if constexpr (requires { args.k_pages; }) {
    return args.k_pages.given()   ? args.k_pages
           : args.v_pages.given() ? args.v_pages
                                  : args.index_k_pages;
  } else if constexpr (requires { args.k; }) {
    return args.k;
  } else if constexpr (requires { args.index_k; }) {
    return args.index_k;
  } else {
    return {};
  }
}

}  // namespace msa::core
