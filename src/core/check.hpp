// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <initializer_list>
#include <sstream>
#include <string>

#include "msa/error.hpp"
#include "msa/tensor.hpp"

namespace msa::core {

/// Text of all parts, one behind the other.
template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

/// "[4, 8192, 16]"
std::string shape_text(const TensorView& view);

/// A dimension that a tensor should have, with the name by which the user knows it.
struct Dim {
  const char* name;
  std::int64_t size;  ///< kAny: any size.
};
inline constexpr std::int64_t kAny = -1;

/// Throws unless `view` is given, has one of `dtypes` and the named dimensions:
/// "SelectTopK: block_ids has shape [4, 9, 8], expected [num_kv_heads=4, total_q=9, top_k=16]".
void check_tensor(const char* operation, const char* name, const TensorView& view,
                  std::initializer_list<DType> dtypes, std::initializer_list<Dim> dims);

}  // namespace msa::core

/// Throws Error(invalid_argument) with the parts as text where the condition does not hold.
#define MSA_CHECK(condition, ...)                                                               \
  do {                                                                                          \
    if (!(condition)) {                                                                         \
      throw ::msa::Error(::msa::ErrorCode::invalid_argument, ::msa::core::concat(__VA_ARGS__)); \
    }                                                                                           \
  } while (false)
