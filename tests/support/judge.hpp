// SPDX-License-Identifier: Apache-2.0
//
// Verdicts on the results of forward operations: by the reference, which knows the truth but is
// slow, and by the CPU backend, which is fast and itself judged by the reference.
#pragma once

#include "tests/support/bounds.hpp"
#include "tests/support/inputs.hpp"

namespace msa::testing {

struct Verdict {
  std::string failure{};   ///< "" where all is well
  double max_error = 0.0;  ///< Largest difference from the reference; 0 for ids.
  double max_ratio = 0.0;  ///< Largest ratio of a difference to what is allowed.
};

/// `args` are host tensors with results. `num_blocks`: columns of block scores.
Verdict judge_by_reference(const Case& spec, const IndexerScores& args,
                           const Arithmetic& arithmetic, std::int64_t num_blocks);
Verdict judge_by_reference(const Case& spec, const Indexer& args, const Arithmetic& arithmetic,
                           std::int64_t num_blocks);
Verdict judge_by_reference(const Case& spec, const SparseAttentionForward& args,
                           const Arithmetic& arithmetic, std::int64_t num_blocks);
Verdict judge_by_reference(const Case& spec, const DenseAttentionForward& args,
                           const Arithmetic& arithmetic, std::int64_t num_blocks);

/// All rows, within the error bounds of both; looser than the reference's, but a block or token too
/// many or too few is far outside. Where the bounds say nothing (scores so large that their error
/// moves a probability by more than a tenth) rows are passed over.
Verdict judge_by_cpu(const Case& spec, const IndexerScores& args, const Arithmetic& arithmetic,
                     std::int64_t num_blocks);
Verdict judge_by_cpu(const Case& spec, const Indexer& args, const Arithmetic& arithmetic,
                     std::int64_t num_blocks);
Verdict judge_by_cpu(const Case& spec, const SparseAttentionForward& args,
                     const Arithmetic& arithmetic, std::int64_t num_blocks);
Verdict judge_by_cpu(const Case& spec, const DenseAttentionForward& args,
                     const Arithmetic& arithmetic, std::int64_t num_blocks);

}  // namespace msa::testing
