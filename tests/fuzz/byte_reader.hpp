// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstring>
#include <initializer_list>

#include "tests/fuzz/targets.hpp"

namespace msa::fuzz {

/// Numbers from bytes; zeros where they end, so that every input means something.
class ByteReader {
 public:
  explicit ByteReader(Bytes bytes) : bytes_(bytes) {}

  bool empty() const { return bytes_.empty(); }

  template <class T>
  T take() {
    T value{};
    const std::size_t size = std::min(sizeof(T), bytes_.size());
    if (size != 0) std::memcpy(&value, bytes_.data(), size);
    bytes_ = bytes_.subspan(size);
    return value;
  }

  /// 0 to limit - 1, from one byte; limit is 256 at most.
  int below(int limit) { return take<std::uint8_t>() % limit; }

  template <class T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int>(choices.size()))];
  }

 private:
  Bytes bytes_;
};

}  // namespace msa::fuzz
