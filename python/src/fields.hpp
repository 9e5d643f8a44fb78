// SPDX-License-Identifier: Apache-2.0
//
// The fields of each argument struct by name, as set_tensor() and set_float() know them. A test
// compares them with the dataclasses of python/msa_cpp/operations.py.
#pragma once

#include <array>

#include "msa/indexed_attention.hpp"

namespace msa_python {

template <class Owner, class Type>
struct Field {
  const char* name = nullptr;
  Type Owner::* member = nullptr;
};

template <class Args>
using TensorField = Field<Args, msa::TensorView>;
template <class Args>
using FloatField = Field<Args, float>;

inline constexpr TensorField<msa::Batch> kBatchTensors[] = {
    {"cu_seqlens_q", &msa::Batch::cu_seqlens_q},
    {"cu_seqlens_k", &msa::Batch::cu_seqlens_k},
    {"page_table", &msa::Batch::page_table},
    {"seq_lens_k", &msa::Batch::seq_lens_k},
};

template <class Args>
struct Fields;

template <>
struct Fields<msa::IndexerScores> {
  using A = msa::IndexerScores;
  static constexpr TensorField<A> tensors[] = {
      {"index_q", &A::index_q}, {"index_k", &A::index_k}, {"block_scores", &A::block_scores}};
  static constexpr FloatField<A> floats[] = {{"index_scale", &A::index_scale}};
};

template <>
struct Fields<msa::SelectTopK> {
  using A = msa::SelectTopK;
  static constexpr TensorField<A> tensors[] = {{"block_scores", &A::block_scores},
                                               {"block_ids", &A::block_ids}};
  static constexpr std::array<FloatField<A>, 0> floats{};
};

template <>
struct Fields<msa::Indexer> {
  using A = msa::Indexer;
  static constexpr TensorField<A> tensors[] = {{"index_q", &A::index_q},
                                               {"index_k", &A::index_k},
                                               {"index_k_codes", &A::index_k_codes},
                                               {"index_k_scales", &A::index_k_scales},
                                               {"block_ids", &A::block_ids}};
  static constexpr std::array<FloatField<A>, 0> floats{};
};

template <>
struct Fields<msa::SparseAttentionForward> {
  using A = msa::SparseAttentionForward;
  static constexpr TensorField<A> tensors[] = {{"q", &A::q},
                                               {"k", &A::k},
                                               {"v", &A::v},
                                               {"block_ids", &A::block_ids},
                                               {"out", &A::out},
                                               {"lse", &A::lse},
                                               {"k_scale", &A::k_scale},
                                               {"v_scale", &A::v_scale}};
  static constexpr FloatField<A> floats[] = {{"softmax_scale", &A::softmax_scale}};
};

template <>
struct Fields<msa::IndexedAttentionForward> {
  using A = msa::IndexedAttentionForward;
  static constexpr TensorField<A> tensors[] = {{"index_q", &A::index_q},
                                               {"index_k", &A::index_k},
                                               {"index_k_codes", &A::index_k_codes},
                                               {"index_k_scales", &A::index_k_scales},
                                               {"q", &A::q},
                                               {"k", &A::k},
                                               {"v", &A::v},
                                               {"block_ids", &A::block_ids},
                                               {"out", &A::out},
                                               {"lse", &A::lse},
                                               {"k_scale", &A::k_scale},
                                               {"v_scale", &A::v_scale}};
  static constexpr FloatField<A> floats[] = {{"softmax_scale", &A::softmax_scale}};
};

template <>
struct Fields<msa::DenseAttentionForward> {
  using A = msa::DenseAttentionForward;
  static constexpr TensorField<A> tensors[] = {{"q", &A::q},
                                               {"k", &A::k},
                                               {"v", &A::v},
                                               {"out", &A::out},
                                               {"lse", &A::lse},
                                               {"k_scale", &A::k_scale},
                                               {"v_scale", &A::v_scale}};
  static constexpr FloatField<A> floats[] = {{"softmax_scale", &A::softmax_scale}};
};

template <>
struct Fields<msa::SparseAttentionBackward> {
  using A = msa::SparseAttentionBackward;
  static constexpr TensorField<A> tensors[] = {
      {"q", &A::q},     {"k", &A::k},     {"v", &A::v},       {"block_ids", &A::block_ids},
      {"out", &A::out}, {"lse", &A::lse}, {"dout", &A::dout}, {"dq", &A::dq},
      {"dk", &A::dk},   {"dv", &A::dv}};
  static constexpr FloatField<A> floats[] = {{"softmax_scale", &A::softmax_scale}};
};

template <>
struct Fields<msa::IndexerKlBackward> {
  using A = msa::IndexerKlBackward;
  static constexpr TensorField<A> tensors[] = {{"q", &A::q},
                                               {"k", &A::k},
                                               {"index_q", &A::index_q},
                                               {"index_k", &A::index_k},
                                               {"block_ids", &A::block_ids},
                                               {"loss", &A::loss},
                                               {"dindex_q", &A::dindex_q},
                                               {"dindex_k", &A::dindex_k},
                                               {"lse", &A::lse}};
  static constexpr FloatField<A> floats[] = {{"softmax_scale", &A::softmax_scale},
                                             {"index_scale", &A::index_scale},
                                             {"loss_coefficient", &A::loss_coefficient}};
};

template <>
struct Fields<msa::AppendKv> {
  using A = msa::AppendKv;
  static constexpr TensorField<A> tensors[] = {{"k", &A::k},
                                               {"v", &A::v},
                                               {"index_k", &A::index_k},
                                               {"k_pages", &A::k_pages},
                                               {"v_pages", &A::v_pages},
                                               {"index_k_pages", &A::index_k_pages},
                                               {"index_k_codes_pages", &A::index_k_codes_pages},
                                               {"index_k_scales_pages", &A::index_k_scales_pages}};
  static constexpr std::array<FloatField<A>, 0> floats{};
};

template <>
struct Fields<msa::NormRopeAppendKv> {
  using A = msa::NormRopeAppendKv;
  static constexpr TensorField<A> tensors[] = {{"q", &A::q},
                                               {"k", &A::k},
                                               {"v", &A::v},
                                               {"index_q", &A::index_q},
                                               {"index_k", &A::index_k},
                                               {"q_weight", &A::q_weight},
                                               {"k_weight", &A::k_weight},
                                               {"index_q_weight", &A::index_q_weight},
                                               {"index_k_weight", &A::index_k_weight},
                                               {"cos_sin", &A::cos_sin},
                                               {"positions", &A::positions},
                                               {"q_out", &A::q_out},
                                               {"index_q_out", &A::index_q_out},
                                               {"k_pages", &A::k_pages},
                                               {"v_pages", &A::v_pages},
                                               {"index_k_pages", &A::index_k_pages},
                                               {"index_k_codes_pages", &A::index_k_codes_pages},
                                               {"index_k_scales_pages", &A::index_k_scales_pages},
                                               {"k_scale", &A::k_scale},
                                               {"v_scale", &A::v_scale}};
  static constexpr FloatField<A> floats[] = {{"norm_eps", &A::norm_eps},
                                             {"norm_weight_offset", &A::norm_weight_offset}};
};

}  // namespace msa_python
