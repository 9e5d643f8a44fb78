// SPDX-License-Identifier: Apache-2.0
#include "core/check.hpp"

#include <algorithm>

namespace msa::core {
namespace {

std::string dims_text(std::initializer_list<Dim> dims) {
  std::string text = "[";
  for (const Dim& dim : dims) {
    if (text.size() > 1) text += ", ";
    text += dim.name;
    if (dim.size != kAny) text += concat("=", dim.size);
  }
  return text + "]";
}

}  // namespace

std::string shape_text(const TensorView& view) {
  std::string text = "[";
  for (int i = 0; i < view.rank; ++i) {
    text += concat(i == 0 ? "" : ", ", view.shape[static_cast<std::size_t>(i)]);
  }
  return text + "]";
}

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
}

}  // namespace msa::core
