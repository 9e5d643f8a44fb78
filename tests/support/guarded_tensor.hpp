// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/tensor.hpp"

namespace msa::testing {

/// A strided host tensor between guard bands. At first every byte, elements included, holds `fill`:
/// for inputs kPoison, which is NaN in every float format, for outputs kSentinel.
class GuardedTensor {
 public:
  static constexpr std::byte kPoison{0xff};
  static constexpr std::byte kSentinel{0xa5};

  GuardedTensor() = default;
  /// `row_gap` elements that belong to nobody follow each slice of each axis.
  GuardedTensor(DType dtype, const std::vector<std::int64_t>& shape, int row_gap, std::byte fill);

  const TensorView& view() const { return view_; }
  operator const TensorView&() const { return view_; }
  bool given() const { return view_.given(); }

  /// Elements, gaps and guard bands.
  std::span<std::byte> bytes() const { return buffer_.span(); }

  /// The same bytes at another address.
  GuardedTensor clone() const;
  /// The same elements, all of them `elements` behind a multiple of the alignment they had.
  GuardedTensor shifted(std::size_t elements) const;
  /// From now on changed() compares with what is here.
  void seal();
  /// "" or what differs from the sealed bytes anywhere. For inputs.
  std::string changed() const;
  /// "" or which byte outside the elements no longer holds `fill`. For outputs.
  std::string damaged() const;
  /// "" or the first byte, gaps included, that differs from `other` of the same layout.
  std::string difference(const GuardedTensor& other) const;

 private:
  /// Bytes before element 0.
  std::size_t lead() const;
  std::string describe(std::size_t byte) const;

  TensorView view_{};
  core::HostBuffer buffer_;
  std::vector<std::byte> sealed_;
  std::byte fill_{};
};

/// Calls visit(indices) for every element, row-major; indices is an array of view.rank numbers.
template <class Visit>
void for_each_index(const TensorView& view, Visit visit) {
  if (view.num_elements() == 0) return;
  std::array<std::int64_t, kMaxRank> indices{};
  for (;;) {
    visit(indices);
    int axis = view.rank - 1;
    while (axis >= 0 && ++indices[static_cast<std::size_t>(axis)] ==
                            view.shape[static_cast<std::size_t>(axis)]) {
      indices[static_cast<std::size_t>(axis--)] = 0;
    }
    if (axis < 0) return;
  }
}

/// Offset in elements of an index array.
std::int64_t offset_at(const TensorView& view, const std::array<std::int64_t, kMaxRank>& indices);

/// All elements, row-major.
std::vector<double> values_of(const TensorView& view);

/// Stores all elements, row-major.
void set_values(const TensorView& view, const std::vector<double>& values);

}  // namespace msa::testing
