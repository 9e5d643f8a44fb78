// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

namespace msa::model {

struct SamplingOptions {
  double temperature = 0.0;  ///< 0: the largest logit, ties to the lowest id.
  double top_p = 1.0;        ///< Keep the likeliest tokens that together have this probability.
  std::int64_t top_k = 0;    ///< Keep this many of the likeliest tokens; 0: all.
  std::uint64_t seed = 0;
};

/// Draws tokens from logits; the same seed and logits give the same tokens on every machine whose
/// exp() rounds alike.
class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options = {});

  /// Throws Error(invalid_argument) naming the token whose logit is NaN or +inf, or where no logit
  /// is finite.
  std::int32_t sample(std::span<const float> logits);

 private:
  struct Candidate {
    double weight = 0.0;
    std::int32_t id = 0;
  };
  double uniform();

  SamplingOptions options_;
  std::mt19937_64 generator_;
  std::vector<Candidate> candidates_;
};

}  // namespace msa::model
