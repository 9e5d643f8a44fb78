// SPDX-License-Identifier: Apache-2.0
//
// For .cu tests: arrays in GPU memory, and launches that wait.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "cuda/common/launch.hpp"
#include "tests/support/device.hpp"

namespace msa::testing {

/// A copy of a vector; values() brings it back.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values)
      : count_(values.size()), buffer_(values.size() * sizeof(T)) {
    buffer_.upload(std::as_bytes(std::span(values)));
  }
  T* data() const { return reinterpret_cast<T*>(buffer_.data()); }
  std::vector<T> values() const {
    std::vector<T> host(count_);
    buffer_.download(std::as_writable_bytes(std::span(host)));
    return host;
  }

 private:
  std::size_t count_;
  DeviceBuffer buffer_;
};

/// Launches on a stream of its own and waits for the end.
template <class... Params, class... Given>
void run_kernel(void (*kernel)(Params...), const cuda::LaunchConfig& config, Given... given) {
  const DeviceStream stream;
  cuda::launch(kernel, config, static_cast<cudaStream_t>(stream.stream().handle), given...);
  stream.wait();
}

}  // namespace msa::testing
