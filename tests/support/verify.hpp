// SPDX-License-Identifier: Apache-2.0
//
// Runs an operation of a case on a backend through the public plan() and run(), and judges the
// result by the reference. The tests of every backend and `msa verify` are loops over this.
#pragma once

#include <string>

#include "tests/support/inputs.hpp"

namespace msa::testing {

struct Outcome {
  enum class Status {
    passed,
    failed,
    declined,        ///< The backend does not take the request; detail says why.
    not_applicable,  ///< The operation is not defined for the case (pages, gradients).
  };
  Status status = Status::passed;
  std::string detail{};    ///< Why it failed or was declined.
  double max_error = 0.0;  ///< Largest difference from the reference; 0 for ids and copies.
  double max_ratio = 0.0;  ///< Largest ratio of a difference to what is allowed.

  bool ok() const { return status != Status::failed; }
};

/// "passed", "failed", "declined", "not applicable"
const char* name_of(Outcome::Status status);

/// How much verify() runs and judges.
struct Effort {
  int num_runs = 2;    ///< All bitwise equal.
  bool graph = false;  ///< One replay of a CUDA graph, bitwise equal to the runs; GPU backends.
  /// Query rows that the reference judges, spread over all; the CPU backend judges the others, more
  /// loosely (not e4m3, which it does not take). 0: the reference judges every row.
  std::int64_t max_rows = 0;
};

/// Checks runs of Args: values, guard bands of outputs and workspace, inputs untouched, all runs
/// bitwise equal. `backend` is a name as in Options; one of a GPU gets copies of all tensors, gaps
/// and guard bands included, in its memory.
template <class Args>
Outcome verify(Inputs& inputs, const char* backend, const Effort& effort = {});

/// Calls visit(operation name, Outcome) for every operation that verify() is defined for.
template <class Visit>
void verify_all(Inputs& inputs, const char* backend, Visit visit, const Effort& effort = {}) {
  visit("IndexerScores", verify<IndexerScores>(inputs, backend, effort));
  visit("SelectTopK", verify<SelectTopK>(inputs, backend, effort));
  visit("Indexer", verify<Indexer>(inputs, backend, effort));
  visit("SparseAttentionForward", verify<SparseAttentionForward>(inputs, backend, effort));
  visit("IndexedAttentionForward", verify<IndexedAttentionForward>(inputs, backend, effort));
  visit("DenseAttentionForward", verify<DenseAttentionForward>(inputs, backend, effort));
  // Gradients on the selected blocks, then on the dense support of the warm-up stage.
  for (const bool warm_up : {false, true}) {
    inputs.warm_up = warm_up;
    visit("SparseAttentionBackward", verify<SparseAttentionBackward>(inputs, backend, effort));
    visit("IndexerKlBackward", verify<IndexerKlBackward>(inputs, backend, effort));
  }
  inputs.warm_up = false;
  visit("AppendKv", verify<AppendKv>(inputs, backend, effort));
  visit("NormRopeAppendKv", verify<NormRopeAppendKv>(inputs, backend, effort));
}

}  // namespace msa::testing
