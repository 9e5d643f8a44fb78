// SPDX-License-Identifier: Apache-2.0
//
// The case table on every SIMD target, judged by the reference: values, guard bands, NaN poison in
// everything that must not be read, two runs bitwise equal.
#include "tests/support/verify.hpp"

#include "tests/cpu/targets.hpp"

namespace msa::testing {
namespace {

class CpuCase : public ::testing::TestWithParam<Case> {};

TEST_P(CpuCase, MatchesTheReference) {
  Inputs inputs(GetParam());
  for_each_simd_target([&](const char*) {
    verify_all(inputs, "cpu", [](const char* operation, const Outcome& outcome) {
      EXPECT_TRUE(outcome.status == Outcome::Status::passed ||
                  outcome.status == Outcome::Status::not_applicable)
          << operation << ": " << outcome.detail;
    });
  });
}

INSTANTIATE_TEST_SUITE_P(Table, CpuCase, ::testing::ValuesIn(all_cases()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace msa::testing
