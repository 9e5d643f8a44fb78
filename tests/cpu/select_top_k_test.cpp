// SPDX-License-Identifier: Apache-2.0
//
// Selection is exact, so every row equals the reference's: widths around vector and tile borders,
// rows made to defeat a threshold scan or a careless comparison.
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "core/tensor.hpp"
#include "msa/msa.hpp"
#include "reference/reference.hpp"
#include "tests/cpu/targets.hpp"

namespace msa::testing {
namespace {

using core::Tensor;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Pattern {
  const char* name;
  std::function<float(std::int64_t column, std::int64_t width, std::mt19937& random)> value;
};

float uniform(std::mt19937& random) { return static_cast<float>(random()) * 0x1p-32f; }

const std::vector<Pattern>& patterns() {
  static const std::vector<Pattern> all = {
      {"random", [](auto, auto, auto& random) { return uniform(random) - 0.5f; }},
      {"ascending", [](auto column, auto, auto&) { return static_cast<float>(column); }},
      {"descending", [](auto column, auto, auto&) { return -static_cast<float>(column); }},
      {"equal", [](auto, auto, auto&) { return 1.5f; }},
      {"signed_zeros", [](auto, auto, auto& random) { return random() % 2 != 0 ? 0.0f : -0.0f; }},
      {"few_values",
       [](auto, auto, auto& random) { return static_cast<float>(random() % 3) - 1.0f; }},
      {"neighbouring_floats",
       [](auto, auto, auto& random) { return 1.0f + static_cast<float>(random() % 4) * 0x1p-23f; }},
      {"infinities",
       [](auto, auto, auto& random) {
         constexpr float kValues[] = {kInf, -kInf, 0.0f, -1.0f};
         return kValues[random() % 4];
       }},
      {"nans",
       [](auto, auto, auto& random) {
         constexpr float kValues[] = {kNan, -kNan, -kInf, 2.0f, -2.0f};
         return kValues[random() % 5];
       }},
      {"all_nan", [](auto, auto, auto&) { return kNan; }},
      {"all_negative_infinity", [](auto, auto, auto&) { return -kInf; }},
      {"nan_then_best_last",
       [](auto column, auto width, auto&) { return column + 3 < width ? kNan : 1e20f; }},
      {"huge", [](auto, auto, auto& random) { return 1e20f * (uniform(random) - 0.5f); }},
      {"subnormal",
       [](auto, auto, auto& random) { return static_cast<float>(random() % 64) * 0x1p-149f; }},
  };
  return all;
}

TEST(CpuSelectTopK, EqualsTheReferenceOnAdversarialRows) {
  constexpr std::int64_t kBlock = 16;
  const auto num_patterns = static_cast<std::int64_t>(patterns().size());
  std::mt19937 random(1);
  for (const std::int64_t width : {1, 16, 17, 33, 65, 129, 257, 513, 1025, 4097, 8192}) {
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
        seq_lens.data<std::int32_t>()[row % num_patterns] =
            static_cast<std::int32_t>(width * kBlock);
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
