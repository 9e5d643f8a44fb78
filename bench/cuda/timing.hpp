// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

namespace msa::bench {

struct Timing {
  double median_ms = 0.0;
  double mad_ms = 0.0;  ///< median absolute deviation
  double min_ms = 0.0;
  double max_ms = 0.0;
  int num_runs = 0;
};

struct TimingOptions {
  int min_runs = 5;
  double min_seconds = 0.0;  ///< more runs until this much was timed
  int warm_up = 2;
  int repeats = 1;  ///< of the work within one replay; times are those of one
};

/// Captures what `work` puts on the stream as one CUDA graph, and times its replays between events.
/// Before each replay a kernel-free write of 256 MiB empties the L2 cache of everything else; while
/// it runs the replay is queued, so that the host adds nothing.
Timing time_on_device(const std::function<void(cudaStream_t)>& work,
                      const TimingOptions& options = {});

}  // namespace msa::bench
