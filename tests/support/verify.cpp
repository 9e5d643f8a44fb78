// SPDX-License-Identifier: Apache-2.0
#include "tests/support/verify.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include "core/check.hpp"
#include "msa/error.hpp"
#include "reference/reference.hpp"
#include "tests/support/device.hpp"
#include "tests/support/gradient_bounds.hpp"
#include "tests/support/judge.hpp"
#include "tests/support/sample.hpp"

namespace msa::testing {
namespace {

constexpr std::byte kUnwritten{0xff};  // NaN in every float format

/// A plan on host tensors or, through copies in its memory, on a GPU.
template <class Args>
class Runner {
 public:
  Runner(Inputs& inputs, const char* backend, Args args, const Outputs& outputs)
      : on_device_(runs_on_device(backend)), args_(args), host_inputs_(inputs.buffers()) {
    // args_ is ours to change.
    const auto for_each_view = [&](const auto& change) {
      core::for_each_tensor(args_, [&](const char*, const TensorView& view, core::Use) {
        if (view.given()) change(const_cast<TensorView&>(view));
      });
    };
    if (on_device_) {
      for_each_view([](TensorView& view) { view.device = {DeviceType::cuda, 0}; });
    }
    plan_ = msa::plan(args_, {.backend = backend});
    const std::size_t size = plan_.workspace_bytes() + kGuardBytes;
    if (on_device_) {
      device_outputs_ = outputs.buffers();
      std::vector<std::span<std::byte>> buffers = host_inputs_;
      buffers.insert(buffers.end(), device_outputs_.begin(), device_outputs_.end());
      for_each_view([&](TensorView& view) { view = mirror_.at(view, buffers); });
      stream_.emplace();
      device_workspace_.emplace(size);
    }
    workspace_ = core::HostBuffer(size);
  }

  /// Runs into the given host outputs, which `args` names; "" or what was broken.
  std::string run(const Args& args, const Outputs& outputs, bool as_graph) {
    std::memset(workspace_.data(), static_cast<int>(kUnwritten), workspace_.size());
    if (on_device_) {
      run_on_device(outputs, as_graph);
    } else {
      plan_.run(args, workspace_.span().first(plan_.workspace_bytes()));
    }
    for (const std::byte guard : workspace_.span().subspan(plan_.workspace_bytes())) {
      if (guard != kUnwritten) return "wrote behind its workspace";
    }
    return "";
  }

  /// "" or which input differs in the GPU's memory from what was copied there.
  std::string changed() const {
    for (const std::span<std::byte> host : host_inputs_) {
      const DeviceBuffer* device = on_device_ ? mirror_.find(host) : nullptr;
      if (device == nullptr) continue;
      const core::HostBuffer copy(host.size());
      device->download(copy.span());
      const auto differs =
          std::mismatch(host.begin(), host.end(), copy.data()).first - host.begin();
      if (static_cast<std::size_t>(differs) != host.size()) {
        return core::concat("an input of ", host.size(), " bytes was changed at byte ", differs);
      }
    }
    return "";
  }

 private:
  // Whole pages, so that a tile too many is seen.
  static constexpr std::size_t kGuardBytes = 4096;

  void run_on_device(const Outputs& outputs, bool as_graph) {
    const std::vector<std::span<std::byte>> host = outputs.buffers();
    for (std::size_t i = 0; i < host.size(); ++i) mirror_.find(device_outputs_[i])->upload(host[i]);
    device_workspace_->upload(workspace_.span());
    const auto enqueue = [&](Stream stream) {
      plan_.run(args_, device_workspace_->span().first(plan_.workspace_bytes()), stream);
    };
    if (as_graph) {
      stream_->run_as_graph(enqueue);
    } else {
      enqueue(stream_->stream());
      stream_->wait();
    }
    device_workspace_->download(workspace_.span());
    for (std::size_t i = 0; i < host.size(); ++i) {
      mirror_.find(device_outputs_[i])->download(host[i]);
    }
  }

  bool on_device_;
  Args args_;
  std::vector<std::span<std::byte>> host_inputs_;
  std::vector<std::span<std::byte>> device_outputs_;  ///< the host buffers that were mirrored
  DeviceMirror mirror_;
  std::optional<DeviceStream> stream_;
  std::optional<DeviceBuffer> device_workspace_;
  core::HostBuffer workspace_;
  Plan<Args> plan_;
};

/// All runs of a backend, the first into `outputs`; "" or what was broken.
template <class Args>
std::string run_all(Inputs& inputs, const char* backend, const Args& args, const Outputs& outputs,
                    const Effort& effort) {
  Runner<Args> runner(inputs, backend, args, outputs);
  std::string broken = runner.run(args, outputs, /*as_graph=*/false);
  const int num_repeats = effort.num_runs - 1 + (effort.graph ? 1 : 0);
  for (int i = 0; i < num_repeats && broken.empty(); ++i) {
    auto repeated = inputs.args<Args>();
    const Outputs repeated_outputs(inputs, repeated);
    const bool as_graph = effort.graph && i == num_repeats - 1;
    broken = runner.run(repeated, repeated_outputs, as_graph);
    if (!broken.empty()) break;
    const std::string difference = outputs.difference(repeated_outputs);
    if (difference.empty()) continue;
    broken = core::concat(as_graph ? "a graph replay differs from a run: " : "two runs differ: ",
                          difference);
  }
  return broken.empty() ? runner.changed() : broken;
}

void take(Outcome& outcome, const Verdict& verdict) {
  outcome.max_error = std::max(outcome.max_error, verdict.max_error);
  outcome.max_ratio = std::max(outcome.max_ratio, verdict.max_ratio);
  if (outcome.detail.empty()) outcome.detail = verdict.failure;
}

void judge(Inputs& inputs, const SelectTopK&, Outcome& outcome, const Outputs& actual) {
  auto exact = inputs.args<SelectTopK>();
  const Outputs outputs(inputs, exact);
  reference::select_top_k(exact);
  outcome.detail = actual.difference(outputs);
}

void judge(Inputs& inputs, const AppendKv&, Outcome& outcome, const Outputs& actual) {
  auto exact = inputs.args<AppendKv>();
  const Outputs outputs(inputs, exact);
  reference::append_kv(exact);
  outcome.detail = actual.difference(outputs);
}

/// Bit by bit, but for the payloads of NaN, which the contract leaves open.
void judge(Inputs& inputs, const NormRopeAppendKv&, Outcome& outcome, Outputs& actual) {
  auto exact = inputs.args<NormRopeAppendKv>();
  Outputs outputs(inputs, exact);
  msa::plan(exact, {.backend = "reference"}).run(exact);
  if (inputs.spec.values == Values::nans || inputs.spec.values == Values::infinities) {
    outputs.unify_nans();
    actual.unify_nans();
  }
  outcome.detail = actual.difference(outputs);
}

void take(Outcome& outcome, const char* name, const TensorView& actual, const TensorView& expected,
          const std::vector<double>& bound) {
  const Comparison comparison = compare(name, actual, expected, bound, 0.0);
  take(outcome, {comparison.failure, comparison.max_error, comparison.max_ratio});
}

void judge(Inputs& inputs, const SparseAttentionBackward& args, const char* backend,
           Outcome& outcome) {
  auto exact = inputs.args<SparseAttentionBackward>();
  const Outputs outputs(inputs, exact, /*wide=*/true);
  reference::sparse_attention_backward(exact);
  const AttentionGradientBounds bounds =
      gradient_bounds(args, arithmetic_of(backend, inputs.spec.dtype));
  take(outcome, "dq", args.dq, exact.dq, bounds.dq);
  take(outcome, "dk", args.dk, exact.dk, bounds.dk);
  take(outcome, "dv", args.dv, exact.dv, bounds.dv);
}

void judge(Inputs& inputs, const IndexerKlBackward& args, const char* backend, Outcome& outcome) {
  auto exact = inputs.args<IndexerKlBackward>();
  const Outputs outputs(inputs, exact, /*wide=*/true);
  reference::indexer_kl_backward(exact);
  const IndexGradientBounds bounds =
      gradient_bounds(args, arithmetic_of(backend, inputs.spec.dtype));
  take(outcome, "loss", args.loss, exact.loss, bounds.loss);
  take(outcome, "dindex_q", args.dindex_q, exact.dindex_q, bounds.dindex_q);
  take(outcome, "dindex_k", args.dindex_k, exact.dindex_k, bounds.dindex_k);
}

/// By the reference: all rows, or a sample of them and the rest by the CPU backend.
template <class Args>
void judge_values(Inputs& inputs, const Args& args, const char* backend, const Effort& effort,
                  Outcome& outcome) {
  const Case& spec = inputs.spec;
  const bool fp8 = spec.fp8 != Fp8::none;
  Arithmetic arithmetic = arithmetic_of(backend, spec.dtype);
  if constexpr (requires { args.index_k; }) {
    arithmetic = index_arithmetic_of(backend, spec.dtype, args.index_k.dtype);
  }
  if (effort.max_rows == 0 || inputs.total_q <= effort.max_rows) {
    take(outcome, judge_by_reference(spec, args, arithmetic, inputs.num_blocks));
    return;
  }
  if (!fp8) take(outcome, judge_by_cpu(spec, args, arithmetic, inputs.num_blocks));
  // A row of dense attention costs the reference several times as much.
  const bool dense = std::is_same_v<Args, DenseAttentionForward>;
  const std::int64_t num_rows =
      dense ? std::min<std::int64_t>(effort.max_rows, 4) : effort.max_rows;
  const Sample<Args> sample(args, spread_rows(inputs.total_q, num_rows));
  take(outcome, judge_by_reference(spec, sample.args(), arithmetic, inputs.num_blocks));
}

}  // namespace

const char* name_of(Outcome::Status status) {
  switch (status) {
    case Outcome::Status::passed:
      return "passed";
    case Outcome::Status::failed:
      return "failed";
    case Outcome::Status::declined:
      return "declined";
    case Outcome::Status::not_applicable:
      return "not applicable";
  }
  return "?";
}

template <class Args>
Outcome verify(Inputs& inputs, const char* backend, const Effort& effort) {
  using Status = Outcome::Status;
  if (!inputs.supports<Args>()) {
    return {.status = Status::not_applicable, .detail = "not defined for this case"};
  }
  if (runs_on_device(backend)) {
    const std::string reason = why_no_device();
    if (!reason.empty()) return {.status = Status::declined, .detail = reason};
  }
  auto args = inputs.args<Args>();
  Outputs outputs(inputs, args);
  Outcome outcome;
  try {
    outcome.detail = run_all(inputs, backend, args, outputs, effort);
  } catch (const Error& error) {
    const bool declined = error.code() == ErrorCode::unsupported;
    return {.status = declined ? Status::declined : Status::failed, .detail = error.what()};
  }
  if (outcome.detail.empty()) outcome.detail = outputs.damaged();
  if (outcome.detail.empty()) outcome.detail = inputs.changed();
  if (outcome.detail.empty()) {
    if constexpr (requires { judge(inputs, args, outcome, outputs); }) {
      judge(inputs, args, outcome, outputs);
    } else if constexpr (requires { judge(inputs, args, backend, outcome); }) {
      judge(inputs, args, backend, outcome);
    } else if constexpr (std::is_same_v<Args, IndexedAttentionForward>) {
      // The selection, and the attention on whatever was selected.
      judge_values(inputs, core::indexer_of(args), backend, effort, outcome);
      judge_values(inputs, core::attention_of(args), backend, effort, outcome);
    } else {
      judge_values(inputs, args, backend, effort, outcome);
    }
  }
  if (!outcome.detail.empty()) outcome.status = Status::failed;
  return outcome;
}

// NOLINTBEGIN(bugprone-macro-parentheses): the argument is a type
#define MSA_INSTANTIATE(Args) template Outcome verify<Args>(Inputs&, const char*, const Effort&);
// NOLINTEND(bugprone-macro-parentheses)
MSA_FOR_EACH_OPERATION(MSA_INSTANTIATE)
#undef MSA_INSTANTIATE

}  // namespace msa::testing
