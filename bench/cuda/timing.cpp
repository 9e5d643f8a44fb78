// SPDX-License-Identifier: Apache-2.0
#include "bench/cuda/timing.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bench/cuda/memory.hpp"

namespace msa::bench {
namespace {

constexpr std::size_t kFlushBytes = std::size_t{256} << 20;
constexpr int kMaxRuns = 200;

double median(std::vector<double> values) {
  const auto middle = values.begin() + std::ssize(values) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// What a timing holds, destroyed with it.
struct Handles {
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;

  Handles() {
    MSA_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    MSA_CUDA_CHECK(cudaEventCreate(&begin));
    MSA_CUDA_CHECK(cudaEventCreate(&end));
  }
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
  ~Handles() {
    if (replay != nullptr) cudaGraphExecDestroy(replay);
    if (graph != nullptr) cudaGraphDestroy(graph);
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    cudaStreamDestroy(stream);
  }
};

}  // namespace

Timing time_on_device(const std::function<void(cudaStream_t)>& work, const TimingOptions& options) {
  MSA_CUDA_CHECK(cudaDeviceSynchronize());  // inputs are made on the default stream
  Handles handles;
  MSA_CUDA_CHECK(cudaStreamBeginCapture(handles.stream, cudaStreamCaptureModeThreadLocal));
  work(handles.stream);
  MSA_CUDA_CHECK(cudaStreamEndCapture(handles.stream, &handles.graph));
  MSA_CUDA_CHECK(cudaGraphInstantiate(&handles.replay, handles.graph, 0));
  MSA_CUDA_CHECK(cudaGraphUpload(handles.replay, handles.stream));
  const DeviceMemory flush(kFlushBytes);
  std::vector<double> times;
  double total_ms = 0.0;
  const auto wanted = [&] {
    const int runs = static_cast<int>(times.size()) - options.warm_up;
    return runs < options.min_runs || (total_ms < 1e3 * options.min_seconds && runs < kMaxRuns);
  };
  while (wanted()) {
    MSA_CUDA_CHECK(cudaMemsetAsync(flush.data(), 1, flush.size(), handles.stream));
    MSA_CUDA_CHECK(cudaEventRecord(handles.begin, handles.stream));
    MSA_CUDA_CHECK(cudaGraphLaunch(handles.replay, handles.stream));
    MSA_CUDA_CHECK(cudaEventRecord(handles.end, handles.stream));
    MSA_CUDA_CHECK(cudaStreamSynchronize(handles.stream));
    float ms = 0.0f;
    MSA_CUDA_CHECK(cudaEventElapsedTime(&ms, handles.begin, handles.end));
    times.push_back(static_cast<double>(ms) / options.repeats);
    if (std::ssize(times) > options.warm_up) total_ms += static_cast<double>(ms);
  }
  times.erase(times.begin(), times.begin() + options.warm_up);
  Timing timing;
  timing.num_runs = static_cast<int>(times.size());
  timing.median_ms = median(times);
  timing.min_ms = *std::min_element(times.begin(), times.end());
  timing.max_ms = *std::max_element(times.begin(), times.end());
  for (double& time : times) time = std::fabs(time - timing.median_ms);
  timing.mad_ms = median(times);
  return timing;
}

}  // namespace msa::bench
