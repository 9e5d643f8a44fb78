// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tests/cases.hpp"
#include "tests/fuzz/byte_reader.hpp"

namespace msa::fuzz {

/// A random small problem and the number of threads to run it on.
struct SmallProblem {
  testing::Case spec;
  int num_threads = 1;
};

SmallProblem small_problem(ByteReader& bytes);

/// Runs every operation of the problem on every available backend and every SIMD target, and
/// compares it with the reference. Throws Finding with the case as code. Returns the number of
/// comparisons made.
int check(const SmallProblem& problem);

}  // namespace msa::fuzz
