// SPDX-License-Identifier: Apache-2.0
//
// Memory owned by tests, tools and the model runtime; the library itself owns none.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <span>

#include "msa/tensor.hpp"

namespace msa::core {

/// Zeroed host memory aligned for any vector width, freed with the object. Large buffers ask for
/// huge pages: blocks lie anywhere in a cache, and with 4 KiB pages decoding waits for address
/// translation (docs/kernels/cpu.md).
class HostBuffer {
 public:
  HostBuffer() = default;
  explicit HostBuffer(std::size_t bytes) : bytes_(bytes) {
    const std::size_t rounded = std::max<std::size_t>((bytes + 63) / 64 * 64, 64);
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(64, rounded)));
    if (data_ == nullptr) throw std::bad_alloc();
    ask_for_huge_pages(data_.get(), rounded);
    std::memset(data_.get(), 0, rounded);
  }

  std::byte* data() const { return data_.get(); }
  std::size_t size() const { return bytes_; }
  std::span<std::byte> span() const { return {data_.get(), bytes_}; }

 private:
  /// A hint for the whole huge pages of a range.
  static void ask_for_huge_pages([[maybe_unused]] std::byte* data,
                                 [[maybe_unused]] std::size_t size) {
#if defined(__linux__)
    constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
    const auto address = reinterpret_cast<std::uintptr_t>(data);
    const std::uintptr_t skipped = (kHugePage - address % kHugePage) % kHugePage;
    if (size < skipped + kHugePage) return;
    madvise(data + skipped, (size - skipped) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }

  struct Free {
    void operator()(std::byte* data) const { std::free(data); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t bytes_ = 0;
};

/// A contiguous, zeroed host tensor.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::initializer_list<std::int64_t> shape)
      : view_(TensorView::contiguous(nullptr, dtype, {}, shape)),
        buffer_(size_of(dtype) * static_cast<std::size_t>(view_.num_elements())) {
    view_.data = buffer_.data();
  }

  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }

  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(buffer_.data());
  }
  template <class T>
  std::span<T> span() const {
    return {data<T>(), static_cast<std::size_t>(view_.num_elements())};
  }

 private:
  TensorView view_{};
  HostBuffer buffer_;
};

}  // namespace msa::core
