// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

namespace msa::core {

/// Hands out pieces of a workspace. Built without memory it only counts, so the function that lays
/// out a workspace also tells its size, and the two cannot disagree.
class WorkspaceLayout {
 public:
  static constexpr std::size_t kAlignment = 64;  // a cache line; also the widest CPU vector

  explicit WorkspaceLayout(std::byte* base = nullptr) : base_(base) {}

  /// `count` elements, null while counting.
  template <class T>
  T* take(std::int64_t count) {
    const std::size_t begin = bytes_;
    const std::size_t size = sizeof(T) * static_cast<std::size_t>(count);
    bytes_ += (size + kAlignment - 1) / kAlignment * kAlignment;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + begin);
  }

  std::size_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  std::size_t bytes_ = 0;
};

}  // namespace msa::core
