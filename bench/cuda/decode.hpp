// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "bench/cuda/cases.hpp"

namespace msa::bench {

/// Decode steps: indexer with its selection, then attention on what it chose, for a batch of
/// equally long sequences; and attention alone. One graph has the step of several caches in turn,
/// as the layers of a model are, so that each finds the L2 cache full of others.
std::vector<BenchCase> decode_cases();

}  // namespace msa::bench
