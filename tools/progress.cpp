// SPDX-License-Identifier: Apache-2.0
#include "tools/progress.hpp"

#include <unistd.h>

#include <cstdio>
#include <utility>

namespace msa::tools {

Progress::Progress(std::string label, bool quiet)
    : label_(std::move(label)),
      quiet_(quiet),
      terminal_(isatty(STDERR_FILENO) == 1),
      last_print_(Clock::now()),
      last_time_(last_print_) {}

Progress::~Progress() {
  if (drawn_ && terminal_) std::fprintf(stderr, "\r\033[K");
}

void Progress::update(std::int64_t done, std::int64_t total) {
  if (quiet_ || total <= 0) return;
  const auto now = Clock::now();
  const double elapsed = std::chrono::duration<double>(now - last_time_).count();
  if (elapsed > 0.0 && done > last_done_) {
    const double rate = static_cast<double>(done - last_done_) / elapsed;
    rate_ = rate_ == 0.0 ? rate : 0.7 * rate_ + 0.3 * rate;
    last_time_ = now;
    last_done_ = done;
  }
  // Ten times a second is smooth to the eye; every five seconds is enough in a log.
  const double pause = terminal_ ? 0.1 : 5.0;
  if (done < total && std::chrono::duration<double>(now - last_print_).count() < pause) return;
  if (!terminal_ && done == total && !drawn_) return;  // short work needs no line in a log
  last_print_ = now;
  const double eta = rate_ > 0.0 ? static_cast<double>(total - done) / rate_ : 0.0;
  constexpr int kWidth = 30;
  char bar[kWidth + 1] = {};
  for (int i = 0; i < kWidth; ++i) bar[i] = i < done * kWidth / total ? '#' : '.';
  std::fprintf(stderr, "%s%s [%s] %lld/%lld tokens, %.0f tokens/s, ETA %.0f s%s",
               terminal_ ? "\r\033[K" : "", label_.c_str(), bar, static_cast<long long>(done),
               static_cast<long long>(total), rate_, eta, terminal_ ? "" : "\n");
  std::fflush(stderr);
  drawn_ = true;
}

}  // namespace msa::tools
