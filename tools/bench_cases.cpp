// SPDX-License-Identifier: Apache-2.0
//
// The CPU benchmark cases. M3 shape: 64 query / 4 KV heads of 128, 128-token blocks, top 16. A
// prefill case is one chunk of queries at the end of its context, so that long contexts stay
// affordable.
#include "tools/bench_cases.hpp"

#include <algorithm>
#include <array>
#include <memory>

#include "bench/op_inputs.hpp"
#include "core/check.hpp"
#include "core/tensor.hpp"

namespace msa::tools {
namespace {

using bench::Inputs;
using bench::Op;
using bench::Shape;

const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {
      {.name = "chunk512.8k", .seq_len_q = 512, .seq_len_k = 8192},
      {.name = "chunk512.32k", .seq_len_q = 512, .seq_len_k = 32768},
      {.name = "chunk512.128k", .seq_len_q = 512, .seq_len_k = 131072},
      {.name = "decode.b1.32k", .seq_len_k = 32768},
      {.name = "decode.b1.128k", .seq_len_k = 131072},
      {.name = "decode.b4.32k", .batch_size = 4, .seq_len_k = 32768},
      {.name = "verify4.b1.32k", .seq_len_q = 4, .seq_len_k = 32768},
  };
  return all;
}

/// Binds an operation to a plan; the closure that runs it keeps the inputs alive.
template <class Args>
PreparedBench prepare(const std::shared_ptr<Inputs>& inputs, const Op<Args>& op,
                      const Options& options) {
  const auto plan = msa::plan(op.args, options);
  const auto workspace = std::make_shared<core::HostBuffer>(plan.workspace_bytes());
  return {.run = [inputs, workspace, args = op.args, plan] { plan.run(args, workspace->span()); },
          .implementation = plan.implementation(),
          .flops = op.work.flops,
          .bytes = op.work.bytes};
}

PreparedBench prepare_indexer(const Shape& shape, const Options& options) {
  const auto in = std::make_shared<Inputs>(shape);
  in->add_index(bench::kRealLike);
  in->add_ids();
  return prepare(in, in->indexer(), options);
}

PreparedBench prepare_scores(const Shape& shape, const Options& options) {
  const auto in = std::make_shared<Inputs>(shape);
  in->add_index(bench::kRealLike);
  in->add_scores();
  return prepare(in, in->index_scores(), options);
}

PreparedBench prepare_select(const Shape& shape, const Options& options) {
  const auto in = std::make_shared<Inputs>(shape);
  in->add_random_scores();
  in->add_ids();
  return prepare(in, in->select(), options);
}

PreparedBench prepare_sparse(const Shape& shape, const bench::SelectionFamily& family,
                             const Options& options) {
  const auto in = std::make_shared<Inputs>(shape);
  in->add_attention();
  in->add_selection(family);
  PreparedBench prepared = prepare(in, in->sparse(), options);
  prepared.overlap4 = in->overlap4();
  return prepared;
}

PreparedBench prepare_dense(const Shape& shape, const Options& options) {
  const auto in = std::make_shared<Inputs>(shape);
  in->add_attention();
  return prepare(in, in->dense(), options);
}

PreparedBench prepare_append(const Shape& shape, const Options& options) {
  const auto in = std::make_shared<Inputs>(shape);
  in->add_attention();
  in->add_new_tokens();
  return prepare(in, in->append(), options);
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
