// SPDX-License-Identifier: Apache-2.0
//
// Every message of validate(), by its whole text.
#include <gtest/gtest.h>

#include <limits>

#include "core/operation.hpp"
#include "msa/error.hpp"
#include "tests/support/inputs.hpp"

namespace msa::core {
namespace {

using testing::Case;
using testing::Inputs;
using testing::Keys;
using testing::Outputs;

const Case kRagged{.sequences = {{3, 20}}, .row_gap = 0};
const Case kPaged{.sequences = {{3, 20}}, .keys = Keys::paged, .row_gap = 0};

/// Valid arguments of a small case, changed, must fail with exactly this text.
template <class Args, class Change>
void expect_invalid(const Case& spec, Change change, const std::string& text) {
  Inputs inputs(spec);
  auto args = inputs.args<Args>();
  const Outputs outputs(inputs, args);
  ASSERT_NO_THROW(validate(args));
  change(args);
  try {
    validate(args);
    ADD_FAILURE() << "accepted; expected: " << text;
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    EXPECT_EQ(std::string(error.what()), text);
  }
}

TEST(Validate, AcceptsEveryCaseOfTheTable) {
  for (const Case& spec : testing::all_cases()) {
    Inputs inputs(spec);
    const auto check = [&]<class Args>(Args) {
      if (!inputs.supports<Args>()) return;
      auto args = inputs.args<Args>();
      const Outputs outputs(inputs, args);
      EXPECT_NO_THROW(validate(args)) << operation_name(args) << ' ' << spec;
    };
    check(IndexerScores{});
    check(SelectTopK{});
    check(Indexer{});
    check(SparseAttentionForward{});
    check(DenseAttentionForward{});
    check(AppendKv{});
  }
}

TEST(Validate, Problem) {
  const auto expect = [](auto change, const std::string& text) {
    expect_invalid<SparseAttentionForward>(
        kRagged, [&](SparseAttentionForward& args) { change(args.problem); },
        "SparseAttentionForward: " + text);
  };
  expect([](Problem& p) { p.num_q_heads = 5; },
         "num_q_heads is 5, expected a positive multiple of num_kv_heads, 2");
  expect([](Problem& p) { p.num_q_heads = 0; },
         "num_q_heads is 0, expected a positive multiple of num_kv_heads, 2");
  expect([](Problem& p) { p.num_kv_heads = 0; },
         "num_q_heads is 4, expected a positive multiple of num_kv_heads, 0");
  expect([](Problem& p) { p.head_dim = 0; },
         "head_dim is 0 and index_dim is 64, expected both positive");
  expect([](Problem& p) { p.index_dim = -1; },
         "head_dim is 64 and index_dim is -1, expected both positive");
  for (const int size : {0, 8, 24, -16}) {
    expect([size](Problem& p) { p.block_size = size; },
           "block_size is " + std::to_string(size) + ", expected a power of two >= 16");
  }
  expect([](Problem& p) { p.num_local_blocks = 0; },
         "num_local_blocks is 0, expected >= 1 (a query always attends its own block)");
  expect([](Problem& p) { p.num_init_blocks = -1; }, "num_init_blocks is -1, expected >= 0");
  expect(
      [](Problem& p) {
        p.num_init_blocks = 3;
        p.num_local_blocks = 2;
      },
      "top_k is 4, expected >= num_init_blocks + num_local_blocks = 5");
}

TEST(Validate, NumbersFarAboveAnyModel) {
  const auto expect = [](auto change, const std::string& text) {
    expect_invalid<SparseAttentionForward>(
        kRagged, [&](SparseAttentionForward& args) { change(args.problem); },
        "SparseAttentionForward: " + text);
  };
  constexpr int kMost = std::numeric_limits<int>::max();
  expect([](Problem& p) { p.num_q_heads = 4098; }, "num_q_heads is 4098, expected 4096 at most");
  expect([](Problem& p) { p.head_dim = 65537; }, "head_dim is 65537, expected 65536 at most");
  expect([](Problem& p) { p.index_dim = kMost; },
         "index_dim is 2147483647, expected 65536 at most");
  expect([](Problem& p) { p.block_size = 1 << 30; },
         "block_size is 1073741824, expected 1048576 at most");
  expect([](Problem& p) { p.top_k = kMost; }, "top_k is 2147483647, expected 1048576 at most");
  expect([](Problem& p) { p.num_init_blocks = kMost; },
         "num_init_blocks is 2147483647, expected 1048576 at most");
  expect([](Problem& p) { p.num_local_blocks = kMost; },
         "num_local_blocks is 2147483647, expected 1048576 at most");
}

TEST(Validate, SizesAndStridesOfNoMemory) {
  using Args = DenseAttentionForward;
  const auto expect = [](auto change, const std::string& text) {
    expect_invalid<Args>(kRagged, change,
                         "DenseAttentionForward: " + text + ": no memory holds that");
  };
  expect([](Args& a) { a.q.shape[0] = std::numeric_limits<std::int64_t>::max(); },
         "q has shape [9223372036854775807, 4, 64] and strides [256, 64, 1]");
  expect([](Args& a) { a.k.stride[0] = std::numeric_limits<std::int64_t>::min(); },
         "k has shape [20, 2, 64] and strides [-9223372036854775808, 64, 1]");
  expect([](Args& a) { a.v.stride[2] = std::int64_t{1} << 44; },
         "v has shape [20, 2, 64] and strides [128, 64, 17592186044416]");
  // The size of an axis beside an empty one counts as well, that of a stride which is never taken
  // does not.
  expect_invalid<IndexerScores>(
      kRagged,
      [](IndexerScores& a) {
        a.index_k.shape[0] = 0;
        a.block_scores.shape[2] = std::int64_t{1} << 62;
      },
      "IndexerScores: block_scores has shape [2, 3, 4611686018427387904] and strides [9, 3, 1]: no "
      "memory holds that");
  Inputs inputs(kRagged);
  auto args = inputs.args<Indexer>();
  const Outputs outputs(inputs, args);
  args.index_k.stride[1] = std::numeric_limits<std::int64_t>::max();
  EXPECT_NO_THROW(validate(args));
}

TEST(Validate, IndexScaleIsNotNegative) {
  const std::string text = "index_scale is -1, expected > 0, or 0 for 1 / sqrt(index_dim)";
  expect_invalid<IndexerScores>(
      kRagged, [](IndexerScores& a) { a.index_scale = -1.0f; }, "IndexerScores: " + text);
  Inputs inputs(kRagged);
  auto args = inputs.args<IndexerKlBackward>();
  const Outputs outputs(inputs, args);
  EXPECT_NO_THROW(validate(args));
  args.index_scale = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(validate(args), Error);
}

TEST(Validate, TensorsOfSparseAttentionForward) {
  using Args = SparseAttentionForward;
  const auto expect = [](auto change, const std::string& text) {
    expect_invalid<Args>(kRagged, change, "SparseAttentionForward: " + text);
  };
  expect([](Args& a) { a.q = {}; },
         "q is required, with shape [total_q, num_q_heads=4, head_dim=64]");
  expect([](Args& a) { a.q.dtype = DType::i32; },
         "q has dtype i32, expected f32 or f16 or bf16 or f64");
  expect([](Args& a) { a.q.shape[1] = 3; },
         "q has shape [3, 3, 64], expected [total_q, num_q_heads=4, head_dim=64]");
  expect([](Args& a) { a.q.shape[0] = -1; },
         "q has shape [-1, 4, 64], expected [total_q, num_q_heads=4, head_dim=64]");
  expect([](Args& a) { a.k.rank = 2; },
         "k has shape [20, 2], expected [total_k, num_kv_heads=2, head_dim=64]");
  expect([](Args& a) { a.v.shape[0] = 19; },
         "v has shape [19, 2, 64], expected [total_k=20, num_kv_heads=2, head_dim=64]");
  expect([](Args& a) { a.v.dtype = DType::i8; },
         "v has dtype i8, expected f32 or f16 or bf16 or f64 or e4m3");
  expect([](Args& a) { a.k_scale = a.lse; }, "k_scale is given, but k has dtype f32, not e4m3");
  expect(
      [](Args& a) {
        a.v.dtype = DType::e4m3;
        a.v_scale = a.lse;
      },
      "v_scale has shape [3, 4], expected [num_kv_heads=2]");
  expect([](Args& a) { a.block_ids.shape[2] = 8; },
         "block_ids has shape [2, 3, 8], expected [num_kv_heads=2, total_q=3, top_k=4]");
  expect([](Args& a) { a.block_ids.dtype = DType::f32; }, "block_ids has dtype f32, expected i32");
  expect([](Args& a) { a.out = {}; },
         "out is required, with shape [total_q=3, num_q_heads=4, head_dim=64]");
  expect([](Args& a) { a.lse.shape[0] = 4; },
         "lse has shape [4, 4], expected [total_q=3, num_q_heads=4]");
  expect([](Args& a) { a.lse.dtype = DType::bf16; }, "lse has dtype bf16, expected f32 or f64");
  expect([](Args& a) { a.v.device = {DeviceType::cuda, 0}; },
         "v and cu_seqlens_q are on different devices");
}

TEST(Validate, Batch) {
  using Args = DenseAttentionForward;
  const auto ragged = [](auto change, const std::string& text) {
    expect_invalid<Args>(kRagged, change, "DenseAttentionForward: " + text);
  };
  const auto paged = [](auto change, const std::string& text) {
    expect_invalid<Args>(kPaged, change, "DenseAttentionForward: " + text);
  };
  paged([](Args& a) { a.batch.page_table.rank = 1; },
        "page_table has shape [1], expected [batch_size, max_pages]");
  paged([](Args& a) { a.batch.seq_lens_k = {}; },
        "seq_lens_k is required, with shape [batch_size=1]");
  paged([](Args& a) { a.batch.seq_lens_k.shape[0] = 2; },
        "seq_lens_k has shape [2], expected [batch_size=1]");
  paged([](Args& a) { a.batch.cu_seqlens_k = a.batch.seq_lens_k; },
        "both cu_seqlens_k (ragged keys) and seq_lens_k (paged keys) are given");
  paged([](Args& a) { a.batch.page_table = {}; },
        "seq_lens_k is given without page_table; ragged keys take cu_seqlens_k");
  paged([](Args& a) { a.k.shape[2] = 32; },
        "k has shape [4, 2, 32, 64], expected [num_pages, num_kv_heads=2, block_size=16, "
        "head_dim=64]");
  ragged([](Args& a) { a.batch.cu_seqlens_k.rank = 2; },
         "cu_seqlens_k has shape [2, 0], expected [batch_size + 1]");
  ragged([](Args& a) { a.batch.cu_seqlens_k.shape[0] = 0; },
         "cu_seqlens_k is empty, expected [0] at least");
  ragged([](Args& a) { a.batch.cu_seqlens_q.shape[0] = 3; },
         "cu_seqlens_q has shape [3], expected [batch_size + 1=2]");
  ragged(
      [](Args& a) {
        a.batch.cu_seqlens_q = {};
        a.batch.cu_seqlens_k.shape[0] = 3;
      },
      "total_q is 3, no multiple of batch_size 2; give cu_seqlens_q for unequal lengths");
  ragged(
      [](Args& a) {
        a.batch.cu_seqlens_q = {};
        a.batch.cu_seqlens_k.shape[0] = 1;
      },
      "total_q is 3, no multiple of batch_size 0; give cu_seqlens_q for unequal lengths");
  ragged([](Args& a) { a.batch.max_seq_len_q = -1; },
         "max_seq_len_q is -1 and max_seq_len_k is 0, expected >= 0 (0: unknown)");
  ragged([](Args& a) { a.batch.max_seq_len_k = -2; },
         "max_seq_len_q is 0 and max_seq_len_k is -2, expected >= 0 (0: unknown)");
}

TEST(Validate, IndexerScores) {
  using Args = IndexerScores;
  const auto expect = [](const Case& spec, auto change, const std::string& text) {
    expect_invalid<Args>(spec, change, "IndexerScores: " + text);
  };
  expect(
      kRagged, [](Args& a) { a.index_q.shape[1] = 4; },
      "index_q has shape [3, 4, 64], expected [total_q, num_kv_heads=2, index_dim=64]");
  expect(
      kRagged, [](Args& a) { a.index_k.shape[1] = 2; },
      "index_k has shape [20, 2, 64], expected [total_k, index key heads=1, index_dim=64]");
  expect(
      kPaged, [](Args& a) { a.index_k.rank = 3; },
      "index_k has shape [4, 1, 16], expected [num_pages, index key heads=1, block_size=16, "
      "index_dim=64]");
  expect(
      kRagged, [](Args& a) { a.block_scores.dtype = DType::bf16; },
      "block_scores has dtype bf16, expected f32 or f64");
  expect(
      kRagged, [](Args& a) { a.block_scores.shape[2] = 1; },
      "block_scores has 1 block columns but sequences may have 2 blocks; give max_seq_len_k if "
      "they are shorter");
}

TEST(Validate, ColumnsFollowTheHint) {
  Inputs inputs(kRagged);
  auto args = inputs.args<IndexerScores>();
  const Outputs outputs(inputs, args);
  args.block_scores.shape[2] = 1;
  args.batch.max_seq_len_k = 16;
  EXPECT_NO_THROW(validate(args));
}

TEST(Validate, SelectTopK) {
  using Args = SelectTopK;
  const auto expect = [](auto change, const std::string& text) {
    expect_invalid<Args>(kRagged, change, "SelectTopK: " + text);
  };
  expect([](Args& a) { a.block_scores.shape[0] = 1; },
         "block_scores has shape [1, 3, 3], expected [num_kv_heads=2, total_q, num_blocks]");
  expect([](Args& a) { a.batch = {}; },
         "seq_lens_k or cu_seqlens_k is required: the local block depends on the key count");
  expect([](Args& a) { a.block_ids.shape[1] = 9; },
         "block_ids has shape [2, 9, 4], expected [num_kv_heads=2, total_q=3, top_k=4]");
}

TEST(Validate, Indexer) {
  expect_invalid<Indexer>(
      kRagged, [](Indexer& a) { a.block_ids = {}; },
      "Indexer: block_ids is required, with shape [num_kv_heads=2, total_q=3, top_k=4]");
}

TEST(Validate, SparseAttentionBackward) {
  using Args = SparseAttentionBackward;
  const auto expect = [](auto change, const std::string& text) {
    expect_invalid<Args>(kRagged, change, "SparseAttentionBackward: " + text);
  };
  expect([](Args& a) { a.batch.page_table = a.batch.cu_seqlens_q; },
         "page_table is given, but gradients are defined for ragged keys only");
  expect([](Args& a) { a.k.shape[2] = 65; },
         "k has shape [20, 2, 65], expected [total_k, num_kv_heads=2, head_dim=64]");
  expect([](Args& a) { a.k.dtype = DType::e4m3; },
         "k has dtype e4m3, expected f32 or f16 or bf16 or f64");
  for (const auto& [name, field] :
       {std::pair{"out", &Args::out}, {"dout", &Args::dout}, {"dq", &Args::dq}}) {
    expect([member = field](Args& a) { (a.*member).shape[0] = 2; },
           std::string(name) +
               " has shape [2, 4, 64], expected [total_q=3, num_q_heads=4, head_dim=64]");
  }
  for (const auto& [name, field] :
       {std::pair{"v", &Args::v}, {"dk", &Args::dk}, {"dv", &Args::dv}}) {
    expect([member = field](Args& a) { (a.*member).shape[0] = 2; },
           std::string(name) +
               " has shape [2, 2, 64], expected [total_k=20, num_kv_heads=2, head_dim=64]");
  }
  expect([](Args& a) { a.lse = {}; }, "lse is required, with shape [total_q=3, num_q_heads=4]");
  expect([](Args& a) { a.block_ids.rank = 1; },
         "block_ids has shape [2], expected [num_kv_heads=2, total_q=3, top_k=4]");
}

TEST(Validate, IndexerKlBackward) {
  using Args = IndexerKlBackward;
  const auto expect = [](auto change, const std::string& text) {
    expect_invalid<Args>(kRagged, change, "IndexerKlBackward: " + text);
  };
  expect([](Args& a) { a.batch.seq_lens_k = a.batch.cu_seqlens_q; },
         "page_table is given, but gradients are defined for ragged keys only");
  expect([](Args& a) { a.k.shape[1] = 1; },
         "k has shape [20, 1, 64], expected [total_k, num_kv_heads=2, head_dim=64]");
  expect([](Args& a) { a.index_q.shape[0] = 2; },
         "index_q has shape [2, 2, 64], expected [total_q=3, num_kv_heads=2, index_dim=64]");
  expect([](Args& a) { a.index_k.shape[0] = 2; },
         "index_k has shape [2, 1, 64], expected [total_k=20, index key heads=1, index_dim=64]");
  expect(
      [](Args& a) {
        a.loss = {};
        a.dindex_q = {};
      },
      "neither loss nor dindex_q is given, so there is nothing to compute");
  expect([](Args& a) { a.dindex_k = {}; }, "dindex_q and dindex_k must be given together");
  expect([](Args& a) { a.loss.shape[0] = 2; }, "loss has shape [2], expected [scalar=1]");
  expect([](Args& a) { a.dindex_q.shape[0] = 2; },
         "dindex_q has shape [2, 2, 64], expected [total_q=3, num_kv_heads=2, index_dim=64]");
  expect([](Args& a) { a.dindex_k.shape[0] = 2; },
         "dindex_k has shape [2, 1, 64], expected [total_k=20, index key heads=1, index_dim=64]");
  expect([](Args& a) { a.lse = a.loss; }, "lse has shape [1], expected [total_q=3, num_q_heads=4]");
  expect([](Args& a) { a.block_ids.shape[0] = 1; },
         "block_ids has shape [1, 3, 4], expected [num_kv_heads=2, total_q=3, top_k=4]");
}

TEST(Validate, AppendKv) {
  using Args = AppendKv;
  const auto expect = [](auto change, const std::string& text) {
    expect_invalid<Args>(kPaged, change, "AppendKv: " + text);
  };
  expect([](Args& a) { a.k = a.v = a.index_k = {}; },
         "none of k, v and index_k is given, so there is nothing to append");
  expect([](Args& a) { a.k_pages = {}; }, "k and k_pages must be given together");
  expect([](Args& a) { a.v = {}; }, "v and v_pages must be given together");
  expect([](Args& a) { a.index_k = {}; }, "index_k and index_k_pages must be given together");
  expect([](Args& a) { a.v.shape[0] = 2; },
         "v has shape [2, 2, 64], expected [total_q=3, num_kv_heads=2, head_dim=64]");
  expect([](Args& a) { a.index_k_pages.shape[0] = 9; },
         "index_k_pages has shape [9, 1, 16, 64], expected [num_pages=4, index key heads=1, "
         "block_size=16, index_dim=64]");
  expect([](Args& a) { a.k_pages.shape[2] = 8; },
         "k_pages has shape [4, 2, 8, 64], expected [num_pages, num_kv_heads=2, block_size=16, "
         "head_dim=64]");
  expect([](Args& a) { a.batch = {}; },
         "page_table and seq_lens_k are required: the keys are paged");
}

}  // namespace
}  // namespace msa::core
