// SPDX-License-Identifier: Apache-2.0
//
// The judges judged: guard bands, comparisons and selections that are wrong must be found wrong.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <sstream>

#include "core/scalar.hpp"
#include "reference/reference.hpp"
#include "tests/support/bounds.hpp"
#include "tests/support/judge.hpp"
#include "tests/support/sample.hpp"
#include "tests/support/verify.hpp"

namespace msa::testing {
namespace {

TEST(Cases, HaveDistinctNamesAndPrintThemselves) {
  std::set<std::string> names;
  for (const Case& spec : all_cases()) {
    EXPECT_TRUE(names.insert(spec.name).second) << spec.name;
    std::ostringstream text;
    text << spec;
    EXPECT_EQ(text.str().find("{.name = \"" + spec.name + "\", .problem = {.num_q_heads = "), 0u);
  }
  std::ostringstream text;
  text << Case{.name = "x", .sequences = {{1, 2}, {0, 0}}, .keys = Keys::paged};
  EXPECT_EQ(
      text.str(),
      "{.name = \"x\", .problem = {.num_q_heads = 4, .num_kv_heads = 2, .head_dim = 64, "
      ".index_dim = 64, .block_size = 16, .top_k = 4, .num_init_blocks = 0, "
      ".num_local_blocks = 1}, .dtype = DType::f32, .sequences = {{1, 2}, {0, 0}}, .keys = "
      "Keys::paged, .values = Values::normal, .selection = Selection::indexer, "
      ".fp8 = Fp8::none, .index_codes = false, .give_offsets = true, .row_gap = 3, .seed = 1}");
}

TEST(GuardedTensor, FindsEveryWriteOutsideItsElements) {
  GuardedTensor tensor(DType::f32, {2, 3}, 2, GuardedTensor::kSentinel);
  set_values(tensor, {1, 2, 3, 4, 5, 6});
  EXPECT_EQ(tensor.damaged(), "");
  EXPECT_EQ(values_of(tensor), (std::vector<double>{1, 2, 3, 4, 5, 6}));
  // Rows of 3 elements and 2 of gap, then 2 more behind the second row's gap.
  for (const std::int64_t byte : {-1, -64, 12, 19, 32, 39, 47, 100}) {
    std::byte& target = static_cast<std::byte*>(tensor.view().data)[byte];
    target = std::byte{0};
    EXPECT_NE(tensor.damaged(), "") << byte;
    target = GuardedTensor::kSentinel;
    EXPECT_EQ(tensor.damaged(), "") << byte;
  }
}

TEST(GuardedTensor, ShiftedElementsLieOffTheAlignment) {
  GuardedTensor tensor(DType::bf16, {2, 3}, 1, GuardedTensor::kSentinel);
  set_values(tensor, {1, 2, 3, 4, 5, 6});
  GuardedTensor shifted = tensor.shifted(1);
  EXPECT_EQ(values_of(shifted), values_of(tensor));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(shifted.view().data) % 64, 2u);
  EXPECT_EQ(shifted.damaged(), "");
  EXPECT_EQ(shifted.changed(), "");
  EXPECT_EQ(values_of(shifted.clone()), values_of(tensor));
  static_cast<std::byte*>(shifted.view().data)[-1] ^= std::byte{1};
  EXPECT_NE(shifted.damaged(), "");
}

TEST(GuardedTensor, PoisonIsNanAndChangesAreFound) {
  for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16, DType::e4m3}) {
    GuardedTensor tensor(dtype, {2}, 1, GuardedTensor::kPoison);
    EXPECT_TRUE(std::isnan(core::load(tensor.view(), 1))) << name_of(dtype);
    tensor.seal();
    EXPECT_EQ(tensor.changed(), "");
    core::store(tensor.view(), 0.5, 1);
    EXPECT_NE(tensor.changed(), "");
    EXPECT_EQ(tensor.damaged(), "");
  }
}

TEST(Inputs, WhatNobodyMayReadIsNan) {
  // 20 keys of 2 pages: the second page's tail and two more pages belong to nobody.
  Inputs inputs(Case{.sequences = {{3, 20}}, .keys = Keys::paged});
  int nans = 0;
  for (const double x : values_of(inputs.k)) nans += std::isnan(x) ? 1 : 0;
  EXPECT_EQ(nans, (12 + 2 * 16) * 2 * 64);
  Inputs again(inputs.spec);
  EXPECT_EQ(inputs.k.difference(again.k), "");  // the seed says everything
  Case other = inputs.spec;
  other.seed += 2;
  Inputs different(other);
  EXPECT_NE(inputs.k.difference(different.k), "");
}

TEST(Compare, TellsWrongFromRounded) {
  const double infinity = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const core::Tensor reference(DType::f64, {4});
  const core::Tensor x(DType::f32, {4});
  const std::vector<double> bound(4, 0.125);
  const auto verdict = [&](const std::vector<double>& values) {
    set_values(x, values);
    return compare("x", x, reference, bound, 0.25).failure;
  };
  set_values(reference, {1.0, infinity, -infinity, nan});
  EXPECT_EQ(verdict({1.375, infinity, -infinity, nan}), "");
  EXPECT_NE(verdict({1.376, infinity, -infinity, nan}), "");
  EXPECT_NE(verdict({nan, infinity, -infinity, nan}), "");
  EXPECT_NE(verdict({infinity, infinity, -infinity, nan}), "");
  EXPECT_NE(verdict({1.0, -infinity, -infinity, nan}), "");
  EXPECT_NE(verdict({1.0, 1e30, -infinity, nan}), "");
  EXPECT_NE(verdict({1.0, infinity, nan, nan}), "");
  EXPECT_NE(verdict({1.0, infinity, -infinity, 0.0}), "");
}

/// The verdict on the output of a kernel that errs as `mistake` does to its arguments.
template <class Mistake>
std::string verdict_on_attention(DType dtype, Mistake mistake) {
  Inputs inputs(Case{.dtype = dtype, .sequences = {{9, 150}}});
  auto args = inputs.args<SparseAttentionForward>();
  const Outputs outputs(inputs, args);
  auto exact = inputs.args<SparseAttentionForward>();
  const Outputs exact_outputs(inputs, exact, /*wide=*/true);
  reference::sparse_attention_forward(exact);
  auto emulated = inputs.args<SparseAttentionForward>();
  const Outputs emulated_outputs(inputs, emulated);
  reference::sparse_attention_forward(emulated, reference::Rounding::bf16);
  const double allowance =
      dtype == DType::bf16 ? 2.0 * max_difference(emulated.out, exact.out) : 0.0;
  const AttentionBounds bounds = attention_bounds(args);
  mistake(args);
  reference::sparse_attention_forward(
      args, dtype == DType::bf16 ? reference::Rounding::bf16 : reference::Rounding::exact);
  return compare("out", args.out, exact.out, bounds.out, allowance).failure;
}

TEST(Verdict, FindsSmallMistakesOfAttention) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    SCOPED_TRACE(name_of(dtype));
    EXPECT_EQ(verdict_on_attention(dtype, [](SparseAttentionForward&) {}), "");
    // A scale that is off by 0.1 % in f32, 5 % in bf16.
    EXPECT_NE(verdict_on_attention(dtype,
                                   [dtype](SparseAttentionForward& args) {
                                     const float off = dtype == DType::f32 ? 1.001f : 1.05f;
                                     args.softmax_scale = 0.125f * off;
                                   }),
              "");
    // One selected block of one row missing.
    EXPECT_NE(verdict_on_attention(dtype,
                                   [](SparseAttentionForward& args) {
                                     core::store_i32(args.block_ids, -1, 1, 4, 2);
                                   }),
              "");
    // The value of one key lost.
    EXPECT_NE(verdict_on_attention(dtype,
                                   [](SparseAttentionForward& args) {
                                     for (std::int64_t d = 0; d < 64; ++d) {
                                       core::store(args.v, 0.0, 149, 0, d);
                                     }
                                   }),
              "");
  }
}

TEST(Verdict, FindsWrongSelections) {
  Inputs inputs(Case{.sequences = {{9, 150}}});
  auto exact = inputs.args<IndexerScores>();
  const Outputs exact_outputs(inputs, exact, /*wide=*/true);
  reference::indexer_scores(exact);
  auto args = inputs.args<Indexer>();
  const Outputs outputs(inputs, args);
  const std::vector<double> scores = values_of(exact.block_scores);
  const std::vector<double> band = score_bounds(args, inputs.num_blocks);
  const auto verdict = [&](const std::vector<std::int32_t>& ids) {
    reference::indexer(args);
    for (std::size_t slot = 0; slot < ids.size(); ++slot) {
      core::store_i32(args.block_ids, ids[slot], 1, 8, slot);
    }
    return check_selection(args, scores, band, inputs.num_blocks);
  };
  EXPECT_EQ(verdict({}), "");
  std::vector<std::int32_t> ids(4);
  for (std::size_t slot = 0; slot < 4; ++slot)
    ids[slot] = core::load_i32(args.block_ids, 1, 8, slot);
  EXPECT_EQ(verdict(ids), "");
  EXPECT_NE(verdict({ids[1], ids[0], ids[2], ids[3]}), "");  // not ascending
  EXPECT_NE(verdict({ids[0], ids[0], ids[2], ids[3]}), "");  // twice
  EXPECT_NE(verdict({ids[0], ids[1], ids[3], -1}), "");      // a free slot left empty
  EXPECT_NE(verdict({ids[0], ids[1], ids[2], 10}), "");      // beyond the last block
  std::int32_t worst = 0;
  std::int32_t unselected = -1;
  const std::size_t row = static_cast<std::size_t>((1 * 9 + 8) * inputs.num_blocks);
  for (std::int32_t b = 0; b < 9; ++b) {
    if (std::count(ids.begin(), ids.end(), b) == 0) unselected = b;
    if (scores[row + static_cast<std::size_t>(b)] < scores[row + static_cast<std::size_t>(worst)]) {
      worst = b;
    }
  }
  const auto with = [&](std::int32_t replaced, std::int32_t by) {
    std::vector<std::int32_t> changed = ids;
    std::replace(changed.begin(), changed.end(), replaced, by);
    std::sort(changed.begin(), changed.end());
    return verdict(changed);
  };
  EXPECT_NE(with(9, unselected), "");  // the local block missing
  EXPECT_NE(with(ids[0], worst), "");  // a worse block in a better one's place
}

TEST(Verdict, FindsTiesThatWentToTheHigherId) {
  Inputs inputs(Case{.sequences = {{1, 100}}, .values = Values::zeros});
  auto args = inputs.args<Indexer>();
  const Outputs outputs(inputs, args);
  reference::indexer(args);
  const std::vector<double> scores(static_cast<std::size_t>(2 * inputs.num_blocks), 0.0);
  const std::vector<double> none(scores.size(), 0.0);
  EXPECT_EQ(check_selection(args, scores, none, inputs.num_blocks), "");
  core::store_i32(args.block_ids, 3, 0, 0, 2);  // {0, 1, 3, 6} instead of {0, 1, 2, 6}
  EXPECT_NE(check_selection(args, scores, none, inputs.num_blocks), "");
  // With any doubt about the scores either choice is right.
  const std::vector<double> doubt(scores.size(), 1e-6);
  EXPECT_EQ(check_selection(args, scores, doubt, inputs.num_blocks), "");
}

// Rows of one element leave no room for a second special value.
TEST(Inputs, PlantSpecialValuesInsideRows) {
  for (const Values values : {Values::infinities, Values::nans}) {
    Case spec{.sequences = {{2, 20}}, .keys = Keys::paged, .values = values};
    spec.problem.head_dim = 1;
    spec.problem.index_dim = 1;
    const Inputs inputs(spec);
    for (const GuardedTensor* tensor : {&inputs.k, &inputs.v, &inputs.index_k}) {
      EXPECT_EQ(tensor->damaged(), "");
    }
  }
}

// Ragged keys, pages, missing pages, queries before the first key: a sample of the queries of a
// correct result passes, and its first row is the first row.
TEST(Verify, JudgesASampleOfRows) {
  for (const Keys keys : {Keys::ragged, Keys::paged, Keys::missing_pages}) {
    Inputs inputs(Case{.sequences = {{30, 200}, {0, 5}, {9, 4}, {20, 20}},
                       .keys = keys,
                       .selection = Selection::any_order});
    verify_all(inputs, "cpu",
               [](const char* operation, const Outcome& outcome) {
                 EXPECT_TRUE(outcome.ok()) << operation << ": " << outcome.detail;
               },
               {.max_rows = 12});
  }
  EXPECT_EQ(spread_rows(100, 1), std::vector<std::int64_t>{0});
  const std::vector<std::int64_t> rows = spread_rows(1000, 12);
  EXPECT_EQ(rows.front(), 0);
  EXPECT_EQ(rows.back(), 999);
  EXPECT_EQ(rows.size(), 12u);
  EXPECT_TRUE(std::is_sorted(rows.begin(), rows.end()));
  EXPECT_TRUE(spread_rows(0, 3).empty());
}

/// Verdicts of the CPU backend, and of the reference on rows, on a result of the reference that
/// `spoil` has changed.
template <class Args, class Run, class Spoil>
std::pair<std::string, std::string> verdicts_on_spoiled(const Case& spec, Run run, Spoil spoil) {
  Inputs inputs(spec);
  auto args = inputs.args<Args>();
  const Outputs outputs(inputs, args);
  run(args);
  spoil(args);
  const Arithmetic arithmetic = arithmetic_of("cuda_sm90", spec.dtype);
  const Sample<Args> sample(args, {3, 17, 30});
  return {judge_by_cpu(spec, args, arithmetic, inputs.num_blocks).failure,
          judge_by_reference(spec, sample.args(), arithmetic, inputs.num_blocks).failure};
}

TEST(Verdict, OfTheCpuBackendFindsWrongRows) {
  const Case spec{.dtype = DType::bf16, .sequences = {{40, 400}, {20, 20}}};
  const auto attend = [](auto& args) { reference::sparse_attention_forward(args); };
  using Attention = SparseAttentionForward;
  const auto untouched = verdicts_on_spoiled<Attention>(spec, attend, [](Attention&) {});
  EXPECT_EQ(untouched.first, "");
  EXPECT_EQ(untouched.second, "");
  // Row 17 made from three of its four blocks.
  const auto without_a_block = verdicts_on_spoiled<Attention>(spec, attend, [](Attention& args) {
    const std::int32_t id = core::load_i32(args.block_ids, 0, 17, 1);
    core::store_i32(args.block_ids, -1, 0, 17, 1);
    reference::sparse_attention_forward(args);
    core::store_i32(args.block_ids, id, 0, 17, 1);
  });
  EXPECT_NE(without_a_block.first, "");
  EXPECT_NE(without_a_block.second, "");
  // Heads exchanged in the values only: the LSE can't tell.
  const auto exchanged = verdicts_on_spoiled<Attention>(spec, attend, [](Attention& args) {
    for (std::int64_t d = 0; d < 64; ++d) {
      core::store(args.out, core::load(args.out, 30, 1, d), 30, 0, d);
    }
  });
  EXPECT_NE(exchanged.first, "");
  EXPECT_NE(exchanged.second, "");
  const auto select = [](Indexer& args) { reference::indexer(args); };
  EXPECT_EQ(verdicts_on_spoiled<Indexer>(spec, select, [](Indexer&) {}).first, "");
  const auto wrong_ids = verdicts_on_spoiled<Indexer>(spec, select, [](Indexer& args) {
    std::int64_t worst = 0;  // the first id that row 3 does not have, for its first
    for (std::int64_t slot = 0; slot < 4; ++slot) {
      if (core::load_i32(args.block_ids, 1, 3, slot) == worst) ++worst;
    }
    core::store_i32(args.block_ids, static_cast<std::int32_t>(worst), 1, 3, 0);
  });
  EXPECT_NE(wrong_ids.first, "");
  EXPECT_NE(wrong_ids.second, "");
}

TEST(Verify, ReportsAnUnknownBackendAsDeclined) {
  Inputs inputs(Case{.sequences = {{3, 20}}});
  const Outcome outcome = verify<Indexer>(inputs, "abacus");
  EXPECT_EQ(outcome.status, Outcome::Status::declined);
  EXPECT_NE(outcome.detail.find("abacus"), std::string::npos);
  EXPECT_EQ(verify<AppendKv>(inputs, "reference").status, Outcome::Status::not_applicable);
  EXPECT_STREQ(name_of(outcome.status), "declined");
}

}  // namespace
}  // namespace msa::testing
