// SPDX-License-Identifier: Apache-2.0
//
// NormRopeAppendKv for one token of host tensors, in the order of operations that ops.hpp defines.
#pragma once

#include <vector>

#include "core/sequences.hpp"

namespace msa::core {

/// Memory of one thread for norm_rope_append().
struct NormRopeScratch {
  explicit NormRopeScratch(const NormRopeAppendKv& args);
  std::vector<float> row;
  std::vector<std::int8_t> codes;
};

/// Everything of packed token `token`. Tokens may be done in any order and at the same time.
void norm_rope_append(const NormRopeAppendKv& args, const Sequences& sequences, std::int64_t token,
                      NormRopeScratch& scratch);

}  // namespace msa::core
