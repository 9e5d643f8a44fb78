// SPDX-License-Identifier: Apache-2.0
//
// With int8 codes the indexer reads the keys of few blocks only, and selects what it selects
// without them: to the last tie, whatever the keys hold.
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "core/index_code.hpp"
#include "core/tensor.hpp"
#include "msa/msa.hpp"
#include "tests/cpu/targets.hpp"
#include "tests/support/guarded_tensor.hpp"

namespace msa::testing {
namespace {

using core::HostBuffer;
using core::Tensor;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// One sequence in pages of 16 tokens, a few queries at its end.
struct Decode {
  Decode(std::int64_t blocks, std::int64_t num_queries, std::int64_t dim)
      : problem{.num_q_heads = 4,
                .num_kv_heads = 4,
                .head_dim = 8,
                .index_dim = static_cast<int>(dim),
                .block_size = 16,
                .top_k = 16},
        num_blocks(blocks),
        page_table(DType::i32, {1, blocks}),
        seq_lens_k(DType::i32, {1}),
        index_q(DType::f32, {num_queries, 4, dim}),
        index_k(DType::bf16, {blocks, 1, 16, dim}),
        codes(DType::i8, {blocks, 1, 16, dim}),
        scales(DType::bf16, {blocks, 1, 16, 2}) {
    for (std::int64_t b = 0; b < blocks; ++b) {
      core::store_i32(page_table, static_cast<std::int32_t>((b * 7) % blocks), 0, b);
    }
    core::store_i32(seq_lens_k, static_cast<std::int32_t>(16 * blocks - 5), 0);
  }

  void set_key(std::int64_t token, std::int64_t d, double value) {
    core::store(index_k.view(), value, core::load_i32(page_table.view(), 0, token / 16), 0,
                token % 16, d);
  }

  void encode() {
    const std::int64_t dim = problem.index_dim;
    for (std::int64_t row = 0; row < num_blocks * 16; ++row) {
      core::encode_index_key(
          reinterpret_cast<const std::byte*>(index_k.data<std::uint16_t>() + row * dim),
          DType::bf16, dim, codes.data<std::int8_t>() + row * dim,
          scales.data<std::uint16_t>() + row * 2);
    }
  }

  std::vector<double> select(bool screened) const {
    const Tensor ids(DType::i32, {4, index_q.view().shape[0], problem.top_k});
    Indexer args{.problem = problem,
                 .batch = {.page_table = page_table, .seq_lens_k = seq_lens_k},
                 .index_q = index_q,
                 .index_k = index_k,
                 .block_ids = ids};
    if (screened) {
      args.index_k_codes = codes;
      args.index_k_scales = scales;
    }
    const auto plan = msa::plan(args, {.backend = "cpu"});
    const HostBuffer workspace(plan.workspace_bytes());
    plan.run(args, workspace.span());
    return values_of(ids);
  }

  Problem problem;
  std::int64_t num_blocks;
  Tensor page_table, seq_lens_k, index_q, index_k, codes, scales;
};

struct Family {
  const char* name;
  std::function<void(Decode& decode, std::mt19937& random)> fill;
};

float normal(std::mt19937& random) { return std::normal_distribution<float>()(random); }

void fill_all(Decode& decode, std::mt19937& random, const std::function<double()>& query,
              const std::function<double(std::int64_t token)>& key) {
  static_cast<void>(random);
  for (float& element : decode.index_q.span<float>()) element = static_cast<float>(query());
  for (std::int64_t token = 0; token < 16 * decode.num_blocks; ++token) {
    for (std::int64_t d = 0; d < decode.problem.index_dim; ++d) {
      decode.set_key(token, d, key(token));
    }
  }
}

void fill_normal(Decode& decode, std::mt19937& random) {
  fill_all(decode, random, [&] { return normal(random); }, [&](auto) { return normal(random); });
}

/// Replaces some keys, all of whose elements become `value()`.
void plant(Decode& decode, std::mt19937& random, int count, const std::function<double()>& value) {
  for (int i = 0; i < count; ++i) {
    const auto token =
        static_cast<std::int64_t>(random() % static_cast<unsigned>(16 * decode.num_blocks));
    decode.set_key(token, static_cast<std::int64_t>(random()) % decode.problem.index_dim, value());
  }
}

const std::vector<Family>& families() {
  static const std::vector<Family> all = {
      {"normal", fill_normal},
      {"blocks_apart",
       [](Decode& decode, std::mt19937& random) {
         fill_all(
             decode, random, [&] { return 1.0 + 0.1 * normal(random); },
             [&](std::int64_t token) {
               return std::sin(static_cast<double>(token / 16)) + 0.05 * normal(random);
             });
       }},
      {"ties",
       [](Decode& decode, std::mt19937& random) {
         fill_all(
             decode, random, [&] { return static_cast<double>(random() % 3) - 1.0; },
             [&](auto) { return static_cast<double>(random() % 3) - 1.0; });
       }},
      {"all_equal",
       [](Decode& decode, std::mt19937& random) {
         fill_all(decode, random, [] { return 0.7; }, [](auto) { return 0.3; });
       }},
      {"neighbouring_bf16",
       [](Decode& decode, std::mt19937& random) {
         fill_all(
             decode, random, [] { return 1.0; },
             [&](auto) { return 1.0 + static_cast<double>(random() % 3) * 0x1p-7; });
       }},
      // Every key but its largest element lies half way between two codes, and the queries have the
      // signs of the errors: the bound is met, not only respected.
      {"on_the_bound",
       [](Decode& decode, std::mt19937& random) {
         for (float& element : decode.index_q.span<float>()) {
           element = random() % 2 == 0 ? 1.0f : -1.0f;
         }
         for (std::int64_t token = 0; token < 16 * decode.num_blocks; ++token) {
           decode.set_key(token, 0, 127.0);
           for (std::int64_t d = 1; d < decode.problem.index_dim; ++d) {
             const double code = static_cast<double>(random() % 32) - 16.0;
             decode.set_key(token, d, code + 0.5);
           }
         }
       }},
      {"outlier_dimension",
       [](Decode& decode, std::mt19937& random) {
         fill_normal(decode, random);
         for (std::int64_t token = 0; token < 16 * decode.num_blocks; ++token) {
           decode.set_key(token, 3, 300.0 + normal(random));
         }
         for (std::int64_t row = 0; row < 4 * decode.index_q.view().shape[0]; ++row) {
           decode.index_q.data<float>()[row * decode.problem.index_dim + 3] *= 1e-3f;
         }
       }},
      {"one_huge_key",
       [](Decode& decode, std::mt19937& random) {
         fill_normal(decode, random);
         plant(decode, random, 1, [] { return 1e20; });
       }},
      {"not_finite",
       [](Decode& decode, std::mt19937& random) {
         fill_normal(decode, random);
         plant(decode, random, 5, [] { return kNan; });
         plant(decode, random, 3, [] { return kInf; });
         plant(decode, random, 3, [] { return -kInf; });
       }},
      {"all_nan",
       [](Decode& decode, std::mt19937& random) {
         fill_all(decode, random, [] { return 1.0; }, [](auto) { return kNan; });
       }},
      {"nan_query",
       [](Decode& decode, std::mt19937& random) {
         fill_normal(decode, random);
         decode.index_q.data<float>()[decode.problem.index_dim + 1] = kNan;
       }},
      {"infinite_query",
       [](Decode& decode, std::mt19937& random) {
         fill_normal(decode, random);
         decode.index_q.data<float>()[1] = kInf;
       }},
      {"zero_query",
       [](Decode& decode, std::mt19937& random) {
         fill_normal(decode, random);
         std::fill_n(decode.index_q.data<float>(), decode.problem.index_dim, 0.0f);
       }},
      {"large",
       [](Decode& decode, std::mt19937& random) {
         fill_all(
             decode, random, [&] { return 1e20 * normal(random); },
             [&](auto) { return 1e15 * normal(random); });
       }},
      {"products_underflow",
       [](Decode& decode, std::mt19937& random) {
         fill_all(
             decode, random, [&] { return 1e-20 * normal(random); },
             [&](auto) { return 1e-20 * normal(random); });
       }},
      {"subnormal_keys",
       [](Decode& decode, std::mt19937& random) {
         fill_all(
             decode, random, [&] { return 1e10 * normal(random); },
             [&](auto) { return 1e-39 * normal(random); });
       }},
  };
  return all;
}

TEST(Screening, SelectsTheSameBlocks) {
  for (const std::int64_t num_queries : {1, 2}) {
    for (const std::int64_t dim : {128, 36}) {
      for (const Family& family : families()) {
        SCOPED_TRACE(std::string(family.name) + ", " + std::to_string(num_queries) +
                     " queries, dim " + std::to_string(dim));
        std::mt19937 random(17);
        Decode decode(301, num_queries, dim);
        family.fill(decode, random);
        decode.encode();
        for_each_simd_target(
            [&](const char*) { EXPECT_EQ(decode.select(true), decode.select(false)); });
      }
    }
  }
}

TEST(Screening, TileOfManySequencesOnEveryThreadCount) {
  // A batch large enough that each worker selects whole tiles by itself.
  constexpr std::int64_t kBatch = 600;
  constexpr std::int64_t kBlocks = 20;
  Decode decode(kBlocks, 1, 32);
  std::mt19937 random(3);
  fill_normal(decode, random);
  decode.encode();
  const Tensor tables(DType::i32, {kBatch, kBlocks});
  const Tensor lengths(DType::i32, {kBatch});
  const Tensor index_q(DType::f32, {kBatch, 4, 32});
  for (std::int64_t n = 0; n < kBatch; ++n) {
    core::store_i32(lengths.view(), static_cast<std::int32_t>(random() % (16 * kBlocks + 1)), n);
    for (std::int64_t b = 0; b < kBlocks; ++b) {
      core::store_i32(tables.view(), static_cast<std::int32_t>(random() % kBlocks), n, b);
    }
  }
  for (float& element : index_q.span<float>()) element = normal(random);
  Indexer args{.problem = decode.problem,
               .batch = {.page_table = tables, .seq_lens_k = lengths},
               .index_q = index_q,
               .index_k = decode.index_k};
  args.problem.top_k = 5;
  const auto select = [&](int threads) {
    const Tensor ids(DType::i32, {4, kBatch, args.problem.top_k});
    args.block_ids = ids;
    set_num_threads(threads);
    const auto plan = msa::plan(args, {.backend = "cpu"});
    const HostBuffer workspace(plan.workspace_bytes());
    plan.run(args, workspace.span());
    return values_of(ids);
  };
  const int threads = num_threads();
  const std::vector<double> expected = select(1);
  args.index_k_codes = decode.codes;
  args.index_k_scales = decode.scales;
  for (const int count : {1, 2, 3, 8}) EXPECT_EQ(select(count), expected) << count << " threads";
  set_num_threads(threads);
}

/// The keys of blocks far below the selection are never looked at: they may be anything.
TEST(Screening, LeavesTheKeysOfHopelessBlocksAlone) {
  Decode decode(400, 1, 64);
  std::mt19937 random(5);
  const auto height = [](std::int64_t block) { return static_cast<double>((block * 37) % 400); };
  fill_all(
      decode, random, [&] { return 1.0 + 0.1 * normal(random); },
      [&](std::int64_t token) { return height(token / 16) / 400.0 + 0.01 * normal(random); });
  decode.encode();
  const std::vector<double> expected = decode.select(false);
  for (std::int64_t token = 0; token < 16 * 399; ++token) {
    if (height(token / 16) > 300.0) continue;
    for (std::int64_t d = 0; d < 64; ++d) decode.set_key(token, d, kInf);
  }
  for_each_simd_target([&](const char*) { EXPECT_EQ(decode.select(true), expected); });
  EXPECT_NE(decode.select(false), expected);
}

}  // namespace
}  // namespace msa::testing
