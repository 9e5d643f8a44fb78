// SPDX-License-Identifier: Apache-2.0
//
// libFuzzer's entry; MSA_FUZZ_TARGET is the function of targets.hpp that this binary runs.
#include "tests/fuzz/targets.hpp"

// NOLINTNEXTLINE(readability-identifier-naming): libFuzzer's name
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  msa::fuzz::MSA_FUZZ_TARGET({data, size});
  return 0;
}
