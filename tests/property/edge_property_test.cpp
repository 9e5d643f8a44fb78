// SPDX-License-Identifier: Apache-2.0
//
// Selections and batches at the edges, on every backend and SIMD target.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "core/sequences.hpp"
#include "tests/property/backends.hpp"
#include "tests/support/inputs.hpp"
#include "tests/support/verify.hpp"

namespace msa::testing {
namespace {

using core::Tensor;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

Case with_sequences(std::vector<Lengths> sequences, int top_k, Keys keys = Keys::ragged) {
  return {.problem = {.num_q_heads = 4,
                      .num_kv_heads = 2,
                      .head_dim = 20,
                      .index_dim = 12,
                      .block_size = 16,
                      .top_k = top_k},
          .dtype = DType::f32,
          .sequences = std::move(sequences),
          .keys = keys};
}

/// Chooses all block ids anew: id_of(query row, slot).
void select(Inputs& inputs, const std::function<std::int32_t(std::int64_t, std::int64_t)>& id_of) {
  const TensorView& ids = inputs.block_ids;
  for_each_index(
      ids, [&](const auto& at) { core::store_i32(ids, id_of(at[1], at[2]), at[0], at[1], at[2]); });
  inputs.block_ids.seal();
}

void expect_sparse_attention_verifies(Inputs& inputs) {
  for_each_simd_target([&](const char*) {
    const Outcome outcome = verify<SparseAttentionForward>(inputs, "cpu");
    EXPECT_EQ(outcome.status, Outcome::Status::passed) << outcome.detail;
  });
}

TEST(Edges, RowsThatSelectNothingAreEmpty) {
  Inputs inputs(with_sequences({{21, 60}, {3, 3}}, 4));
  const std::int32_t nothing[] = {-1, -7, 4, std::numeric_limits<std::int32_t>::max(),
                                  std::numeric_limits<std::int32_t>::min()};
  // 60 tokens are blocks 0 to 3: all of these are unused slots, invisible or out of range.
  for (int first = 0; first < 5; ++first) {
    select(inputs, [&](auto row, auto slot) {
      return nothing[(first + (first == 0 ? 0 : row + slot)) % 5];
    });
    for_each_backend([&](const char* backend) {
      auto args = inputs.args<SparseAttentionForward>();
      const Outputs outputs(inputs, args);
      run_on(backend, args);
      for (const double x : values_of(args.out)) EXPECT_EQ(x, 0.0);
      for (const double x : values_of(args.lse))
        EXPECT_EQ(x, -std::numeric_limits<double>::infinity());
    });
  }
}

// All queries attend block 0 and nothing else; whatever lies in the others is not read.
TEST(Edges, ManyQueriesOnOneBlock) {
  for (const Keys keys : {Keys::ragged, Keys::paged}) {
    Inputs inputs(with_sequences({{65, 140}}, 3, keys));
    select(inputs, [](auto row, auto slot) { return slot == row % 3 ? 0 : -1; });
    const std::int32_t page =
        keys == Keys::paged ? core::load_i32(inputs.page_table.view(), 0, 0) : 0;
    for (const GuardedTensor* cache : {&inputs.k, &inputs.v}) {
      const TensorView& view = *cache;
      for_each_index(view, [&](const auto& at) {
        const bool in_block_0 = keys == Keys::paged ? at[0] == page : at[0] < 16;
        if (in_block_0) return;
        core::store_element(core::address_at(view, offset_at(view, at)), view.dtype, kNan);
      });
    }
    inputs.k.seal();
    inputs.v.seal();
    expect_sparse_attention_verifies(inputs);
  }
}

// Blocks 1, 3, 5, ... of every sequence belong to nobody's selection and hold NaN.
TEST(Edges, BlocksThatNobodySelectedAreNotRead) {
  Inputs inputs(with_sequences({{70, 200}, {17, 97}, {5, 5}}, 4));
  const core::Sequences sequences(inputs.args<SparseAttentionForward>());
  select(inputs,
         [](auto row, auto slot) { return static_cast<std::int32_t>(2 * ((row + 3 * slot) % 7)); });
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence s = sequences[n];
    for (const GuardedTensor* cache : {&inputs.k, &inputs.v}) {
      const TensorView& view = *cache;
      for (std::int64_t j = 0; j < s.k_len; ++j) {
        if (j / 16 % 2 == 0) continue;
        for (std::int64_t head = 0; head < 2; ++head) {
          for (std::int64_t d = 0; d < 20; ++d) core::store(view, kNan, s.k_begin + j, head, d);
        }
      }
    }
  }
  inputs.k.seal();
  inputs.v.seal();
  expect_sparse_attention_verifies(inputs);
}

TEST(Edges, LengthsAroundABlock) {
  for (const int block_size : {16, 64, 128}) {
    for (const Keys keys : {Keys::ragged, Keys::paged}) {
      Case spec = with_sequences({{1, block_size - 1},
                                  {2, block_size},
                                  {3, block_size + 1},
                                  {0, block_size},
                                  {1, 1},
                                  {2, 0},
                                  {0, 0},
                                  {1, 2 * block_size - 1},
                                  {1, 2 * block_size + 1}},
                                 2, keys);
      spec.problem.block_size = block_size;
      Inputs inputs(spec);
      for_each_simd_target([&](const char*) {
        verify_all(inputs, "cpu", [](const char* operation, const Outcome& outcome) {
          EXPECT_TRUE(outcome.ok()) << operation << ": " << outcome.detail;
        });
      });
    }
  }
}

// More rows than 16 bits count: documents of one token, whose result is their own value.
TEST(Edges, SeventyThousandOneTokenDocuments) {
  constexpr std::int64_t kDocuments = 70000;
  const Problem p{.num_q_heads = 2,
                  .num_kv_heads = 1,
                  .head_dim = 3,
                  .index_dim = 2,
                  .block_size = 16,
                  .top_k = 2};
  const Tensor offsets(DType::i32, {kDocuments + 1});
  for (std::int32_t i = 0; i <= kDocuments; ++i) offsets.data<std::int32_t>()[i] = i;
  const Tensor q(DType::f32, {kDocuments, 2, 3});
  const Tensor kv(DType::f32, {kDocuments, 1, 3});
  const Tensor index(DType::f32, {kDocuments, 1, 2});
  const Tensor ids(DType::i32, {1, kDocuments, 2});
  const Tensor out(DType::f32, {kDocuments, 2, 3});
  for (std::int64_t i = 0; i < kDocuments * 3; ++i) {
    kv.data<float>()[i] = static_cast<float>(i % 1021) * 0.125f;
  }
  const Batch batch{.cu_seqlens_q = offsets, .cu_seqlens_k = offsets};
  for_each_backend([&](const char* backend) {
    std::fill_n(out.data<float>(), kDocuments * 6, -1.0f);
    run_on(backend,
           Indexer{
               .problem = p, .batch = batch, .index_q = index, .index_k = index, .block_ids = ids});
    run_on(
        backend,
        SparseAttentionForward{
            .problem = p, .batch = batch, .q = q, .k = kv, .v = kv, .block_ids = ids, .out = out});
    std::int64_t wrong = 0;
    for (std::int64_t i = 0; i < kDocuments; ++i) {
      wrong += ids.data<std::int32_t>()[2 * i] == 0 ? 0 : 1;
      wrong += ids.data<std::int32_t>()[2 * i + 1] == -1 ? 0 : 1;
      for (std::int64_t d = 0; d < 6; ++d) {
        wrong += out.data<float>()[6 * i + d] == kv.data<float>()[3 * i + d % 3] ? 0 : 1;
      }
    }
    EXPECT_EQ(wrong, 0);
  });
}

}  // namespace
}  // namespace msa::testing
