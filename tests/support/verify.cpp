// SPDX-License-Identifier: Apache-2.0
#include "tests/support/verify.hpp"

#include <algorithm>
#include <cstring>

#include "msa/error.hpp"
#include "reference/reference.hpp"
#include "tests/support/bounds.hpp"

namespace msa::testing {
namespace {

/// Runs a plan in a workspace full of NaN that ends in a guard band; "" or what it broke.
template <class Args>
std::string run_guarded(const Plan<Args>& plan, const Args& args) {
  constexpr std::size_t kGuardBytes = 64;
  const core::HostBuffer memory(plan.workspace_bytes() + kGuardBytes);
  std::memset(memory.data(), 0xff, memory.size());
  plan.run(args, memory.span().first(plan.workspace_bytes()));
  for (const std::byte guard : memory.span().subspan(plan.workspace_bytes())) {
    if (guard != std::byte{0xff}) return "wrote behind its workspace";
  }
  return "";
}

void take(Outcome& outcome, const Comparison& comparison) {
  outcome.max_error = std::max(outcome.max_error, comparison.max_error);
  outcome.max_ratio = std::max(outcome.max_ratio, comparison.max_ratio);
  if (outcome.detail.empty()) outcome.detail = comparison.failure;
}

void judge(Inputs& inputs, const IndexerScores& args, Outcome& outcome) {
  auto exact = inputs.args<IndexerScores>();
  const Outputs outputs(inputs, exact, /*wide=*/true);
  reference::indexer_scores(exact);
  take(outcome,
       compare("block_scores", args.block_scores, exact.block_scores, score_bounds(args), 0.0));
}

void judge(Inputs& inputs, const SelectTopK&, Outcome& outcome, const Outputs& actual) {
  auto exact = inputs.args<SelectTopK>();
  const Outputs outputs(inputs, exact);
  reference::select_top_k(exact);
  outcome.detail = actual.difference(outputs);
}

void judge(Inputs& inputs, const Indexer& args, Outcome& outcome) {
  auto exact = inputs.args<IndexerScores>();
  const Outputs outputs(inputs, exact, /*wide=*/true);
  reference::indexer_scores(exact);
  std::vector<double> band = score_bounds(args, inputs.num_blocks);
  // Sums of small integers and zeros are exact in f32, so the ids are known exactly.
  const bool exact_scores =
      inputs.spec.values == Values::ties || inputs.spec.values == Values::zeros;
  if (exact_scores) std::fill(band.begin(), band.end(), 0.0);
  outcome.detail = check_selection(args, values_of(exact.block_scores), band, inputs.num_blocks);
}

/// Probabilities that a kernel rounds to f16 or bf16 before they multiply V are part of its budget:
/// for bf16 the emulation's distance from the exact result, twice (house rule). f32 and f16 kernels
/// keep them in f32, which the bounds cover.
template <class Args, class Run>
void judge_attention(Inputs& inputs, const Args& args, Outcome& outcome, Run run) {
  auto exact = inputs.args<Args>();
  const Outputs exact_outputs(inputs, exact, /*wide=*/true);
  run(exact, reference::Rounding::exact);
  double allowance = 0.0;
  if (inputs.spec.dtype == DType::bf16) {
    auto emulated = inputs.args<Args>();
    const Outputs emulated_outputs(inputs, emulated);
    run(emulated, reference::Rounding::bf16);
    allowance = 2.0 * max_difference(emulated.out, exact.out);
  }
  const AttentionBounds bounds = attention_bounds(args);
  take(outcome, compare("out", args.out, exact.out, bounds.out, allowance));
  take(outcome, compare("lse", args.lse, exact.lse, bounds.lse, 0.0));
}

void judge(Inputs& inputs, const SparseAttentionForward& args, Outcome& outcome) {
  judge_attention(inputs, args, outcome, reference::sparse_attention_forward);
}

void judge(Inputs& inputs, const DenseAttentionForward& args, Outcome& outcome) {
  judge_attention(inputs, args, outcome, reference::dense_attention_forward);
}

void judge(Inputs& inputs, const AppendKv&, Outcome& outcome, const Outputs& actual) {
  auto exact = inputs.args<AppendKv>();
  const Outputs outputs(inputs, exact);
  reference::append_kv(exact);
  outcome.detail = actual.difference(outputs);
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
Outcome verify(Inputs& inputs, const char* backend) {
  if (!inputs.supports<Args>()) {
    return {.status = Outcome::Status::not_applicable, .detail = "not defined for this case"};
  }
  auto args = inputs.args<Args>();
  const Outputs outputs(inputs, args);
  Outcome outcome;
  try {
    const Plan<Args> plan = msa::plan(args, {.backend = backend});
    outcome.detail = run_guarded(plan, args);
    auto repeated = inputs.args<Args>();
    const Outputs repeated_outputs(inputs, repeated);
    if (outcome.detail.empty()) outcome.detail = run_guarded(plan, repeated);
    if (outcome.detail.empty()) {
      const std::string difference = outputs.difference(repeated_outputs);
      if (!difference.empty()) outcome.detail = "two runs differ: " + difference;
    }
  } catch (const Error& error) {
    const bool declined = error.code() == ErrorCode::unsupported;
    return {.status = declined ? Outcome::Status::declined : Outcome::Status::failed,
            .detail = error.what()};
  }
  if (outcome.detail.empty()) outcome.detail = outputs.damaged();
  if (outcome.detail.empty()) outcome.detail = inputs.changed();
  if (outcome.detail.empty()) {
    if constexpr (requires { judge(inputs, args, outcome, outputs); }) {
      judge(inputs, args, outcome, outputs);
    } else {
      judge(inputs, args, outcome);
    }
  }
  if (!outcome.detail.empty()) outcome.status = Outcome::Status::failed;
  return outcome;
}

template Outcome verify<IndexerScores>(Inputs&, const char*);
template Outcome verify<SelectTopK>(Inputs&, const char*);
template Outcome verify<Indexer>(Inputs&, const char*);
template Outcome verify<SparseAttentionForward>(Inputs&, const char*);
template Outcome verify<DenseAttentionForward>(Inputs&, const char*);
template Outcome verify<AppendKv>(Inputs&, const char*);

}  // namespace msa::testing
