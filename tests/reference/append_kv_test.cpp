// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "core/scalar.hpp"
#include "reference/reference.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

/// One head of dimension 1, pages of 16 tokens full of -1; token i of the call holds 100 + i.
struct Append {
  Append(const std::vector<double>& table, const std::vector<double>& lengths, std::int64_t total_q,
         std::int64_t num_pages)
      : batch_size(static_cast<std::int64_t>(lengths.size())),
        page_table(DType::i32, {batch_size, static_cast<std::int64_t>(table.size()) / batch_size}),
        seq_lens_k(DType::i32, {batch_size}),
        rows(DType::f64, {total_q, 1, 1}),
        pages(DType::f64, {num_pages, 1, 16, 1}) {
    set_values(page_table, table);
    set_values(seq_lens_k, lengths);
    std::vector<double> values;
    for (std::int64_t i = 0; i < total_q; ++i) values.push_back(100.0 + static_cast<double>(i));
    set_values(rows, values);
    set_values(pages, std::vector<double>(static_cast<std::size_t>(num_pages * 16), -1.0));
  }

  /// Positions that changed, as page * 16 + row, with what they hold.
  std::vector<std::pair<int, double>> run() {
    const Problem problem{.num_q_heads = 1,
                          .num_kv_heads = 1,
                          .head_dim = 1,
                          .index_dim = 1,
                          .block_size = 16,
                          .top_k = 1};
    reference::append_kv({.problem = problem,
                          .batch = {.page_table = page_table, .seq_lens_k = seq_lens_k},
                          .v = rows,
                          .v_pages = pages});
    std::vector<std::pair<int, double>> written;
    const std::vector<double> values = values_of(pages);
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (values[i] != -1.0) written.emplace_back(static_cast<int>(i), values[i]);
    }
    return written;
  }

  std::int64_t batch_size;
  core::Tensor page_table, seq_lens_k, rows, pages;
};

using Written = std::vector<std::pair<int, double>>;

TEST(AppendKv, NewestTokensGoToTheEndOfTheSequence) {
  EXPECT_EQ(Append({2, 0}, {18}, 3, 3).run(),
            (Written{{0 * 16 + 0, 101.0}, {0 * 16 + 1, 102.0}, {2 * 16 + 15, 100.0}}));
}

TEST(AppendKv, SequencesShareTheCallEqually) {
  EXPECT_EQ(Append({1, 0}, {3, 7}, 2, 2).run(), (Written{{0 * 16 + 6, 101.0}, {16 + 2, 100.0}}));
}

TEST(AppendKv, TokensWithoutAPageAreDropped) {
  EXPECT_EQ(Append({-1, 1}, {17}, 2, 2).run(), (Written{{16, 101.0}}));
  EXPECT_EQ(Append({2, 1}, {17}, 2, 2).run(), (Written{{16, 101.0}}));
}

TEST(AppendKv, TokensBeforeTheFirstPositionAreDropped) {
  // Row -1 of page 1 would be the last of page 0.
  EXPECT_EQ(Append({1}, {2}, 5, 2).run(), (Written{{16, 103.0}, {17, 104.0}}));
}

TEST(AppendKv, ConvertsToTheDTypeOfThePages) {
  Inputs inputs(Case{.sequences = {{3, 20}}, .keys = Keys::paged});
  auto args = inputs.args<AppendKv>();
  const Outputs outputs(inputs, args);
  const core::Tensor pages(DType::bf16, {args.k_pages.shape[0], 2, 16, 64});
  args.k_pages = pages;
  reference::append_kv(args);
  const std::int32_t page = core::load_i32(args.batch.page_table, 0, 1);
  const double value = core::load(args.k, 2, 1, 5);
  core::Tensor rounded(DType::bf16, {1});
  core::store(rounded.view(), value, 0);
  EXPECT_EQ(core::load(args.k_pages, page, 1, 3, 5), core::load(rounded.view(), 0));
}

TEST(AppendKv, EachPairIsOptional) {
  for (int only = 0; only < 3; ++only) {
    Inputs inputs(Case{.sequences = {{3, 20}}, .keys = Keys::paged});
    auto all = inputs.args<AppendKv>();
    const Outputs expected(inputs, all);
    reference::append_kv(all);
    auto args = inputs.args<AppendKv>();
    const Outputs outputs(inputs, args);
    if (only != 0) args.k = args.k_pages = {};
    if (only != 1) args.v = args.v_pages = {};
    if (only != 2) args.index_k = args.index_k_pages = {};
    reference::append_kv(args);
    const auto& pages = only == 0 ? args.k_pages : only == 1 ? args.v_pages : args.index_k_pages;
    const auto& same = only == 0 ? all.k_pages : only == 1 ? all.v_pages : all.index_k_pages;
    const std::int32_t page = core::load_i32(args.batch.page_table, 0, 1);
    for (std::int64_t d = 0; d < 64; ++d) {
      EXPECT_EQ(core::load(pages, page, 0, 1, d), core::load(same, page, 0, 1, d));
    }
    EXPECT_NE(outputs.difference(expected), "");  // the two others were left alone
  }
}

}  // namespace
}  // namespace msa::testing
