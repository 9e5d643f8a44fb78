// SPDX-License-Identifier: Apache-2.0
//
// The case table on the reference itself: what it must not read or write it does not, and its own
// narrow results are within the budget that other backends get.
#include "tests/support/verify.hpp"

#include <gtest/gtest.h>

namespace msa::testing {
namespace {

class ReferenceCase : public ::testing::TestWithParam<Case> {};

TEST_P(ReferenceCase, PassesItsOwnVerdict) {
  Inputs inputs(GetParam());
  verify_all(inputs, "reference", [](const char* operation, const Outcome& outcome) {
    EXPECT_TRUE(outcome.status == Outcome::Status::passed ||
                outcome.status == Outcome::Status::not_applicable)
        << operation << ": " << outcome.detail;
  });
}

INSTANTIATE_TEST_SUITE_P(Table, ReferenceCase, ::testing::ValuesIn(all_cases()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace msa::testing
