// SPDX-License-Identifier: Apache-2.0
//
// The kept corpus of every fuzz target, as an ordinary test; and random small problems.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <ostream>
#include <random>
#include <vector>

#include "msa/backend.hpp"
#include "tests/fuzz/problems.hpp"

namespace msa::fuzz {

// NOLINTNEXTLINE(readability-identifier-naming): GoogleTest's name
void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }

namespace {

/// Puts the number of threads back, which some targets change.
class FuzzCorpus : public ::testing::TestWithParam<Target> {
 protected:
  void TearDown() override { set_num_threads(threads_); }

 private:
  int threads_ = num_threads();
};

TEST_P(FuzzCorpus, HasNoFinding) {
  const std::filesystem::path folder =
      std::filesystem::path(MSA_SOURCE_DIR) / "tests/fuzz/corpus" / GetParam().name;
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  EXPECT_GE(files.size(), 5u);
  for (const std::filesystem::path& path : files) {
    SCOPED_TRACE(path.string());
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> text{std::istreambuf_iterator<char>(file), {}};
    EXPECT_NO_THROW(
        GetParam().run({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}));
  }
  GetParam().run({});
}

INSTANTIATE_TEST_SUITE_P(Targets, FuzzCorpus, ::testing::ValuesIn(kTargets),
                         [](const auto& test) { return test.param.name; });

// 300 problems, split so that ctest runs the parts side by side.
class RandomProblems : public ::testing::TestWithParam<unsigned> {};

TEST_P(RandomProblems, AgreeWithTheReferenceOnEveryTarget) {
  constexpr int kProblems = 100;
  const int threads = num_threads();
  std::mt19937 random(GetParam());
  int comparisons = 0;
  for (int i = 0; i < kProblems; ++i) {
    std::vector<std::uint8_t> bytes(32);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
    ByteReader reader(bytes);
    comparisons += check(small_problem(reader));
  }
  // Five operations, some of which are not defined for every problem.
  EXPECT_GE(comparisons, 4 * kProblems);
  set_num_threads(threads);
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomProblems, ::testing::Values(1u, 2u, 3u));

}  // namespace
}  // namespace msa::fuzz
