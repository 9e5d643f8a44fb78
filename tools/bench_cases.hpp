// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "msa/ops.hpp"

namespace msa::tools {

/// A planned operation with its inputs, ready to be timed.
struct PreparedBench {
  std::function<void()> run;
  const char* implementation = nullptr;
  double flops = 0.0;     ///< that any algorithm must spend: 2 per multiply-add of visible pairs
  double bytes = 0.0;     ///< that any algorithm must move: each input and output once
  double overlap4 = 0.0;  ///< of the selection, see bench/selection.hpp; 0: has none
};

struct BenchCase {
  const char* operation;
  std::string name;
  std::function<PreparedBench(const Options&)> prepare;
};

std::vector<BenchCase> bench_cases();

}  // namespace msa::tools
