// SPDX-License-Identifier: Apache-2.0
//
// The CPU backend's operations against what the machine gives beside them: wall time on all threads
// of the pool, and around each timing the FMA peak and the read bandwidth of the same threads.
// Shapes: "m3" has 64 query and 4 KV heads, "small" 16 and 4; head_dim 128, blocks of 128 tokens,
// top 16; queries f32 as in a model, caches bf16. docs/benchmarking.md says what each row is.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench/op_inputs.hpp"
#include "core/check.hpp"
#include "core/tensor.hpp"
#include "cpu/ceilings.hpp"
#include "cpu/cpu.hpp"
#include "msa/backend.hpp"
#include "msa/msa.hpp"

namespace msa::bench {
namespace {

using benchmark::Counter;
using benchmark::State;
using Clock = std::chrono::steady_clock;

const Problem kM3{};
const Problem kSmall{.num_q_heads = 16};
constexpr Options kCpu{.backend = "cpu"};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

cpu::MemoryStream& memory() {
  static cpu::MemoryStream stream;
  return stream;
}

double fma_gflops() {
  const auto start = Clock::now();
  return cpu::run_fma() / seconds_since(start) * 1e-9;
}

/// A timing's clock, and the best that the machine gave right before and right after it.
class Beside {
 public:
  Beside() {
    measure();
    start_ = Clock::now();
  }
  /// Adds the rates of `work` per iteration, and their shares of the ceilings.
  void finish(State& state, const Work& work) {
    const double seconds = seconds_since(start_) / static_cast<double>(state.iterations());
    measure();
    const double gflops = work.flops / seconds * 1e-9;
    const double gbytes = work.bytes / seconds * 1e-9;
    state.counters["fma_peak_gflops"] = fma_;
    state.counters["read_gbytes_per_s"] = read_;
    state.counters["gflops"] = gflops;
    state.counters["gbytes_per_s"] = gbytes;
    state.counters["fraction_of_peak"] = gflops / fma_;
    state.counters["fraction_of_bandwidth"] = gbytes / read_;
  }

 private:
  void measure() {
    constexpr double kSeconds = 0.06;
    for (const auto start = Clock::now(); seconds_since(start) < kSeconds;) {
      fma_ = std::max(fma_, fma_gflops());
    }
    for (const auto start = Clock::now(); seconds_since(start) < kSeconds;) {
      read_ = std::max(read_, memory().read());
    }
  }
  Clock::time_point start_;
  double fma_ = 0.0, read_ = 0.0;
};

struct Kept {
  std::string name;
  std::shared_ptr<void> inputs;
};

/// Inputs of the row that ran last, for its repetitions: the largest are gigabytes, so that only
/// one row's are in memory. One name, one type.
template <class Make>
auto& kept(const std::string& name, const Make& make) {
  static Kept last;
  using T = decltype(make());
  if (last.name != name) {
    last = {};
    last = {.name = name, .inputs = std::make_shared<T>(make())};
  }
  return *static_cast<T*>(last.inputs.get());
}

template <class Args>
void run_once(const Args& args, core::HostBuffer& workspace) {
  const auto plan = msa::plan(args, kCpu);
  if (workspace.size() < plan.workspace_bytes()) {
    workspace = core::HostBuffer(plan.workspace_bytes());
  }
  plan.run(args, workspace.span());
}

template <class Args>
void time_op(State& state, const Op<Args>& op) {
  const auto plan = msa::plan(op.args, kCpu);
  const core::HostBuffer workspace(plan.workspace_bytes());
  plan.run(op.args, workspace.span());
  Beside beside;
  for (auto _ : state) plan.run(op.args, workspace.span());
  beside.finish(state, op.work);
}

/// Ceilings are the best of a repetition: so are those beside the other rows.
void bench_fma_peak(State& state) {
  double best = 0.0;
  for (auto _ : state) best = std::max(best, fma_gflops());
  state.counters["gflops"] = best;
}

template <class Pass>
void bench_memory(State& state, const Pass& pass) {
  double best = 0.0;
  for (auto _ : state) best = std::max(best, pass());
  state.counters["gbytes_per_s"] = best;
}

void bench_index_scores(State& state, const Shape& shape) {
  auto& in = kept("index/" + shape.name, [&] {
    Inputs inputs(shape);
    inputs.add_index(kRealLike);
    inputs.add_scores();
    inputs.add_ids();
    return inputs;
  });
  time_op(state, in.index_scores());
}

/// Of the scores that the index branch gives.
void bench_select(State& state, const Shape& shape) {
  auto& in = kept("index/" + shape.name, [&] {
    Inputs inputs(shape);
    inputs.add_index(kRealLike);
    inputs.add_scores();
    inputs.add_ids();
    return inputs;
  });
  core::HostBuffer workspace;
  run_once(in.index_scores().args, workspace);
  time_op(state, in.select());
}

void bench_indexer(State& state, const Shape& shape, const SelectionFamily& family, bool codes) {
  const char* name = codes ? "indexer_codes/" : "indexer/";
  auto& in = kept(name + shape.name + family.name, [&] {
    Inputs inputs(shape);
    inputs.add_index(family);
    if (codes) inputs.add_codes();
    inputs.add_ids();
    return inputs;
  });
  time_op(state, in.indexer());
  state.counters["overlap4"] = in.overlap4();
}

void bench_sparse(State& state, const Shape& shape, const SelectionFamily& family) {
  auto& in = kept("sparse/" + shape.name + family.name, [&] {
    Inputs inputs(shape);
    inputs.add_attention();
    inputs.add_selection(family);
    return inputs;
  });
  time_op(state, in.sparse());
  state.counters["overlap4"] = in.overlap4();
}

void bench_dense(State& state, const Shape& shape) {
  auto& in = kept("dense/" + shape.name, [&] {
    Inputs inputs(shape);
    inputs.add_attention();
    return inputs;
  });
  time_op(state, in.dense());
}

/// How a layer finds its blocks.
enum class Layer { kDense, kTwoSteps, kFused };

/// What one layer does between its projections while a prompt of shape.seq_len_k tokens passes
/// through in chunks of shape.seq_len_q: append the new keys, select, attend. Every chunk runs; the
/// selection is the indexer's own, of queries and keys that follow `family`.
void bench_layer(State& state, const Shape& shape, Layer layer, const SelectionFamily& family) {
  auto& in = kept("layer/" + shape.name + family.name, [&] {
    Inputs inputs(shape);
    inputs.add_attention();
    inputs.add_index(family, shape.seq_len_k);
    inputs.add_new_tokens();
    inputs.add_scores();
    inputs.add_ids();
    return inputs;
  });
  core::HostBuffer workspace;
  Work work;
  double select_s = 0.0;
  double attend_s = 0.0;
  const auto timed = [&](auto op, double& seconds) {
    const auto start = Clock::now();
    run_once(op.args, workspace);
    seconds += seconds_since(start);
    return op.work;
  };
  const auto run_chunk = [&] {
    double append_s = 0.0;
    timed(in.append(), append_s);
    Work done[2];
    if (layer == Layer::kDense) {
      done[0] = timed(in.dense(), attend_s);
    } else {
      if (layer == Layer::kFused) {
        done[0] = timed(in.indexer(), select_s);
      } else {
        done[0] = timed(in.index_scores(), select_s);
        timed(in.select(), select_s);
      }
      done[1] = timed(in.sparse(), attend_s);
    }
    for (const Work& part : done) {
      work.flops += part.flops;
      work.bytes += part.bytes;
    }
  };
  Beside beside;
  for (auto _ : state) {
    work = {};
    for (std::int64_t first = 0; first < shape.seq_len_k; first += shape.seq_len_q) {
      in.move_to(first);
      run_chunk();
    }
  }
  beside.finish(state, work);
  state.counters["select_seconds"] = Counter(select_s, Counter::kAvgIterations);
  state.counters["attend_seconds"] = Counter(attend_s, Counter::kAvgIterations);
  // Of the last chunk.
  if (layer != Layer::kDense) state.counters["overlap4"] = in.overlap4();
}

/// Decode steps that take turns over kSequences caches, several times the last-level cache in all,
/// so that every step reads from memory, as it does in a model of many layers. Attention finds
/// the ids of the indexer, which has run once.
class Decode {
 public:
  static constexpr std::int64_t kSequences = 8;
  static constexpr std::int64_t kRounds = 8;  ///< different queries of each sequence

  Decode(const Shape& shape, const SelectionFamily& family, bool codes) {
    const auto blocks = (shape.seq_len_k + shape.problem.block_size - 1) / shape.problem.block_size;
    const auto cache = std::make_shared<Cache>(shape.problem, kSequences, blocks);
    for (std::int64_t i = 0; i < kRounds * kSequences / shape.batch_size; ++i) {
      Inputs in(shape, cache, i * shape.batch_size % kSequences, static_cast<unsigned>(100 * i));
      in.add_index(family);
      if (codes) in.add_codes();
      in.add_attention();
      in.add_new_tokens();
      in.add_ids();
      core::HostBuffer workspace;
      run_once(in.indexer().args, workspace);
      steps_.push_back(std::move(in));
    }
  }

  /// Ops of all steps, by one of the functions of Inputs.
  template <class Args>
  std::vector<Op<Args>> ops(Op<Args> (Inputs::*make)() const) const {
    std::vector<Op<Args>> all;
    for (const Inputs& in : steps_) all.push_back((in.*make)());
    return all;
  }

 private:
  std::vector<Inputs> steps_;
};

/// One operation on the inputs of each step, with one plan, since shapes are the same.
template <class Args>
class Rotation {
 public:
  Rotation(const Decode& decode, Op<Args> (Inputs::*make)() const)
      : ops_(decode.ops(make)),
        plan_(msa::plan(ops_[0].args, kCpu)),
        workspace_(plan_.workspace_bytes()) {}
  void run(std::size_t step) const { plan_.run(ops_[step % ops_.size()].args, workspace_.span()); }
  /// Mean of a step.
  void add_work(Work& work) const {
    for (const Op<Args>& op : ops_) {
      work.flops += op.work.flops / static_cast<double>(ops_.size());
      work.bytes += op.work.bytes / static_cast<double>(ops_.size());
    }
  }

 private:
  std::vector<Op<Args>> ops_;
  Plan<Args> plan_;
  core::HostBuffer workspace_;
};

struct DecodeRow {
  Shape shape;
  SelectionFamily family;
  bool codes;

  Decode& inputs() const {
    return kept("decode/" + shape.name + family.name + (codes ? "/codes" : ""),
                [&] { return Decode(shape, family, codes); });
  }
};

template <class Run>
void time_steps(State& state, const Work& work, const Run& run) {
  Beside beside;
  std::size_t step = 0;
  for (auto _ : state) run(step++);
  beside.finish(state, work);
}

template <class Args>
void bench_decode(State& state, const DecodeRow& row, Op<Args> (Inputs::*make)() const) {
  const Rotation<Args> rotation(row.inputs(), make);
  Work work;
  rotation.add_work(work);
  time_steps(state, work, [&](std::size_t step) { rotation.run(step); });
}

/// Append, indexer and attention on the blocks that the indexer took.
void bench_decode_step(State& state, const DecodeRow& row) {
  const Decode& decode = row.inputs();
  const Rotation<AppendKv> append(decode, &Inputs::append);
  const Rotation<Indexer> indexer(decode, &Inputs::indexer);
  const Rotation<SparseAttentionForward> sparse(decode, &Inputs::sparse);
  Work work;
  append.add_work(work);
  indexer.add_work(work);
  sparse.add_work(work);
  time_steps(state, work, [&](std::size_t step) {
    append.run(step);
    indexer.run(step);
    sparse.run(step);
  });
}

Shape model_shape(const char* name, const Problem& problem, std::int64_t batch_size,
                  std::int64_t seq_len_q, std::int64_t seq_len_k) {
  return {.name = name,
          .problem = problem,
          .batch_size = batch_size,
          .seq_len_q = seq_len_q,
          .seq_len_k = seq_len_k,
          .activations = DType::f32};
}

template <class Function>
auto* add(const std::string& name, const Function& function) {
  return benchmark::RegisterBenchmark(name.c_str(), function)
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime();
}

void add_ceilings() {
  add("fma_peak", bench_fma_peak);
  add("read_bandwidth", [](State& s) { bench_memory(s, [] { return memory().read(); }); });
  add("copy_bandwidth", [](State& s) { bench_memory(s, [] { return memory().copy(); }); });
}

void add_operations() {
  const Shape shapes[] = {
      model_shape("m3/chunk512/32k", kM3, 1, 512, 32768),
      model_shape("small/chunk512/32k", kSmall, 1, 512, 32768),
      model_shape("m3/chunk512/8k", kM3, 1, 512, 8192),
      model_shape("m3/decode/32k", kM3, 1, 1, 32768),
      model_shape("small/decode/32k", kSmall, 1, 1, 32768),
  };
  for (const Shape& shape : shapes) {
    add("index_scores/" + shape.name, [=](State& s) { bench_index_scores(s, shape); });
    add("select_top_k/" + shape.name, [=](State& s) { bench_select(s, shape); });
    for (const SelectionFamily& family : {kRealLike, kRandom}) {
      add("indexer/" + shape.name + "/" + family.name,
          [=](State& s) { bench_indexer(s, shape, family, false); });
      if (shape.seq_len_q > 1) continue;  // codes screen keys for few queries only
      add("indexer_codes/" + shape.name + "/" + family.name,
          [=](State& s) { bench_indexer(s, shape, family, true); });
    }
    for (const SelectionFamily& family : {kRealLike, kWeak, kRandom}) {
      add("sparse/" + shape.name + "/" + family.name,
          [=](State& s) { bench_sparse(s, shape, family); });
    }
    add("dense/" + shape.name, [=](State& s) { bench_dense(s, shape); });
  }
}

void add_layers() {
  for (const std::int64_t seq_len_k : {std::int64_t{4096}, std::int64_t{32768}}) {
    const Shape shape = model_shape(seq_len_k == 4096 ? "m3/4k" : "m3/32k", kM3, 1, 512, seq_len_k);
    const auto add_layer = [&](const std::string& name, Layer layer,
                               const SelectionFamily& family) {
      // Tens of seconds a run at 32K: one iteration is enough to time, three show the spread.
      add("layer/" + shape.name + name, [=](State& s) {
        bench_layer(s, shape, layer, family);
      })->Iterations(1);
    };
    add_layer("/msa/real-like", Layer::kTwoSteps, kRealLike);
    add_layer("/msa_fused/real-like", Layer::kFused, kRealLike);
    add_layer("/dense", Layer::kDense, kRealLike);
    add_layer("/msa/random", Layer::kTwoSteps, kRandom);
  }
}

void add_decode() {
  for (const Shape& shape :
       {model_shape("m3/b1/128k", kM3, 1, 1, 131072), model_shape("m3/b8/128k", kM3, 8, 1, 131072),
        model_shape("small/b1/128k", kSmall, 1, 1, 131072),
        model_shape("small/b8/128k", kSmall, 8, 1, 131072)}) {
    const auto add_rows = [&](const DecodeRow& row, const std::string& kind) {
      add(core::concat("decode/", shape.name, "/indexer", kind),
          [=](State& s) { bench_decode(s, row, &Inputs::indexer); });
      add(core::concat("decode/", shape.name, "/step", kind),
          [=](State& s) { bench_decode_step(s, row); });
    };
    add("decode/" + shape.name + "/attention",
        [=](State& s) { bench_decode(s, {shape, kRealLike, false}, &Inputs::sparse); });
    add_rows({shape, kRealLike, false}, "");
    add_rows({shape, kRealLike, true}, "_codes/real-like");
    add_rows({shape, kRandom, true}, "_codes/random");
  }
}

[[maybe_unused]] const bool kRegistered = [] {
  benchmark::AddCustomContext("simd_target", cpu::simd_target());
  benchmark::AddCustomContext("threads", std::to_string(num_threads()));
  add_ceilings();
  add_operations();
  add_layers();
  add_decode();
  return true;
}();

}  // namespace
}  // namespace msa::bench
