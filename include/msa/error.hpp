// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "msa/export.h"

namespace msa {

enum class ErrorCode : std::uint8_t {
  invalid_argument =
      1,            ///< The request contradicts itself; the text names the field and its value.
  unsupported = 2,  ///< A sound request that no available backend takes; the text lists why.
  out_of_memory = 3,
  cuda = 4,
  internal = 5,
};

/// The only exception type that this library throws.
class MSA_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace msa
