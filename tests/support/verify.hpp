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

/// Checks one run of Args: values, guard bands of outputs and workspace, inputs untouched, a second
/// run bitwise equal. `backend` is a name as in Options. Defined for the forward operations and
/// AppendKv.
template <class Args>
Outcome verify(Inputs& inputs, const char* backend);

/// Calls visit(operation name, Outcome) for every operation that verify() is defined for.
template <class Visit>
void verify_all(Inputs& inputs, const char* backend, Visit visit) {
  visit("IndexerScores", verify<IndexerScores>(inputs, backend));
  visit("SelectTopK", verify<SelectTopK>(inputs, backend));
  visit("Indexer", verify<Indexer>(inputs, backend));
  visit("SparseAttentionForward", verify<SparseAttentionForward>(inputs, backend));
  visit("DenseAttentionForward", verify<DenseAttentionForward>(inputs, backend));
  visit("AppendKv", verify<AppendKv>(inputs, backend));
}

}  // namespace msa::testing
