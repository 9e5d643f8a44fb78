// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "core/tensor.hpp"
#include "msa/msa.hpp"
#include "tests/cpu/targets.hpp"

namespace msa::testing {

/// Calls test(name) for the reference, then for the CPU backend on each SIMD target.
template <class Test>
void for_each_backend(Test test) {
  {
    SCOPED_TRACE("reference");
    test("reference");
  }
  for_each_simd_target([&](const char*) { test("cpu"); });
}

template <class Args>
void run_on(const char* backend, const Args& args) {
  const auto plan = msa::plan(args, {.backend = backend});
  const core::HostBuffer workspace(plan.workspace_bytes());
  plan.run(args, workspace.span());
}

}  // namespace msa::testing
