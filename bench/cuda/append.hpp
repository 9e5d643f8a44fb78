// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "bench/cuda/cases.hpp"

namespace msa::bench {

/// NormRopeAppendKv of one new token per request, into bf16 caches with int8 codes of the index
/// keys and into e4m3 ones; and AppendKv of the same rows. Layers take turns in one graph as in
/// decode_cases().
std::vector<BenchCase> append_cases();

}  // namespace msa::bench
