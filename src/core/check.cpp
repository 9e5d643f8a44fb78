// SPDX-License-Identifier: Apache-2.0
#include "core/check.hpp"

#include <algorithm>
#include <array>

namespace msa::core {
namespace {

// Far above any memory, and small enough that no product of sizes, strides, bytes and threads
// overflows 64 bits.
constexpr std::int64_t kMostElements = std::int64_t{1} << 40;
constexpr std::int64_t kLongestReach = std::int64_t{1} << 48;  // elements

/// Empty axes count as one element, so that the sizes beside them are bounded too.
bool is_of_possible_size(const TensorView& view) {
  std::int64_t count = 1;
  for (std::size_t axis = 0; axis < static_cast<std::size_t>(view.rank); ++axis) {
    const std::int64_t size = std::max<std::int64_t>(view.shape[axis], 1);
    if (size > kMostElements / count) return false;
    count *= size;
    if (size == 1) continue;
    const std::int64_t longest = kLongestReach / (size - 1);
    if (view.stride[axis] > longest || view.stride[axis] < -longest) return false;
  }
  return true;
}

std::string dims_text(std::initializer_list<Dim> dims) {
  std::string text = "[";
  for (const Dim& dim : dims) {
    if (text.size() > 1) text += ", ";
    text += dim.name;
    if (dim.size != kAny) text += concat("=", dim.size);
  }
  return text + "]";
}

std::string list_text(const std::array<std::int64_t, kMaxRank>& numbers, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) {
    text += concat(i == 0 ? "" : ", ", numbers[static_cast<std::size_t>(i)]);
  }
  return text + "]";
}

}  // namespace

std::string shape_text(const TensorView& view) { return list_text(view.shape, view.rank); }

void check_tensor(const char* operation, const char* name, const TensorView& view,
                  std::initializer_list<DType> dtypes, std::initializer_list<Dim> dims) {
  MSA_CHECK(view.given(), operation, ": ", name, " is required, with shape ", dims_text(dims));
  MSA_CHECK(std::find(dtypes.begin(), dtypes.end(), view.dtype) != dtypes.end(), operation, ": ",
            name, " has dtype ", name_of(view.dtype), ", expected ", [&] {
              std::string text;
              for (DType dtype : dtypes) text += concat(text.empty() ? "" : " or ", name_of(dtype));
              return text;
            }());
  bool fits = view.rank == static_cast<int>(dims.size());
  std::size_t i = 0;
  for (const Dim& dim : dims) {
    fits = fits && view.shape[i] >= 0 && (dim.size == kAny || view.shape[i] == dim.size);
    ++i;
  }
  MSA_CHECK(fits, operation, ": ", name, " has shape ", shape_text(view), ", expected ",
            dims_text(dims));
  MSA_CHECK(is_of_possible_size(view), operation, ": ", name, " has shape ", shape_text(view),
            " and strides ", list_text(view.stride, view.rank), ": no memory holds that");
}

}  // namespace msa::core
