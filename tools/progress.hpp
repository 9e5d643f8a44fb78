// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace msa::tools {

/// A progress line on stderr: redrawn in place on a terminal, else a plain line every few seconds.
class Progress {
 public:
  explicit Progress(std::string label, bool quiet);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// `done` of `total` tokens; the rate is that of the last few updates, since later tokens cost
  /// more.
  void update(std::int64_t done, std::int64_t total);

 private:
  using Clock = std::chrono::steady_clock;

  std::string label_;
  bool quiet_ = false;
  bool terminal_ = false;
  bool drawn_ = false;
  Clock::time_point last_print_;
  Clock::time_point last_time_;
  std::int64_t last_done_ = 0;
  double rate_ = 0.0;  ///< tokens/s, smoothed
};

}  // namespace msa::tools
