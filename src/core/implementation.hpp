// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>

#include "msa/ops.hpp"

namespace msa::detail {

/// One row of an operation's ordered list. `declines` gets arguments that passed validation and
/// looks at shapes, dtypes, strides and devices only, never at pointers.
template <class Args>
struct Implementation {
  const char* name;    ///< "cpu"
  const char* dtypes;  ///< "f32 f16 bf16", for the support matrix
  std::optional<std::string> (*declines)(const Args&, const Options&);  ///< nullopt: takes it
  std::size_t (*workspace_bytes)(const Args&);
  void (*run)(const Args&, std::span<std::byte> workspace, Stream);
};

}  // namespace msa::detail
