// SPDX-License-Identifier: Apache-2.0
#include "core/sequences.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "core/tensor.hpp"
#include "msa/error.hpp"
#include "tests/support/inputs.hpp"

namespace msa::core {
namespace {

using testing::Case;
using testing::Inputs;
using testing::Keys;

const Case kRagged{.sequences = {{0, 3}, {2, 20}, {0, 0}, {5, 5}}};
const Case kPaged{.sequences = {{2, 20}, {2, 40}}, .keys = Keys::paged, .give_offsets = false};

template <class Args, class Change>
void expect_invalid(const Case& spec, Change change, const std::string& text) {
  Inputs inputs(spec);
  const auto args = inputs.args<Args>();
  ASSERT_NO_THROW(Sequences{args});
  change(inputs);
  try {
    const Sequences sequences(args);
    ADD_FAILURE() << "accepted; expected: " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    EXPECT_EQ(std::string(error.what()), text);
  }
}

TEST(Sequences, RaggedLayout) {
  Inputs inputs(kRagged);
  const Sequences sequences(inputs.args<DenseAttentionForward>());
  ASSERT_EQ(sequences.size(), 4);
  const Sequence second = sequences[1];
  EXPECT_EQ(second.batch_idx, 1);
  EXPECT_EQ(second.q_begin, 0);
  EXPECT_EQ(second.q_len, 2);
  EXPECT_EQ(second.k_begin, 3);
  EXPECT_EQ(second.k_len, 20);
  EXPECT_EQ(second.position(0), 18);
  EXPECT_EQ(sequences[2].q_len, 0);
  EXPECT_EQ(sequences[2].k_len, 0);
  EXPECT_EQ(sequences[3].k_begin, 23);
}

TEST(Sequences, OfQuerySkipsEmptyOnes) {
  Inputs inputs(kRagged);
  const Sequences sequences(inputs.args<DenseAttentionForward>());
  for (std::int64_t row = 0; row < 7; ++row) {
    EXPECT_EQ(sequences.of_query(row).batch_idx, row < 2 ? 1 : 3) << row;
  }
}

TEST(Sequences, PagedLayoutAndEqualQueryCounts) {
  Inputs inputs(kPaged);
  const Sequences sequences(inputs.args<DenseAttentionForward>());
  ASSERT_EQ(sequences.size(), 2);
  EXPECT_EQ(sequences[1].q_begin, 2);
  EXPECT_EQ(sequences[1].q_len, 2);
  EXPECT_EQ(sequences[1].k_begin, 0);
  EXPECT_EQ(sequences[1].k_len, 40);
  EXPECT_EQ(sequences.of_query(1).batch_idx, 0);
  EXPECT_EQ(sequences.of_query(2).batch_idx, 1);
}

TEST(Sequences, OneSequenceWithoutAnyOffsets) {
  Inputs inputs(Case{.sequences = {{3, 9}}, .give_offsets = false});
  const Sequences sequences(inputs.args<DenseAttentionForward>());
  ASSERT_EQ(sequences.size(), 1);
  EXPECT_EQ(sequences[0].q_len, 3);
  EXPECT_EQ(sequences[0].k_len, 9);
}

TEST(Sequences, BadOffsets) {
  using Args = DenseAttentionForward;
  expect_invalid<Args>(
      kRagged, [](Inputs& in) { store_i32(in.cu_seqlens_q.view(), 1, 0); },
      "DenseAttentionForward: cu_seqlens_q[0] is 1, expected 0");
  expect_invalid<Args>(
      kRagged, [](Inputs& in) { store_i32(in.cu_seqlens_k.view(), -1, 0); },
      "DenseAttentionForward: cu_seqlens_k[0] is -1, expected 0");
  expect_invalid<Args>(
      kRagged, [](Inputs& in) { store_i32(in.cu_seqlens_k.view(), 2, 2); },
      "DenseAttentionForward: cu_seqlens_k[2] is 2, smaller than the 3 before it");
  expect_invalid<Args>(
      kRagged, [](Inputs& in) { store_i32(in.cu_seqlens_q.view(), 8, 4); },
      "DenseAttentionForward: cu_seqlens_q ends with 8 but the packed tensor has 7 tokens");
  expect_invalid<Args>(
      kRagged, [](Inputs& in) { store_i32(in.cu_seqlens_k.view(), 27, 4); },
      "DenseAttentionForward: cu_seqlens_k ends with 27 but the packed tensor has 28 tokens");
}

TEST(Sequences, BadLengths) {
  expect_invalid<DenseAttentionForward>(
      kPaged, [](Inputs& in) { store_i32(in.seq_lens_k.view(), -1, 1); },
      "DenseAttentionForward: sequence 1 has -1 keys, expected 0 to 64 (page_table columns or "
      "max_seq_len_k)");
  expect_invalid<AppendKv>(
      kPaged, [](Inputs& in) { store_i32(in.seq_lens_k.view(), 65, 0); },
      "AppendKv: sequence 0 has 65 keys, expected 0 to 64 (page_table columns or max_seq_len_k)");
  Case hinted = kPaged;
  hinted.seed = 2;  // even seeds give max_seq_len_k
  expect_invalid<Indexer>(
      hinted, [](Inputs& in) { store_i32(in.seq_lens_k.view(), 41, 0); },
      "Indexer: sequence 0 has 41 keys, expected 0 to 40 (page_table columns or max_seq_len_k)");
}

TEST(Sequences, OffsetsThatPointPastNoKeysAtAll) {
  Inputs inputs(Case{.sequences = {{2, 0}}});
  auto args = inputs.args<DenseAttentionForward>();
  store_i32(inputs.cu_seqlens_k.view(), 5, 1);
  EXPECT_THROW(Sequences{args}, Error);
}

TEST(BlockRows, RaggedAndPaged) {
  Inputs ragged(kRagged);
  const auto ragged_args = ragged.args<DenseAttentionForward>();
  const Sequence sequence = Sequences(ragged_args)[1];
  const BlockRows rows = block_rows(ragged_args.k, ragged_args.batch, 16, sequence, 1, 1);
  EXPECT_EQ(rows.offset, offset_of(ragged_args.k, 3 + 16, 1));
  EXPECT_EQ(rows.token_stride, ragged_args.k.stride[0]);
  EXPECT_EQ(rows.num_tokens, 4);

  Inputs paged(kPaged);
  const auto paged_args = paged.args<DenseAttentionForward>();
  const Sequence second = Sequences(paged_args)[1];
  const std::int32_t page = load_i32(paged_args.batch.page_table, 1, 2);
  const BlockRows in_page = block_rows(paged_args.k, paged_args.batch, 16, second, 1, 2);
  EXPECT_EQ(in_page.offset, offset_of(paged_args.k, page, 1));
  EXPECT_EQ(in_page.token_stride, paged_args.k.stride[2]);
  EXPECT_EQ(in_page.num_tokens, 8);
  for (const std::int32_t bad : {-1, static_cast<std::int32_t>(paged_args.k.shape[0])}) {
    store_i32(paged.page_table.view(), bad, 1, 2);
    EXPECT_EQ(block_rows(paged_args.k, paged_args.batch, 16, second, 1, 2).num_tokens, 0);
  }
}

TEST(BlockRows, OneTokenHasNoStride) {
  Inputs inputs(kRagged);
  auto args = inputs.args<DenseAttentionForward>();
  const Sequence sequence = Sequences(args)[0];
  args.k.shape[0] = 1;
  args.k.stride[0] = std::numeric_limits<std::int64_t>::max();
  EXPECT_EQ(block_rows(args.k, args.batch, 16, sequence, 1, 0).token_stride, 0);
}

}  // namespace
}  // namespace msa::core
