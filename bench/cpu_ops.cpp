// SPDX-License-Identifier: Apache-2.0
//
// The CPU backend's operations against the FMA peak measured just before each: FLOP/s and
// percent_of_peak are per second of CPU time, so of one core, whatever else runs on the machine.
// Shapes: "m3" has 64 query and 4 KV heads, "small" 16 and 2; head_dim 128,
// blocks of 128 tokens, top 16. A prefill row is one chunk of queries at the end of its context.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <ctime>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/selection.hpp"
#include "core/scalar.hpp"
#include "core/tensor.hpp"
#include "cpu/ceilings.hpp"
#include "msa/msa.hpp"

namespace msa::bench {
namespace {

using core::HostBuffer;
using core::Tensor;

struct Shape {
  const char* name;
  Problem problem;
  std::int64_t batch_size;
  std::int64_t seq_len_q;
  std::int64_t seq_len_k;
};

const Problem kM3{};
const Problem kSmall{.num_q_heads = 16, .num_kv_heads = 2};

Tensor random_tensor(DType dtype, std::initializer_list<std::int64_t> shape, unsigned seed) {
  Tensor tensor(dtype, shape);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> table(4096);
  for (float& value : table) value = normal(random);
  for (std::int64_t i = 0; i < tensor.view().num_elements(); ++i) {
    const float value = table[random() % table.size()];
    if (dtype == DType::f32) {
      tensor.data<float>()[i] = value;
    } else {
      tensor.data<std::uint16_t>()[i] = core::f32_to_bf16(value);
    }
  }
  return tensor;
}

/// The inputs of all operations: queries f32 as in a model, pages bf16 in random order.
struct Inputs {
  explicit Inputs(const Shape& shape)
      : p(shape.problem),
        total_q(shape.batch_size * shape.seq_len_q),
        num_blocks((shape.seq_len_k + p.block_size - 1) / p.block_size),
        seq_len_k(shape.seq_len_k),
        seq_len_q(shape.seq_len_q),
        batch_size(shape.batch_size),
        page_table(DType::i32, {batch_size, num_blocks}),
        seq_lens_k(DType::i32, {batch_size}) {
    auto pages = page_table.span<std::int32_t>();
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(5));
    std::fill_n(seq_lens_k.data<std::int32_t>(), batch_size, static_cast<std::int32_t>(seq_len_k));
  }

  Batch batch() const { return {.page_table = page_table, .seq_lens_k = seq_lens_k}; }
  Tensor pages(std::int64_t heads, std::int64_t dim, unsigned seed) const {
    return random_tensor(DType::bf16, {batch_size * num_blocks, heads, p.block_size, dim}, seed);
  }
  /// Query-key pairs that causality leaves, per head.
  double visible_pairs() const {
    const auto n = static_cast<double>(seq_len_q);
    const auto context = static_cast<double>(seq_len_k);
    return static_cast<double>(batch_size) * (n * (context - n) + n * (n + 1.0) / 2.0);
  }

  Problem p;
  std::int64_t total_q, num_blocks, seq_len_k, seq_len_q, batch_size;
  Tensor page_table, seq_lens_k;
};

/// FLOP per second of process CPU time, summed over threads: the rate of one core.
double fma_rate() {
  const std::clock_t start = std::clock();
  const double flops = cpu::run_fma();
  return flops * CLOCKS_PER_SEC / static_cast<double>(std::clock() - start);
}

template <class Args>
void run(benchmark::State& state, const Args& args, double flops) {
  const auto plan = msa::plan(args, {.backend = "cpu"});
  const HostBuffer workspace(plan.workspace_bytes());
  double peak = 0.0;
  for (int i = 0; i < 3; ++i) peak = std::max(peak, fma_rate());
  for (auto _ : state) plan.run(args, workspace.span());
  const double done = flops * static_cast<double>(state.iterations());
  state.counters["FLOP/s"] = benchmark::Counter(done, benchmark::Counter::kIsRate);
  state.counters["percent_of_peak"] =
      benchmark::Counter(100.0 * done / peak, benchmark::Counter::kIsRate);
}

void bench_fma_peak(benchmark::State& state) {
  double done = 0.0;
  for (auto _ : state) done += cpu::run_fma();
  state.counters["FLOP/s"] = benchmark::Counter(done, benchmark::Counter::kIsRate);
}

void bench_indexer(benchmark::State& state, const Shape& shape) {
  const Inputs in(shape);
  const Tensor index_q =
      random_tensor(DType::f32, {in.total_q, in.p.num_kv_heads, in.p.index_dim}, 1);
  const Tensor index_k = in.pages(1, in.p.index_dim, 2);
  const Tensor ids(DType::i32, {in.p.num_kv_heads, in.total_q, in.p.top_k});
  run(state,
      Indexer{.problem = in.p,
              .batch = in.batch(),
              .index_q = index_q,
              .index_k = index_k,
              .block_ids = ids},
      2.0 * in.p.index_dim * in.p.num_kv_heads * in.visible_pairs());
}

void bench_select(benchmark::State& state, const Shape& shape) {
  const Inputs in(shape);
  const Tensor scores =
      random_tensor(DType::f32, {in.p.num_kv_heads, in.total_q, in.num_blocks}, 1);
  const Tensor ids(DType::i32, {in.p.num_kv_heads, in.total_q, in.p.top_k});
  const SelectTopK args{.problem = in.p,
                        .batch = {.seq_lens_k = in.seq_lens_k},
                        .block_scores = scores,
                        .block_ids = ids};
  const auto plan = msa::plan(args, {.backend = "cpu"});
  const HostBuffer workspace(plan.workspace_bytes());
  for (auto _ : state) plan.run(args, workspace.span());
  const auto rows = static_cast<double>(in.p.num_kv_heads * in.total_q);
  state.counters["rows/s"] = benchmark::Counter(rows * static_cast<double>(state.iterations()),
                                                benchmark::Counter::kIsRate);
}

struct AttentionInputs : Inputs {
  explicit AttentionInputs(const Shape& shape)
      : Inputs(shape),
        q(random_tensor(DType::f32, {total_q, p.num_q_heads, p.head_dim}, 1)),
        k(pages(p.num_kv_heads, p.head_dim, 2)),
        v(pages(p.num_kv_heads, p.head_dim, 3)),
        out(DType::f32, {total_q, p.num_q_heads, p.head_dim}) {}
  Tensor q, k, v, out;
};

void bench_sparse(benchmark::State& state, const Shape& shape, const SelectionFamily& family) {
  const AttentionInputs in(shape);
  const Problem& p = in.p;
  const Tensor ids(DType::i32, {p.num_kv_heads, in.total_q, p.top_k});
  const std::int64_t row = in.seq_len_q * p.top_k;
  double tokens = 0.0;  // attended, summed over queries and KV heads
  for (std::int64_t b = 0; b < in.batch_size; ++b) {
    const Selection selection =
        make_selection(family, p, in.seq_len_q, in.seq_len_k, static_cast<std::uint64_t>(10 + b));
    for (std::int64_t head = 0; head < p.num_kv_heads; ++head) {
      const std::int32_t* from = selection.block_ids.data() + head * row;
      std::copy_n(from, row, ids.data<std::int32_t>() + (head * in.batch_size + b) * row);
      for (std::int64_t i = 0; i < row; ++i) {
        const std::int64_t position = in.seq_len_k - in.seq_len_q + i / p.top_k;
        if (from[i] < 0) continue;
        tokens += static_cast<double>(
            std::min<std::int64_t>(p.block_size, position + 1 - from[i] * p.block_size));
      }
    }
    state.counters["overlap4"] = selection.overlap4;
  }
  run(state,
      SparseAttentionForward{.problem = p,
                             .batch = in.batch(),
                             .q = in.q,
                             .k = in.k,
                             .v = in.v,
                             .block_ids = ids,
                             .out = in.out},
      4.0 * p.head_dim * p.group_size() * tokens);
}

void bench_dense(benchmark::State& state, const Shape& shape) {
  const AttentionInputs in(shape);
  run(state,
      DenseAttentionForward{
          .problem = in.p, .batch = in.batch(), .q = in.q, .k = in.k, .v = in.v, .out = in.out},
      4.0 * in.p.head_dim * in.p.num_q_heads * in.visible_pairs());
}

[[maybe_unused]] const bool kRegistered = [] {
  const auto add = [](const std::string& name, auto function) {
    benchmark::RegisterBenchmark(name.c_str(), function)
        ->Unit(benchmark::kMillisecond)
        ->MeasureProcessCPUTime();
  };
  add("fma_peak", bench_fma_peak);
  const Shape shapes[] = {
      {"m3/chunk256/8k", kM3, 1, 256, 8192},         {"m3/chunk256/32k", kM3, 1, 256, 32768},
      {"m3/decode/32k", kM3, 1, 1, 32768},           {"small/chunk512/8k", kSmall, 1, 512, 8192},
      {"small/chunk512/32k", kSmall, 1, 512, 32768}, {"small/decode/32k", kSmall, 1, 1, 32768},
  };
  for (const Shape& shape : shapes) {
    const std::string name = shape.name;
    add("indexer/" + name, [shape](benchmark::State& s) { bench_indexer(s, shape); });
    add("select_top_k/" + name, [shape](benchmark::State& s) { bench_select(s, shape); });
    for (const SelectionFamily& family : {kRealLike, kRandom}) {
      add("sparse/" + name + "/" + family.name,
          [shape, family](benchmark::State& s) { bench_sparse(s, shape, family); });
    }
    add("dense/" + name, [shape](benchmark::State& s) { bench_dense(s, shape); });
  }
  return true;
}();

}  // namespace
}  // namespace msa::bench
