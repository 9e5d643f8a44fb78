// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>

namespace msa::model {

/// Seconds spent by parts of the model.
struct PhaseTimes {
  double indexer = 0.0;    ///< block scores; not the projections to index_q and index_k
  double selection = 0.0;  ///< top-k blocks
  double attention = 0.0;  ///< softmax attention, sparse and dense layers
  double total = 0.0;
  std::int64_t tokens = 0;

  double rest() const { return total - indexer - selection - attention; }
};

struct Timings {
  PhaseTimes prefill;
  PhaseTimes decode;
};

/// Adds its own lifetime in seconds to `total`.
class Stopwatch {
 public:
  explicit Stopwatch(double& total) : total_(total) {}
  ~Stopwatch() {
    total_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& total_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace msa::model
