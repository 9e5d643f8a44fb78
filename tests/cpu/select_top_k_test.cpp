// SPDX-License-Identifier: Apache-2.0
//
// Selection is exact, so every row equals the reference's.
#include <random>
#include <string>

#include "core/tensor.hpp"
#include "msa/msa.hpp"
#include "reference/reference.hpp"
#include "tests/cpu/score_patterns.hpp"
#include "tests/cpu/targets.hpp"

namespace msa::testing {
namespace {

using core::Tensor;

TEST(CpuSelectTopK, EqualsTheReferenceOnAdversarialRows) {
  constexpr std::int64_t kBlock = 16;
  const auto num_patterns = static_cast<std::int64_t>(patterns().size());
  std::mt19937 random(1);
  for (const std::int64_t width : kWidths) {
    for (const Problem& p :
         {Problem{.block_size = kBlock, .top_k = 1}, Problem{.block_size = kBlock, .top_k = 16},
          Problem{.block_size = kBlock, .top_k = 17, .num_init_blocks = 2, .num_local_blocks = 3},
          Problem{.block_size = kBlock, .top_k = 64, .num_init_blocks = 1},
          Problem{.block_size = kBlock, .top_k = 3, .num_init_blocks = 2}}) {
      SCOPED_TRACE(width);
      SCOPED_TRACE(p.top_k);
      // One sequence per pattern, one query at its end.
      Tensor scores(DType::f32, {p.num_kv_heads, num_patterns, width});
      Tensor seq_lens(DType::i32, {num_patterns});
      for (std::int64_t row = 0; row < p.num_kv_heads * num_patterns; ++row) {
        const Pattern& pattern = patterns()[static_cast<std::size_t>(row % num_patterns)];
        for (std::int64_t column = 0; column < width; ++column) {
          scores.data<float>()[row * width + column] = pattern.value(column, width, random);
        }
        // Ragged: up to two blocks and a few tokens short of the full width.
        const std::int64_t short_by = row % num_patterns * 7 % (2 * kBlock + 5);
        seq_lens.data<std::int32_t>()[row % num_patterns] =
            static_cast<std::int32_t>(std::max<std::int64_t>(width * kBlock - short_by, 0));
      }
      Tensor expected(DType::i32, {p.num_kv_heads, num_patterns, p.top_k});
      Tensor actual(DType::i32, {p.num_kv_heads, num_patterns, p.top_k});
      SelectTopK args{.problem = p,
                      .batch = {.seq_lens_k = seq_lens},
                      .block_scores = scores,
                      .block_ids = expected};
      reference::select_top_k(args);
      args.block_ids = actual;
      for_each_simd_target([&](const char*) {
        const auto plan = msa::plan(args, {.backend = "cpu"});
        const core::HostBuffer workspace(plan.workspace_bytes());
        plan.run(args, workspace.span());
        for (std::int64_t row = 0; row < p.num_kv_heads * num_patterns; ++row) {
          const auto ids_of = [&](const Tensor& ids) {
            const std::int32_t* first = ids.data<std::int32_t>() + row * p.top_k;
            return std::vector<std::int32_t>(first, first + p.top_k);
          };
          EXPECT_EQ(ids_of(actual), ids_of(expected))
              << patterns()[static_cast<std::size_t>(row % num_patterns)].name;
        }
      });
    }
  }
}

}  // namespace
}  // namespace msa::testing
