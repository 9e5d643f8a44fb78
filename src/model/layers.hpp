// SPDX-License-Identifier: Apache-2.0
//
// The element-wise parts of a decoder layer, on f32 activations of [tokens, ...] rows.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "msa/tensor.hpp"

namespace msa::model {

/// 1 + weight in f32: what a Gemma-style RMSNorm multiplies with.
std::vector<float> norm_scale(const TensorView& weight);

/// out = x / sqrt(mean(x^2) + eps) * scale for each row of scale.size() elements; out may be x.
void rms_norm(std::span<const float> x, std::int64_t rows, std::span<const float> scale, double eps,
              std::span<float> out);

/// Rotary embedding of the first rotary_dim elements of a head, whose halves are the pairs (NeoX).
class RotaryEmbedding {
 public:
  RotaryEmbedding() = default;
  /// With room for max_tokens positions at a time.
  RotaryEmbedding(std::int64_t rotary_dim, double theta, std::int64_t max_tokens);

  /// What the constructor allocates.
  static std::int64_t bytes(std::int64_t rotary_dim, std::int64_t max_tokens) {
    return static_cast<std::int64_t>(sizeof(float)) * (rotary_dim / 2) * (2 * max_tokens + 1);
  }

  /// Makes the tables for positions [first, first + tokens).
  void prepare(std::int64_t first, std::int64_t tokens);

  /// Rotates one head of the token that stands at first + token.
  void rotate(float* head, std::int64_t token) const;

 private:
  std::int64_t half_ = 0;
  std::vector<float> frequencies_;  // [half]
  std::vector<float> cos_;          // [tokens, half]
  std::vector<float> sin_;          // [tokens, half]
};

/// RMSNorm of every head, then its rotation: heads is [tokens, num_heads, scale.size()].
void norm_and_rotate(std::span<float> heads, std::int64_t tokens, std::int64_t num_heads,
                     std::span<const float> scale, double eps, const RotaryEmbedding& rope);

/// SwiGLU-OAI in place of `gate`: with g = min(gate, limit) and u = clamp(up, -limit, limit),
/// gate = g * sigmoid(alpha * g) * (u + 1).
void swiglu_oai(std::span<float> gate, std::span<const float> up, double alpha, double limit);

/// x += y
void add(std::span<float> x, std::span<const float> y);

}  // namespace msa::model
