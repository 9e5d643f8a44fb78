// SPDX-License-Identifier: Apache-2.0
//
// GPU memory and streams for tests. Without MSA_CUDA there is no device, and nothing here works.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "msa/ops.hpp"

namespace msa::testing {

/// True for the names of GPU backends.
bool runs_on_device(const std::string& backend);

/// "" or why no GPU can be used.
std::string why_no_device();

/// Memory of cuda:0.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t size);

  std::byte* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  std::span<std::byte> span() const { return {data_.get(), size_}; }
  void fill(std::byte value) const;
  void upload(std::span<const std::byte> host) const;
  void download(std::span<std::byte> host) const;

 private:
  struct Free {
    void operator()(std::byte* data) const;
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

/// A stream of its own, which waits for no other.
class DeviceStream {
 public:
  DeviceStream();

  Stream stream() const { return {handle_.get()}; }
  /// Throws Error(cuda) with what went wrong. A kernel that runs longer than a minute ends the
  /// process: nothing else can be done with the device.
  void wait() const;
  /// Captures what `work` puts on the stream as a graph, and runs that once.
  void run_as_graph(const std::function<void(Stream)>& work) const;

 private:
  struct Destroy {
    void operator()(void* handle) const;
  };
  std::unique_ptr<void, Destroy> handle_;
};

/// Copies of host buffers in GPU memory, byte by byte.
class DeviceMirror {
 public:
  /// `view` of one of the host buffers, as a view of its copy; the first view of a buffer makes
  /// the copy. A view that is not given stays so.
  TensorView at(TensorView view, const std::vector<std::span<std::byte>>& host_buffers);
  /// The copy of a host buffer; null where no view asked for one.
  const DeviceBuffer* find(std::span<const std::byte> host) const;

 private:
  struct Pair {
    std::span<std::byte> host;
    DeviceBuffer device;
  };
  std::deque<Pair> pairs_;
};

}  // namespace msa::testing
