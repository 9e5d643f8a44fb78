// SPDX-License-Identifier: Apache-2.0
//
// The GPU benchmark cases: M3 shape (64 query and 4 KV heads of 128, blocks of 128, top 16), one
// sequence in pages of random order.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "bench/cuda/generate.hpp"

namespace msa::bench {

/// An operation or a chain of them, planned, with its inputs in GPU memory.
struct PreparedCase {
  std::function<void(cudaStream_t)> enqueue;
  int repeats = 1;             ///< times that enqueue() does the work which the rest describes
  std::string implementation;  ///< "cuda_sm90", or two joined by " + "
  double flops = 0.0;          ///< necessary work, docs/benchmarking.md
  double e4m3_flops = 0.0;     ///< those of `flops` whose operands are e4m3
  double bytes = 0.0;
  std::size_t extra_bytes = 0;  ///< workspaces, and ids that pass from indexer to attention
  SelectionFacts selection{};   ///< of the ids that attention reads; the chain's after a run
  std::function<SelectionFacts()> selection_after_run{};
};

struct BenchCase {
  std::string name;         ///< "attention.128k.real"
  std::int64_t num_tokens;  ///< of context
  std::function<PreparedCase(const Options&)> prepare;
};

std::vector<BenchCase> gpu_cases();

}  // namespace msa::bench
