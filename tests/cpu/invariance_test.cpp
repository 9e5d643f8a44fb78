// SPDX-License-Identifier: Apache-2.0
//
// What must not change a single bit: the number of threads, how a prompt is cut into chunks, the
// order of block ids, a repetition, the dtype in which equal numbers are stored.
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/scalar.hpp"
#include "core/tensor.hpp"
#include "msa/msa.hpp"
#include "tests/cpu/targets.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {
namespace {

using core::HostBuffer;
using core::Tensor;

/// Sets the number of threads until the end of the scope.
class Threads {
 public:
  explicit Threads(int count) : before_(num_threads()) { set_num_threads(count); }
  ~Threads() { set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

template <class Args>
void run(const Args& args) {
  const auto plan = msa::plan(args, {.backend = "cpu"});
  const HostBuffer workspace(plan.workspace_bytes());
  plan.run(args, workspace.span());
}

/// Several tiles of queries for every operation, and sequences that end inside tiles.
Case many_tiles(Keys keys) {
  return {.name = "many_tiles",
          .problem = {.num_q_heads = 8,
                      .num_kv_heads = 2,
                      .head_dim = 32,
                      .index_dim = 32,
                      .block_size = 16,
                      .top_k = 4},
          .dtype = DType::bf16,
          .sequences = {{150, 500}, {1, 300}, {75, 75}},
          .keys = keys,
          .selection = Selection::any_order};
}

template <class Args>
void expect_same_bits_for_all_thread_counts(Inputs& inputs) {
  if (!inputs.supports<Args>()) return;
  const Threads restore(1);
  auto args = inputs.args<Args>();
  const Outputs expected(inputs, args);
  run(args);
  // A workspace planned for one number of threads must do for any other.
  for (const int planned : {1, 2, 3}) {
    for (const int running : {1, 2, 3}) {
      auto again = inputs.args<Args>();
      const Outputs outputs(inputs, again);
      set_num_threads(planned);
      const auto plan = msa::plan(again, {.backend = "cpu"});
      const HostBuffer workspace(plan.workspace_bytes());
      set_num_threads(running);
      plan.run(again, workspace.span());
      EXPECT_EQ(outputs.difference(expected), "") << core::operation_name(again) << " planned for "
                                                  << planned << " threads, run on " << running;
    }
  }
}

template <class Args>
void expect_same_bits_when_repeated(Inputs& inputs) {
  if (!inputs.supports<Args>()) return;
  const Threads threads(3);
  auto args = inputs.args<Args>();
  const Outputs expected(inputs, args);
  run(args);
  for (int i = 1; i < 20; ++i) {
    auto again = inputs.args<Args>();
    const Outputs outputs(inputs, again);
    run(again);
    ASSERT_EQ(outputs.difference(expected), "") << core::operation_name(again);
  }
}

void expect_same_bits_for_all_thread_counts(Keys keys) {
  Inputs inputs(many_tiles(keys));
  for_each_simd_target([&](const char*) {
    expect_same_bits_for_all_thread_counts<IndexerScores>(inputs);
    expect_same_bits_for_all_thread_counts<SelectTopK>(inputs);
    expect_same_bits_for_all_thread_counts<Indexer>(inputs);
    expect_same_bits_for_all_thread_counts<SparseAttentionForward>(inputs);
    expect_same_bits_for_all_thread_counts<DenseAttentionForward>(inputs);
    expect_same_bits_for_all_thread_counts<AppendKv>(inputs);
    expect_same_bits_for_all_thread_counts<NormRopeAppendKv>(inputs);
    expect_same_bits_for_all_thread_counts<SparseAttentionBackward>(inputs);
    expect_same_bits_for_all_thread_counts<IndexerKlBackward>(inputs);
  });
}

TEST(CpuInvariance, ThreadCount) { expect_same_bits_for_all_thread_counts(Keys::paged); }
TEST(SlowCpuInvariance, ThreadCountOnRaggedKeys) {
  expect_same_bits_for_all_thread_counts(Keys::ragged);
}

/// With more threads than KV heads, threads divide blocks (index) and the heads of a group.
TEST(CpuInvariance, MoreThreadsThanHeads) {
  for (const int group : {16, 11, 4}) {
    Inputs inputs({.name = "decode",
                   .problem = {.num_q_heads = group, .num_kv_heads = 1, .block_size = 16},
                   .dtype = DType::bf16,
                   .sequences = {{1, 700}},
                   .keys = Keys::paged,
                   .index_codes = true});
    const auto results = [&](int threads) {
      const Threads restore(threads);
      std::vector<double> values;
      auto sparse = inputs.args<SparseAttentionForward>();
      const Outputs sparse_outputs(inputs, sparse);
      run(sparse);
      auto dense = inputs.args<DenseAttentionForward>();
      const Outputs dense_outputs(inputs, dense);
      run(dense);
      auto index = inputs.args<Indexer>();
      const Outputs index_outputs(inputs, index);
      run(index);
      for (const TensorView& view :
           {sparse.out, sparse.lse, dense.out, dense.lse, index.block_ids}) {
        for (const double value : values_of(view)) values.push_back(value);
      }
      return values;
    };
    const std::vector<double> expected = results(1);
    for (const int threads : {2, 3, 5, 16}) {
      EXPECT_EQ(results(threads), expected) << "group " << group << ", " << threads << " threads";
    }
  }
}

TEST(CpuInvariance, TwentyRepeats) {
  Inputs inputs(many_tiles(Keys::paged));
  expect_same_bits_when_repeated<IndexerScores>(inputs);
  expect_same_bits_when_repeated<SelectTopK>(inputs);
  expect_same_bits_when_repeated<Indexer>(inputs);
  expect_same_bits_when_repeated<SparseAttentionForward>(inputs);
  expect_same_bits_when_repeated<DenseAttentionForward>(inputs);
  expect_same_bits_when_repeated<AppendKv>(inputs);
}

Tensor normal_tensor(std::initializer_list<std::int64_t> shape, unsigned seed) {
  Tensor tensor(DType::f32, shape);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (float& value : tensor.span<float>()) value = normal(random);
  return tensor;
}

/// Rows [begin, end) of the leading axis.
TensorView rows(const Tensor& tensor, std::int64_t begin, std::int64_t end) {
  TensorView view = tensor;
  view.data = core::address_at(view, begin * view.stride[0]);
  view.shape[0] = end - begin;
  return view;
}

/// A prompt of one sequence, run in chunks of any length as a cache would grow.
struct Prompt {
  static constexpr std::int64_t kTokens = 451;
  Problem p{.num_q_heads = 6,
            .num_kv_heads = 3,
            .head_dim = 24,
            .index_dim = 40,
            .block_size = 16,
            .top_k = 5};
  Tensor index_q = normal_tensor({kTokens, p.num_kv_heads, p.index_dim}, 1);
  Tensor index_k = normal_tensor({kTokens, 1, p.index_dim}, 2);
  Tensor q = normal_tensor({kTokens, p.num_q_heads, p.head_dim}, 3);
  Tensor k = normal_tensor({kTokens, p.num_kv_heads, p.head_dim}, 4);
  Tensor v = normal_tensor({kTokens, p.num_kv_heads, p.head_dim}, 5);

  struct Results {
    explicit Results(const Problem& p)
        : ids(DType::i32, {p.num_kv_heads, kTokens, p.top_k}),
          sparse(DType::f32, {kTokens, p.num_q_heads, p.head_dim}),
          dense(DType::f32, {kTokens, p.num_q_heads, p.head_dim}),
          lse(DType::f32, {kTokens, p.num_q_heads}) {}
    Tensor ids, sparse, dense, lse;
  };

  Results run_in_chunks(std::int64_t chunk) const {
    Results results(p);
    for (std::int64_t begin = 0; begin < kTokens; begin += chunk) {
      const std::int64_t end = std::min(begin + chunk, kTokens);
      TensorView ids = results.ids;
      ids.data = core::address_at(ids, begin * ids.stride[1]);
      ids.shape[1] = end - begin;
      run(Indexer{.problem = p,
                  .index_q = rows(index_q, begin, end),
                  .index_k = rows(index_k, 0, end),
                  .block_ids = ids});
      run(SparseAttentionForward{.problem = p,
                                 .q = rows(q, begin, end),
                                 .k = rows(k, 0, end),
                                 .v = rows(v, 0, end),
                                 .block_ids = ids,
                                 .out = rows(results.sparse, begin, end),
                                 .lse = rows(results.lse, begin, end)});
      run(DenseAttentionForward{.problem = p,
                                .q = rows(q, begin, end),
                                .k = rows(k, 0, end),
                                .v = rows(v, 0, end),
                                .out = rows(results.dense, begin, end)});
    }
    return results;
  }
};

bool same_bits(const Tensor& a, const Tensor& b) {
  return std::memcmp(a.data<std::byte>(), b.data<std::byte>(),
                     size_of(a.view().dtype) * static_cast<std::size_t>(a.view().num_elements())) ==
         0;
}

TEST(CpuInvariance, Chunks) {
  Prompt prompt;
  // The last token's keys and values must not reach an earlier query, even through 0 * NaN.
  for (const Tensor* tensor : {&prompt.k, &prompt.v, &prompt.index_k}) {
    const TensorView last = rows(*tensor, Prompt::kTokens - 1, Prompt::kTokens);
    std::fill_n(static_cast<float*>(last.data), last.num_elements(),
                std::numeric_limits<float>::quiet_NaN());
  }
  for_each_simd_target([&](const char*) {
    const Prompt::Results whole = prompt.run_in_chunks(Prompt::kTokens);
    for (const std::int64_t chunk : {1, 7, 64, 150, 450}) {
      SCOPED_TRACE(chunk);
      const Prompt::Results parts = prompt.run_in_chunks(chunk);
      EXPECT_TRUE(same_bits(parts.ids, whole.ids));
      EXPECT_TRUE(same_bits(parts.sparse, whole.sparse));
      EXPECT_TRUE(same_bits(parts.lse, whole.lse));
      EXPECT_TRUE(same_bits(parts.dense, whole.dense));
    }
  });
}

TEST(CpuInvariance, OneStepIndexerEqualsScoresThenSelection) {
  const Prompt prompt;
  const std::int64_t num_blocks = (Prompt::kTokens + 15) / 16;
  const Tensor scores(DType::f32, {prompt.p.num_kv_heads, Prompt::kTokens, num_blocks});
  const Tensor ids(DType::i32, {prompt.p.num_kv_heads, Prompt::kTokens, prompt.p.top_k});
  const Tensor seq_len(DType::i32, {1});
  seq_len.data<std::int32_t>()[0] = Prompt::kTokens;
  for_each_simd_target([&](const char*) {
    run(IndexerScores{.problem = prompt.p,
                      .index_q = prompt.index_q,
                      .index_k = prompt.index_k,
                      .block_scores = scores});
    run(SelectTopK{.problem = prompt.p,
                   .batch = {.seq_lens_k = seq_len},
                   .block_scores = scores,
                   .block_ids = ids});
    EXPECT_TRUE(same_bits(ids, prompt.run_in_chunks(Prompt::kTokens).ids));
  });
}

#if defined(__x86_64__)
TEST(CpuInvariance, ScoresOfTargetsWithFusedMultiplyAdd) {
  const Prompt prompt;
  std::vector<Tensor> results;
  for_each_simd_target([&](const char* target) {
    if (std::string(target) != "AVX3" && std::string(target) != "AVX2") return;
    results.emplace_back(DType::f32, std::initializer_list<std::int64_t>{prompt.p.num_kv_heads,
                                                                         Prompt::kTokens, 29});
    run(IndexerScores{.problem = prompt.p,
                      .index_q = prompt.index_q,
                      .index_k = prompt.index_k,
                      .block_scores = results.back()});
  });
  for (const Tensor& scores : results) EXPECT_TRUE(same_bits(scores, results.front()));
}
#endif

TEST(CpuInvariance, OrderOfBlockIds) {
  const Prompt prompt;
  const Prompt::Results sorted = prompt.run_in_chunks(Prompt::kTokens);
  const Prompt::Results shuffled(prompt.p);
  std::memcpy(shuffled.ids.data<std::byte>(), sorted.ids.data<std::byte>(),
              sorted.ids.span<std::int32_t>().size_bytes());
  std::mt19937 random(7);
  auto ids = shuffled.ids.span<std::int32_t>();
  for (std::size_t row = 0; row < ids.size(); row += static_cast<std::size_t>(prompt.p.top_k)) {
    std::shuffle(ids.begin() + static_cast<std::ptrdiff_t>(row),
                 ids.begin() + static_cast<std::ptrdiff_t>(row) + prompt.p.top_k, random);
  }
  run(SparseAttentionForward{.problem = prompt.p,
                             .q = prompt.q,
                             .k = prompt.k,
                             .v = prompt.v,
                             .block_ids = shuffled.ids,
                             .out = shuffled.sparse,
                             .lse = shuffled.lse});
  EXPECT_TRUE(same_bits(shuffled.sparse, sorted.sparse));
  EXPECT_TRUE(same_bits(shuffled.lse, sorted.lse));
}

TEST(CpuInvariance, DtypeOfEqualNumbers) {
  // Values that bf16 and f16 hold exactly, so that f32 copies are the same numbers.
  const auto narrow = [](const Tensor& wide, DType dtype) {
    const TensorView& shape = wide;
    Tensor tensor(dtype, {shape.shape[0], shape.shape[1], shape.shape[2]});
    for (std::int64_t i = 0; i < shape.num_elements(); ++i) {
      float& value = wide.data<float>()[i];
      value = std::round(value * 16.0f) / 16.0f;
      core::store_element(core::address_at(tensor, i), dtype, static_cast<double>(value));
    }
    return tensor;
  };
  const Prompt prompt;
  const Tensor k = narrow(prompt.k, DType::bf16);
  const Tensor v = narrow(prompt.v, DType::f16);
  const Tensor q = narrow(prompt.q, DType::f16);
  const Tensor index_k = narrow(prompt.index_k, DType::bf16);
  for_each_simd_target([&](const char*) {
    const Prompt::Results wide = prompt.run_in_chunks(Prompt::kTokens);
    const Prompt::Results mixed(prompt.p);
    run(Indexer{.problem = prompt.p,
                .index_q = prompt.index_q,
                .index_k = index_k,
                .block_ids = mixed.ids});
    run(SparseAttentionForward{.problem = prompt.p,
                               .q = q,
                               .k = k,
                               .v = v,
                               .block_ids = wide.ids,
                               .out = mixed.sparse,
                               .lse = mixed.lse});
    EXPECT_TRUE(same_bits(mixed.ids, wide.ids));
    EXPECT_TRUE(same_bits(mixed.sparse, wide.sparse));
    EXPECT_TRUE(same_bits(mixed.lse, wide.lse));
  });
}

}  // namespace
}  // namespace msa::testing
