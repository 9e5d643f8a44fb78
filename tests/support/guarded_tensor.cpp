// SPDX-License-Identifier: Apache-2.0
#include "tests/support/guarded_tensor.hpp"

#include <algorithm>
#include <cstring>

#include "core/check.hpp"
#include "core/scalar.hpp"

namespace msa::testing {
namespace {

constexpr std::size_t kGuardBytes = 64;  // keeps element 0 aligned as the buffer is

}  // namespace

std::int64_t offset_at(const TensorView& view, const std::array<std::int64_t, kMaxRank>& indices) {
  std::int64_t offset = 0;
  for (std::size_t axis = 0; axis < static_cast<std::size_t>(view.rank); ++axis) {
    offset += indices[axis] * view.stride[axis];
  }
  return offset;
}

std::vector<double> values_of(const TensorView& view) {
  std::vector<double> values;
  values.reserve(static_cast<std::size_t>(view.num_elements()));
  for_each_index(view, [&](const auto& indices) {
    values.push_back(
        core::load_element(core::address_at(view, offset_at(view, indices)), view.dtype));
  });
  return values;
}

void set_values(const TensorView& view, const std::vector<double>& values) {
  std::size_t next = 0;
  for_each_index(view, [&](const auto& indices) {
    core::store_element(core::address_at(view, offset_at(view, indices)), view.dtype,
                        values[next++]);
  });
}

GuardedTensor::GuardedTensor(DType dtype, const std::vector<std::int64_t>& shape, int row_gap,
                             std::byte fill)
    : fill_(fill) {
  view_.dtype = dtype;
  view_.rank = static_cast<int>(shape.size());
  std::int64_t stride = 1;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    view_.shape[axis] = shape[axis];
    view_.stride[axis] = stride;
    stride = stride * shape[axis] + row_gap;
  }
  buffer_ = core::HostBuffer(2 * kGuardBytes + size_of(dtype) * static_cast<std::size_t>(stride));
  std::memset(buffer_.data(), static_cast<int>(fill), buffer_.size());
  view_.data = buffer_.data() + kGuardBytes;
}

GuardedTensor GuardedTensor::clone() const {
  GuardedTensor copy;
  copy.view_ = view_;
  copy.fill_ = fill_;
  copy.buffer_ = core::HostBuffer(buffer_.size());
  if (buffer_.size() != 0) std::memcpy(copy.buffer_.data(), buffer_.data(), buffer_.size());
  copy.view_.data = copy.buffer_.data() + lead();
  return copy;
}

GuardedTensor GuardedTensor::shifted(std::size_t elements) const {
  const std::size_t bytes = elements * size_of(view_.dtype);
  GuardedTensor copy;
  copy.view_ = view_;
  copy.fill_ = fill_;
  copy.buffer_ = core::HostBuffer(buffer_.size() + bytes);
  std::memset(copy.buffer_.data(), static_cast<int>(fill_), bytes);
  std::memcpy(copy.buffer_.data() + bytes, buffer_.data(), buffer_.size());
  copy.view_.data = copy.buffer_.data() + lead() + bytes;
  copy.seal();
  return copy;
}

std::size_t GuardedTensor::lead() const {
  return static_cast<std::size_t>(static_cast<const std::byte*>(view_.data) - buffer_.data());
}

void GuardedTensor::seal() { sealed_.assign(buffer_.data(), buffer_.data() + buffer_.size()); }

std::string GuardedTensor::describe(std::size_t byte) const {
  return core::concat("byte ", static_cast<std::int64_t>(byte) - static_cast<std::int64_t>(lead()),
                      " (from element 0) of a ", name_of(view_.dtype), core::shape_text(view_));
}

std::string GuardedTensor::changed() const {
  if (std::equal(sealed_.begin(), sealed_.end(), buffer_.data())) return "";
  for (std::size_t byte = 0; byte < sealed_.size(); ++byte) {
    if (buffer_.data()[byte] != sealed_[byte]) return describe(byte) + " was changed";
  }
  return "";
}

std::string GuardedTensor::damaged() const {
  std::vector<bool> element(buffer_.size(), false);
  for_each_index(view_, [&](const auto& indices) {
    const std::size_t first =
        lead() + static_cast<std::size_t>(offset_at(view_, indices)) * size_of(view_.dtype);
    for (std::size_t i = 0; i < size_of(view_.dtype); ++i) element[first + i] = true;
  });
  for (std::size_t byte = 0; byte < buffer_.size(); ++byte) {
    if (!element[byte] && buffer_.data()[byte] != fill_) {
      return describe(byte) + " lies outside the elements but was written";
    }
  }
  return "";
}

std::string GuardedTensor::difference(const GuardedTensor& other) const {
  if (std::memcmp(buffer_.data(), other.buffer_.data(), buffer_.size()) == 0) return "";
  for (std::size_t byte = 0; byte < buffer_.size(); ++byte) {
    if (buffer_.data()[byte] != other.buffer_.data()[byte]) return describe(byte) + " differs";
  }
  return "";
}

}  // namespace msa::testing
