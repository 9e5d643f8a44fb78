// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include "cpu/cpu.hpp"

namespace msa::testing {

/// Calls test(target name) with each SIMD target of this CPU in use, and goes back to the best.
template <class Test>
void for_each_simd_target(Test test) {
  for (const char* target : cpu::simd_targets()) {
    SCOPED_TRACE(target);
    cpu::use_simd_target(target);
    ASSERT_STREQ(cpu::simd_target(), target);
    test(target);
  }
  cpu::use_simd_target(nullptr);
}

}  // namespace msa::testing
