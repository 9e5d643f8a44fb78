// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace msa::testing {

/// How often this process has called operator new so far. Linking it replaces that operator.
std::int64_t num_allocations();

}  // namespace msa::testing
