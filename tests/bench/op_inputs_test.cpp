// SPDX-License-Identifier: Apache-2.0
//
// A benchmark is as good as its count of necessary work: here against counting one by one.
#include "bench/op_inputs.hpp"

#include <gtest/gtest.h>

#include <set>
#include <tuple>
#include <vector>

#include "msa/msa.hpp"

namespace msa::bench {
namespace {

const Problem kProblem{.num_q_heads = 4,
                       .num_kv_heads = 2,
                       .head_dim = 32,
                       .index_dim = 16,
                       .block_size = 16,
                       .top_k = 4};

Shape shape(std::int64_t batch_size, std::int64_t seq_len_q, std::int64_t seq_len_k) {
  return {.name = "test",
          .problem = kProblem,
          .batch_size = batch_size,
          .seq_len_q = seq_len_q,
          .seq_len_k = seq_len_k};
}

template <class Args>
void run(const Op<Args>& op) {
  const auto plan = msa::plan(op.args);
  const core::HostBuffer workspace(plan.workspace_bytes());
  plan.run(op.args, workspace.span());
}

std::vector<std::int32_t> ids_of(const Inputs& in) {
  const TensorView view = in.select().args.block_ids;
  const auto* ids = static_cast<const std::int32_t*>(view.data);
  return {ids, ids + view.num_elements()};
}

TEST(OpInputs, WorkIsThatOfVisiblePairs) {
  Inputs in(shape(3, 5, 70));
  in.add_index(kRandom);
  in.add_scores();
  in.add_ids();
  in.add_attention();
  double pairs = 0.0;
  for (int query = 0; query < 5; ++query) {
    for (int key = 0; key < 70; ++key) pairs += key <= 65 + query ? 1.0 : 0.0;
  }
  pairs *= 3.0;
  EXPECT_EQ(in.index_scores().work.flops, 2 * 16 * 2 * pairs);
  EXPECT_EQ(in.indexer().work.flops, 2 * 16 * 2 * pairs);
  EXPECT_EQ(in.dense().work.flops, 4 * 32 * 4 * pairs);
  // bf16 but for ids and scores: 15 queries of 2 heads of 16, 3 x 70 keys of 16, ids.
  EXPECT_EQ(in.indexer().work.bytes, 2 * 15 * 2 * 16 + 2 * 3 * 70 * 16 + 4 * 2 * 15 * 4);
  // q and out, 3 x 70 tokens of K and V.
  EXPECT_EQ(in.dense().work.bytes, 2 * 2 * 15 * 4 * 32 + 2 * 2 * 3 * 70 * 2 * 32);
}

TEST(OpInputs, SparseWorkIsThatOfTheIds) {
  Inputs in(shape(2, 5, 70));
  in.add_attention();
  in.add_selection(kWeak);
  const std::vector<std::int32_t> ids = ids_of(in);
  double attended = 0.0;
  std::set<std::tuple<int, int, int>> tokens;  // KV head, sequence, position
  std::size_t slot = 0;
  for (int head = 0; head < 2; ++head) {
    for (int query = 0; query < 10; ++query) {
      for (int i = 0; i < 4; ++i, ++slot) {
        for (int t = ids[slot] * 16; ids[slot] >= 0 && t < (ids[slot] + 1) * 16; ++t) {
          if (t > 65 + query % 5) continue;
          attended += 1.0;
          tokens.insert({head, query / 5, t});
        }
      }
    }
  }
  EXPECT_EQ(in.sparse().work.flops, 4 * 32 * 2 * attended);
  EXPECT_EQ(in.sparse().work.bytes,
            2 * 2 * 10 * 4 * 32 + 4 * 2 * 10 * 4 + 2 * 2 * 32 * static_cast<double>(tokens.size()));
}

TEST(OpInputs, CodesAndAppendingKeepTheSelection) {
  Inputs in(shape(2, 1, 16 * 40));
  in.add_index(kRealLike);
  in.add_attention();
  in.add_new_tokens();
  in.add_ids();
  run(in.indexer());
  const std::vector<std::int32_t> before = ids_of(in);
  run(in.append());
  run(in.indexer());
  EXPECT_EQ(ids_of(in), before);
  const double bytes = in.indexer().work.bytes;
  in.add_codes();
  run(in.append());
  run(in.indexer());
  EXPECT_EQ(ids_of(in), before);
  // Of a key of 16 elements: codes and two bf16, not 16 bf16.
  EXPECT_EQ(bytes - in.indexer().work.bytes, 2.0 * 16 * 40 * (2 * 16 - (16 + 4)));
}

TEST(OpInputs, ChunksSelectAsTheWholePromptDoes) {
  constexpr std::int64_t kTokens = 16 * 24;
  Inputs whole(shape(1, kTokens, kTokens));
  whole.add_index(kRealLike);
  whole.add_ids();
  run(whole.indexer());
  const std::vector<std::int32_t> expected = ids_of(whole);

  Inputs chunk(shape(1, 32, kTokens));
  chunk.add_attention();
  chunk.add_index(kRealLike, kTokens);
  chunk.add_new_tokens();
  chunk.add_scores();
  chunk.add_ids();
  double flops = 0.0;
  for (std::int64_t first = 0; first < kTokens; first += 32) {
    chunk.move_to(first);
    run(chunk.append());
    run(chunk.index_scores());
    run(chunk.select());
    flops += chunk.index_scores().work.flops;
    const std::vector<std::int32_t> ids = ids_of(chunk);
    for (std::int64_t head = 0; head < 2; ++head) {
      for (std::int64_t i = 0; i < 32 * 4; ++i) {
        ASSERT_EQ(ids[static_cast<std::size_t>(head * 32 * 4 + i)],
                  expected[static_cast<std::size_t>((head * kTokens + first) * 4 + i)])
            << "chunk at " << first << ", head " << head << ", slot " << i;
      }
    }
  }
  EXPECT_EQ(flops, whole.indexer().work.flops);
}

TEST(OpInputs, FamiliesDifferInOverlap) {
  const auto overlap_of_indexer = [](const SelectionFamily& family) {
    Inputs in(shape(1, 64, 16 * 64));
    in.add_index(family);
    in.add_ids();
    run(in.indexer());
    return in.overlap4();
  };
  Inputs drawn(shape(1, 64, 16 * 64));
  drawn.add_selection(kRandom);
  EXPECT_GT(overlap_of_indexer(kRandom), overlap_of_indexer(kRealLike));
  EXPECT_GE(overlap_of_indexer(kRealLike), 1.0);
  EXPECT_LE(drawn.overlap4(), 4.0);
}

}  // namespace
}  // namespace msa::bench
