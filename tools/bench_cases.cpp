// SPDX-License-Identifier: Apache-2.0
//
// The CPU benchmark cases. M3 shape: 64 query / 4 KV heads of 128, 128-token blocks, top 16. A
// prefill case is one chunk of queries at the end of its context, so that long contexts stay
// affordable.
#include "tools/bench_cases.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <set>

#include "bench/selection.hpp"
#include "core/check.hpp"
#include "core/scalar.hpp"
#include "core/sequences.hpp"
#include "core/tensor.hpp"

namespace msa::tools {
namespace {

using core::Tensor;

struct Shape {
  std::string name;
  std::int64_t batch_size;
  std::int64_t seq_len_q;
  std::int64_t seq_len_k;
};

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
      {"chunk512.8k", 1, 512, 8192},     {"chunk512.32k", 1, 512, 32768},
      {"chunk512.128k", 1, 512, 131072}, {"decode.b1.32k", 1, 1, 32768},
      {"decode.b1.128k", 1, 1, 131072},  {"decode.b4.32k", 4, 1, 32768},
      {"verify4.b1.32k", 1, 4, 32768},
  };
  return all;
}

/// Random bf16 values, N(0, 1): a cheap generator, since the largest tensor has 10^8 elements.
void fill_normal(const Tensor& tensor, std::uint64_t seed) {
  std::mt19937 random(static_cast<std::uint32_t>(seed));
  std::vector<std::uint16_t> table(4096);
  std::normal_distribution<float> normal;
  for (auto& value : table) value = core::f32_to_bf16(normal(random));
  for (auto& value : tensor.span<std::uint16_t>()) value = table[random() % table.size()];
}

/// Everything a case owns; kept alive by the closure that runs it.
struct Inputs {
  Problem problem{};
  Shape shape{};
  Tensor page_table, seq_lens_k;
  Tensor index_q, index_k, q, k, v, out, block_scores, block_ids;
  core::HostBuffer workspace;
  double overlap4 = 0.0;

  std::int64_t total_q() const { return shape.batch_size * shape.seq_len_q; }
  std::int64_t num_blocks() const { return core::ceil_div(shape.seq_len_k, problem.block_size); }

  Batch batch() const { return {.page_table = page_table, .seq_lens_k = seq_lens_k}; }

  /// Query-key pairs that causality leaves, per head.
  double visible_pairs() const {
    const auto n = static_cast<double>(shape.seq_len_q);
    const auto context = static_cast<double>(shape.seq_len_k);
    return static_cast<double>(shape.batch_size) * (n * (context - n) + n * (n + 1.0) / 2.0);
  }
};

std::shared_ptr<Inputs> make_inputs(const Shape& shape) {
  auto inputs = std::make_shared<Inputs>();
  inputs->shape = shape;
  const std::int64_t pages = shape.batch_size * inputs->num_blocks();
  inputs->page_table = Tensor(DType::i32, {shape.batch_size, inputs->num_blocks()});
  inputs->seq_lens_k = Tensor(DType::i32, {shape.batch_size});
  auto table = inputs->page_table.span<std::int32_t>();
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), std::mt19937(5));
  MSA_CHECK(pages == static_cast<std::int64_t>(table.size()), "page table of the wrong size");
  std::fill_n(inputs->seq_lens_k.data<std::int32_t>(), shape.batch_size,
              static_cast<std::int32_t>(shape.seq_len_k));
  return inputs;
}

void make_index(Inputs& in) {
  in.index_q = Tensor(DType::bf16, {in.total_q(), in.problem.num_kv_heads, in.problem.index_dim});
  in.index_k = Tensor(DType::bf16, {in.shape.batch_size * in.num_blocks(), 1, in.problem.block_size,
                                    in.problem.index_dim});
  fill_normal(in.index_q, 1);
  fill_normal(in.index_k, 2);
}

void make_scores(Inputs& in) {
  in.block_scores = Tensor(DType::f32, {in.problem.num_kv_heads, in.total_q(), in.num_blocks()});
}

void make_ids(Inputs& in) {
  in.block_ids = Tensor(DType::i32, {in.problem.num_kv_heads, in.total_q(), in.problem.top_k});
}

void make_qkv(Inputs& in) {
  const Problem& p = in.problem;
  const std::int64_t pages = in.shape.batch_size * in.num_blocks();
  in.q = Tensor(DType::bf16, {in.total_q(), p.num_q_heads, p.head_dim});
  in.k = Tensor(DType::bf16, {pages, p.num_kv_heads, p.block_size, p.head_dim});
  in.v = Tensor(DType::bf16, {pages, p.num_kv_heads, p.block_size, p.head_dim});
  in.out = Tensor(DType::bf16, {in.total_q(), p.num_q_heads, p.head_dim});
  fill_normal(in.q, 1);
  fill_normal(in.k, 2);
  fill_normal(in.v, 3);
}

template <class Args>
PreparedBench prepare(const std::shared_ptr<Inputs>& inputs, const Args& args,
                      const Options& options, double flops, double bytes) {
  const auto plan = msa::plan(args, options);
  inputs->workspace = core::HostBuffer(plan.workspace_bytes());
  return {.run = [inputs, args, plan] { plan.run(args, inputs->workspace.span()); },
          .implementation = plan.implementation(),
          .flops = flops,
          .bytes = bytes,
          .overlap4 = inputs->overlap4};
}

double bytes_of(const Tensor& tensor) {
  return static_cast<double>(tensor.view().num_elements()) *
         static_cast<double>(size_of(tensor.view().dtype));
}

double index_flops(const Inputs& in) {
  return 2.0 * in.problem.index_dim * in.problem.num_kv_heads * in.visible_pairs();
}

PreparedBench prepare_indexer(const Shape& shape, const Options& options) {
  auto in = make_inputs(shape);
  make_index(*in);
  make_ids(*in);
  const Indexer args{.problem = in->problem,
                     .batch = in->batch(),
                     .index_q = in->index_q,
                     .index_k = in->index_k,
                     .block_ids = in->block_ids};
  return prepare(in, args, options, index_flops(*in),
                 bytes_of(in->index_q) + bytes_of(in->index_k) + bytes_of(in->block_ids));
}

PreparedBench prepare_scores(const Shape& shape, const Options& options) {
  auto in = make_inputs(shape);
  make_index(*in);
  make_scores(*in);
  const IndexerScores args{.problem = in->problem,
                           .batch = in->batch(),
                           .index_q = in->index_q,
                           .index_k = in->index_k,
                           .block_scores = in->block_scores};
  return prepare(in, args, options, index_flops(*in),
                 bytes_of(in->index_q) + bytes_of(in->index_k) + bytes_of(in->block_scores));
}

PreparedBench prepare_select(const Shape& shape, const Options& options) {
  auto in = make_inputs(shape);
  make_scores(*in);
  make_ids(*in);
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  for (float& score : in->block_scores.span<float>()) score = normal(random);
  const SelectTopK args{.problem = in->problem,
                        .batch = {.seq_lens_k = in->seq_lens_k},
                        .block_scores = in->block_scores,
                        .block_ids = in->block_ids};
  return prepare(in, args, options, 0.0, bytes_of(in->block_scores) + bytes_of(in->block_ids));
}

PreparedBench prepare_sparse(const Shape& shape, const bench::SelectionFamily& family,
                             const Options& options) {
  auto in = make_inputs(shape);
  make_qkv(*in);
  make_ids(*in);
  const Problem& p = in->problem;
  // Selections of each sequence side by side: [heads, batch * seq_len_q, top_k].
  double tokens = 0.0;          // attended, summed over KV heads and queries
  double distinct_pages = 0.0;  // read at least once, summed over KV heads
  const std::int64_t row = shape.seq_len_q * p.top_k;
  for (std::int64_t b = 0; b < shape.batch_size; ++b) {
    const bench::Selection selection = bench::make_selection(
        family, p, shape.seq_len_q, shape.seq_len_k, static_cast<std::uint64_t>(10 + b));
    in->overlap4 = selection.overlap4;
    for (std::int64_t head = 0; head < p.num_kv_heads; ++head) {
      const std::int32_t* ids = selection.block_ids.data() + head * row;
      std::copy_n(ids, row,
                  in->block_ids.data<std::int32_t>() + (head * shape.batch_size + b) * row);
      std::set<std::int32_t> pages;
      for (std::int64_t t = 0; t < shape.seq_len_q; ++t) {
        const std::int64_t position = shape.seq_len_k - shape.seq_len_q + t;
        for (int slot = 0; slot < p.top_k; ++slot) {
          const std::int32_t id = ids[t * p.top_k + slot];
          if (id < 0) continue;
          pages.insert(id);
          tokens += static_cast<double>(
              std::min<std::int64_t>(p.block_size, position + 1 - std::int64_t{id} * p.block_size));
        }
      }
      distinct_pages += static_cast<double>(pages.size());
    }
  }
  const SparseAttentionForward args{.problem = p,
                                    .batch = in->batch(),
                                    .q = in->q,
                                    .k = in->k,
                                    .v = in->v,
                                    .block_ids = in->block_ids,
                                    .out = in->out};
  const double page_bytes = 2.0 * 2.0 * p.block_size * p.head_dim;  // K and V of one head, bf16
  return prepare(
      in, args, options, 4.0 * p.head_dim * p.group_size() * tokens,
      bytes_of(in->q) + bytes_of(in->out) + bytes_of(in->block_ids) + distinct_pages * page_bytes);
}

PreparedBench prepare_dense(const Shape& shape, const Options& options) {
  auto in = make_inputs(shape);
  make_qkv(*in);
  const DenseAttentionForward args{.problem = in->problem,
                                   .batch = in->batch(),
                                   .q = in->q,
                                   .k = in->k,
                                   .v = in->v,
                                   .out = in->out};
  return prepare(in, args, options,
                 4.0 * in->problem.head_dim * in->problem.num_q_heads * in->visible_pairs(),
                 bytes_of(in->q) + bytes_of(in->k) + bytes_of(in->v) + bytes_of(in->out));
}

PreparedBench prepare_append(const Shape& shape, const Options& options) {
  auto in = make_inputs(shape);
  make_qkv(*in);
  const Problem& p = in->problem;
  auto k_new =
      std::make_shared<Tensor>(Tensor(DType::bf16, {in->total_q(), p.num_kv_heads, p.head_dim}));
  fill_normal(*k_new, 6);
  const AppendKv args{.problem = p,
                      .batch = in->batch(),
                      .k = *k_new,
                      .v = *k_new,
                      .k_pages = in->k,
                      .v_pages = in->v};
  PreparedBench prepared = prepare(in, args, options, 0.0, 4.0 * bytes_of(*k_new));
  prepared.run = [run = prepared.run, k_new] { run(); };
  return prepared;
}

}  // namespace

std::vector<BenchCase> bench_cases() {
  std::vector<BenchCase> cases;
  const auto add = [&](const char* operation, const std::string& name, const auto& prepare_case) {
    cases.push_back({operation, name, prepare_case});
  };
  for (const Shape& shape : shapes()) {
    const std::string name = "m3." + shape.name;
    add("IndexerScores", name, [shape](const Options& o) { return prepare_scores(shape, o); });
    add("SelectTopK", name, [shape](const Options& o) { return prepare_select(shape, o); });
    add("Indexer", name, [shape](const Options& o) { return prepare_indexer(shape, o); });
    for (const bench::SelectionFamily& family : {bench::kRealLike, bench::kWeak, bench::kRandom}) {
      add("SparseAttentionForward", core::concat(name, ".", family.name),
          [shape, family](const Options& o) { return prepare_sparse(shape, family, o); });
    }
    add("AppendKv", name, [shape](const Options& o) { return prepare_append(shape, o); });
    // 2.2 TFLOP a run at 128K: the ratio to sparse is seen at 32K already.
    if (shape.seq_len_q * shape.seq_len_k > 512 * 32768) continue;
    add("DenseAttentionForward", name,
        [shape](const Options& o) { return prepare_dense(shape, o); });
  }
  std::stable_sort(cases.begin(), cases.end(), [](const BenchCase& a, const BenchCase& b) {
    const auto rank = [](const BenchCase& c) {
      constexpr std::array<const char*, 6> kOrder = {
          "IndexerScores",         "SelectTopK", "Indexer", "SparseAttentionForward",
          "DenseAttentionForward", "AppendKv"};
      return std::find_if(kOrder.begin(), kOrder.end(),
                          [&](const char* name) { return std::string(name) == c.operation; }) -
             kOrder.begin();
    };
    return rank(a) < rank(b);
  });
  return cases;
}

}  // namespace msa::tools
