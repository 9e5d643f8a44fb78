// SPDX-License-Identifier: Apache-2.0
#include "tests/support/device.hpp"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "cuda/common/check.hpp"

namespace msa::testing {
namespace {

constexpr std::chrono::seconds kLongestWait{60};

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

}  // namespace

std::string why_no_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return "";
  return core::concat("no CUDA device: ",
                      status == cudaSuccess ? "the driver shows none" : cudaGetErrorString(status));
}

DeviceBuffer::DeviceBuffer(std::size_t size) : size_(size) {
  void* data = nullptr;
  MSA_CUDA_CHECK(cudaMalloc(&data, size));
  data_.reset(static_cast<std::byte*>(data));
}

void DeviceBuffer::Free::operator()(std::byte* data) const { cudaFree(data); }

void DeviceBuffer::fill(std::byte value) const {
  MSA_CUDA_CHECK(cudaMemset(data(), static_cast<int>(value), size()));
  // Streams that wait for no other may begin before the fill has ended.
  MSA_CUDA_CHECK(cudaDeviceSynchronize());
}

void DeviceBuffer::upload(std::span<const std::byte> host) const {
  MSA_CHECK(host.size() == size(), "upload of ", host.size(), " bytes to ", size());
  MSA_CUDA_CHECK(cudaMemcpy(data(), host.data(), size(), cudaMemcpyHostToDevice));
  MSA_CUDA_CHECK(cudaDeviceSynchronize());
}

void DeviceBuffer::download(std::span<std::byte> host) const {
  MSA_CHECK(host.size() == size(), "download of ", size(), " bytes to ", host.size());
  MSA_CUDA_CHECK(cudaMemcpy(host.data(), data(), size(), cudaMemcpyDeviceToHost));
}

DeviceStream::DeviceStream() {
  cudaStream_t stream = nullptr;
  MSA_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  handle_.reset(stream);
}

void DeviceStream::Destroy::operator()(void* handle) const {
  cudaStreamDestroy(static_cast<cudaStream_t>(handle));
}

void DeviceStream::wait() const {
  MSA_CUDA_CHECK(cudaGetLastError());
  const auto begin = std::chrono::steady_clock::now();
  for (;;) {
    const cudaError_t kernels = cudaStreamQuery(native(stream()));
    if (kernels != cudaErrorNotReady) {
      MSA_CUDA_CHECK(kernels);
      return;
    }
    const auto waited = std::chrono::steady_clock::now() - begin;
    if (waited > kLongestWait) {
      std::fprintf(stderr, "a kernel hangs: no end after 60 s\n");
      std::fflush(nullptr);
      std::_Exit(3);
    }
    if (waited > std::chrono::milliseconds(2)) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }
}

void DeviceStream::run_as_graph(const std::function<void(Stream)>& work) const {
  const cudaStream_t stream = native(this->stream());
  MSA_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    work(this->stream());
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    throw;
  }
  MSA_CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable = nullptr;
  MSA_CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  MSA_CUDA_CHECK(cudaGraphLaunch(executable, stream));
  wait();
  MSA_CUDA_CHECK(cudaGraphExecDestroy(executable));
  MSA_CUDA_CHECK(cudaGraphDestroy(graph));
}

}  // namespace msa::testing
