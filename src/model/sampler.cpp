// SPDX-License-Identifier: Apache-2.0
#include "model/sampler.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.hpp"

namespace msa::model {

Sampler::Sampler(const SamplingOptions& options) : options_(options), generator_(options.seed) {
  MSA_CHECK(std::isfinite(options.temperature) && options.temperature >= 0.0,
            "Sampler: temperature is ", options.temperature, ", expected a number >= 0");
  MSA_CHECK(options.top_p > 0.0 && options.top_p <= 1.0, "Sampler: top_p is ", options.top_p,
            ", expected within (0, 1]");
  MSA_CHECK(options.top_k >= 0, "Sampler: top_k is ", options.top_k, ", expected >= 0");
}

double Sampler::uniform() {
  // The standard fixes the generator's numbers but not those of its distributions.
  return static_cast<double>(generator_() >> 11) * 0x1p-53;
}

std::int32_t Sampler::sample(std::span<const float> logits) {
  std::size_t best = 0;
  for (std::size_t id = 0; id < logits.size(); ++id) {
    MSA_CHECK(logits[id] < std::numeric_limits<float>::infinity(), "Sampler: the logit of token ",
              id, " is ", logits[id]);
    if (logits[id] > logits[best]) best = id;
  }
  MSA_CHECK(!logits.empty() && std::isfinite(logits[best]), "Sampler: none of the ", logits.size(),
            " logits is finite");
  if (options_.temperature == 0.0) return static_cast<std::int32_t>(best);

  candidates_.clear();
  double total = 0.0;
  const auto largest = static_cast<double>(logits[best]);
  for (std::size_t id = 0; id < logits.size(); ++id) {
    const double weight =
        std::exp((static_cast<double>(logits[id]) - largest) / options_.temperature);
    candidates_.push_back({.weight = weight, .id = static_cast<std::int32_t>(id)});
    total += weight;
  }
  if (options_.top_k > 0 || options_.top_p < 1.0) {
    const auto likelier = [](const Candidate& a, const Candidate& b) {
      return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
    };
    std::sort(candidates_.begin(), candidates_.end(), likelier);
    if (options_.top_k > 0 && static_cast<std::size_t>(options_.top_k) < candidates_.size()) {
      candidates_.resize(static_cast<std::size_t>(options_.top_k));
      total = 0.0;
      for (const Candidate& candidate : candidates_) total += candidate.weight;
    }
    const double wanted = options_.top_p * total;
    double kept = 0.0;
    std::size_t count = 0;
    while (count < candidates_.size() && (count == 0 || kept < wanted)) {
      kept += candidates_[count++].weight;
    }
    candidates_.resize(count);
    total = kept;
  }
  const double target = uniform() * total;
  double sum = 0.0;
  for (const Candidate& candidate : candidates_) {
    sum += candidate.weight;
    if (target < sum) return candidate.id;
  }
  // Rounding may leave `sum` a little short of `total`.
  return std::max_element(
             candidates_.begin(), candidates_.end(),
             [](const Candidate& a, const Candidate& b) { return a.weight < b.weight; })
      ->id;
}

}  // namespace msa::model
