// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <initializer_list>
#include <memory>

#include "cuda/common/check.hpp"
#include "msa/tensor.hpp"

namespace msa::bench {

/// Memory of the current device.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(std::size_t size) : size_(size) {
    void* data = nullptr;
    if (size != 0) MSA_CUDA_CHECK(cudaMalloc(&data, size));
    data_.reset(static_cast<std::byte*>(data));
  }
  std::byte* data() const { return data_.get(); }
  std::size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(std::byte* data) const { cudaFree(data); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

/// A contiguous tensor on cuda:0, not initialised.
class DeviceTensor {
 public:
  DeviceTensor() = default;
  DeviceTensor(DType dtype, std::initializer_list<std::int64_t> shape)
      : view_(TensorView::contiguous(nullptr, dtype, {DeviceType::cuda, 0}, shape)),
        memory_(size_of(dtype) * static_cast<std::size_t>(view_.num_elements())) {
    view_.data = memory_.data();
  }
  const TensorView& view() const { return view_; }
  std::size_t size() const { return memory_.size(); }
  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(memory_.data());
  }

 private:
  TensorView view_{};
  DeviceMemory memory_;
};

}  // namespace msa::bench
