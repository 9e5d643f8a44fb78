// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "bench/cuda/cases.hpp"

namespace msa::bench {

/// A layer's attention in training, one ragged sequence with real-like selections: forward,
/// backward and KL loss with its gradients, each alone and together. Rows named `default` let a
/// backend use sums whose order is left to chance.
std::vector<BenchCase> backward_cases();

}  // namespace msa::bench
