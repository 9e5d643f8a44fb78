// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <vector>

namespace msa::testing {

/// How many blocks the rows have: around vector and tile borders.
inline constexpr std::array<std::int64_t, 11> kWidths = {1,   16,  17,   33,   65,  129,
                                                         257, 513, 1025, 4097, 8192};

/// Rows of block scores made to defeat a threshold scan or a careless comparison.
struct Pattern {
  const char* name;
  std::function<float(std::int64_t column, std::int64_t width, std::mt19937& random)> value;
};

inline const std::vector<Pattern>& patterns() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  static const auto uniform = [](std::mt19937& random) {
    return static_cast<float>(random()) * 0x1p-32f;
  };
  static const std::vector<Pattern> all = {
      {"random", [](auto, auto, auto& random) { return uniform(random) - 0.5f; }},
      {"ascending", [](auto column, auto, auto&) { return static_cast<float>(column); }},
      {"descending", [](auto column, auto, auto&) { return -static_cast<float>(column); }},
      {"equal", [](auto, auto, auto&) { return 1.5f; }},
      {"signed_zeros", [](auto, auto, auto& random) { return random() % 2 != 0 ? 0.0f : -0.0f; }},
      {"few_values",
       [](auto, auto, auto& random) { return static_cast<float>(random() % 3) - 1.0f; }},
      {"neighbouring_floats",
       [](auto, auto, auto& random) { return 1.0f + static_cast<float>(random() % 4) * 0x1p-23f; }},
      {"infinities",
       [](auto, auto, auto& random) {
         constexpr float kValues[] = {kInf, -kInf, 0.0f, -1.0f};
         return kValues[random() % 4];
       }},
      {"nans",
       [](auto, auto, auto& random) {
         constexpr float kValues[] = {kNan, -kNan, -kInf, 2.0f, -2.0f};
         return kValues[random() % 5];
       }},
      {"all_nan", [](auto, auto, auto&) { return kNan; }},
      {"all_negative_infinity", [](auto, auto, auto&) { return -kInf; }},
      {"nan_then_best_last",
       [](auto column, auto width, auto&) { return column + 3 < width ? kNan : 1e20f; }},
      {"one_huge",
       [](auto column, auto width, auto& random) {
         return column == width / 2 ? std::numeric_limits<float>::max() : uniform(random);
       }},
      {"huge", [](auto, auto, auto& random) { return 1e20f * (uniform(random) - 0.5f); }},
      {"subnormal",
       [](auto, auto, auto& random) { return static_cast<float>(random() % 64) * 0x1p-149f; }},
  };
  return all;
}

}  // namespace msa::testing
