// SPDX-License-Identifier: Apache-2.0
//
// Some queries of a request as a request of their own, so that the reference can judge a few rows
// of one that is too large for it.
#pragma once

#include <deque>
#include <vector>

#include "core/operation.hpp"
#include "core/tensor.hpp"

namespace msa::testing {

/// Each query `rows[i]` of `args` becomes a sequence of one query that sees the keys up to its
/// position. Keys are those of `args`; ragged ones are seen as pages that begin at any token.
/// Outputs that `args` has hold copies of their rows. For IndexerScores, Indexer and the attention
/// forward operations on host tensors.
template <class Args>
class Sample {
 public:
  Sample(const Args& args, const std::vector<std::int64_t>& rows);
  const Args& args() const { return args_; }

 private:
  TensorView keep(core::Tensor tensor) { return kept_.emplace_back(std::move(tensor)); }

  Args args_;
  std::deque<core::Tensor> kept_;
};

/// About `count` of `total` rows: the first, the last, and others at irregular distances.
std::vector<std::int64_t> spread_rows(std::int64_t total, std::int64_t count);

}  // namespace msa::testing
