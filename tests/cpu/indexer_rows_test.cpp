// SPDX-License-Identifier: Apache-2.0
//
// The Indexer on the adversarial rows of score_patterns.hpp. With index_dim 1 and queries of 1 and
// -1 the score of a token is its index key or the negative, exactly, so every row equals the
// reference's.
#include <algorithm>
#include <random>
#include <vector>

#include "core/tensor.hpp"
#include "msa/msa.hpp"
#include "reference/reference.hpp"
#include "tests/cpu/score_patterns.hpp"
#include "tests/cpu/targets.hpp"

namespace msa::testing {
namespace {

using core::Tensor;

void expect_equal_selections(std::int64_t narrowest, std::int64_t widest) {
  constexpr std::int64_t kBlock = 16;
  constexpr float kQueries[] = {1.0f, -1.0f, 0.0f};
  const auto num_patterns = static_cast<std::int64_t>(patterns().size());
  std::mt19937 random(1);
  for (const std::int64_t width : kWidths) {
    if (width < narrowest || width > widest) continue;
    SCOPED_TRACE(width);
    // One sequence per pattern, the three queries at its end; lengths are ragged.
    const Tensor offsets_q(DType::i32, {num_patterns + 1});
    const Tensor offsets_k(DType::i32, {num_patterns + 1});
    std::vector<float> keys;
    for (std::int64_t n = 0; n < num_patterns; ++n) {
      const std::int64_t tokens = std::max<std::int64_t>(width * kBlock - n * 7 % 37, 0);
      for (std::int64_t block = 0; block * kBlock < tokens; ++block) {
        const float value = patterns()[static_cast<std::size_t>(n)].value(block, width, random);
        const std::int64_t count = std::min(kBlock, tokens - block * kBlock);
        keys.insert(keys.end(), static_cast<std::size_t>(count), value);
      }
      offsets_q.data<std::int32_t>()[n + 1] = static_cast<std::int32_t>(3 * (n + 1));
      offsets_k.data<std::int32_t>()[n + 1] = static_cast<std::int32_t>(keys.size());
    }
    const auto total_k = static_cast<std::int64_t>(keys.size());
    const Tensor queries(DType::f32, {3 * num_patterns, 1, 1});
    for (std::int64_t i = 0; i < 3 * num_patterns; ++i) {
      queries.data<float>()[i] = kQueries[i % 3];
    }
    for (const int top_k : {1, 16, 37}) {
      SCOPED_TRACE(top_k);
      const Tensor expected(DType::i32, {1, 3 * num_patterns, top_k});
      const Tensor actual(DType::i32, {1, 3 * num_patterns, top_k});
      Indexer args{.problem = {.num_q_heads = 1,
                               .num_kv_heads = 1,
                               .head_dim = 1,
                               .index_dim = 1,
                               .block_size = kBlock,
                               .top_k = top_k},
                   .batch = {.cu_seqlens_q = offsets_q, .cu_seqlens_k = offsets_k},
                   .index_q = queries,
                   .index_k = TensorView::contiguous(keys.data(), DType::f32, {}, {total_k, 1, 1}),
                   .block_ids = expected};
      reference::indexer(args);
      args.block_ids = actual;
      for_each_simd_target([&](const char*) {
        const auto plan = msa::plan(args, {.backend = "cpu"});
        const core::HostBuffer workspace(plan.workspace_bytes());
        plan.run(args, workspace.span());
        for (std::int64_t row = 0; row < 3 * num_patterns; ++row) {
          const auto ids_of = [&](const Tensor& ids) {
            const std::int32_t* first = ids.data<std::int32_t>() + row * top_k;
            return std::vector<std::int32_t>(first, first + top_k);
          };
          EXPECT_EQ(ids_of(actual), ids_of(expected))
              << patterns()[static_cast<std::size_t>(row / 3)].name << ", query "
              << kQueries[row % 3];
        }
      });
    }
  }
}

TEST(CpuIndexer, EqualsTheReferenceOnAdversarialRows) { expect_equal_selections(1, 513); }
TEST(SlowCpuIndexer, EqualsTheReferenceOnWideAdversarialRows) {
  expect_equal_selections(1025, 8192);
}

}  // namespace
}  // namespace msa::testing
