// SPDX-License-Identifier: Apache-2.0
#include "model/layers.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "model/linear.hpp"
#include "model/pieces.hpp"
#include "model/wide_clones.hpp"

namespace msa::model {
namespace {

MSA_WIDE_CLONES void norm_row(const float* x, const float* scale, std::int64_t width, double eps,
                              float* out) {
  constexpr std::int64_t kLanes = 16;
  double lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const auto value = static_cast<double>(x[i + lane]);
      lanes[lane] += value * value;
    }
  }
  double sum = 0.0;
  for (; i < width; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  for (double lane : lanes) sum += lane;
  const auto factor = static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(width) + eps));
  for (i = 0; i < width; ++i) out[i] = x[i] * factor * scale[i];
}

/// e^x within 2 units in the last place for x in [-87, 87] (1.2 measured); above infinity, below
/// about e^-87, and NaN for NaN. A call to expf would keep loops from being vectorised, and takes
/// as long as a third of a small model's MLP.
[[gnu::always_inline]] inline float exp_of(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693145752f;  // 17 bits, so that its product with n is exact
  constexpr float kLn2Low = 1.42860677e-6f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  const bool overflows = x > 87.0f;
  x = overflows ? 87.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln(2) / 2
  // Taylor's series; what is left out is below r^8 / 8! < 6e-9.
  float sum = 1.0f / 5040.0f;
  sum = sum * r + 1.0f / 720.0f;
  sum = sum * r + 1.0f / 120.0f;
  sum = sum * r + 1.0f / 24.0f;
  sum = sum * r + 1.0f / 6.0f;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  // The integer n stands in the low bits of `shifted`; it becomes the exponent.
  const std::uint32_t bits = (std::bit_cast<std::uint32_t>(shifted) + 127u) << 23;
  const float value = sum * std::bit_cast<float>(bits);
  return overflows ? std::numeric_limits<float>::infinity() : value;
}

MSA_WIDE_CLONES void swiglu_piece(float* gate, const float* up, std::int64_t count, float alpha,
                                  float limit) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = gate[i] > limit ? limit : gate[i];
    float u = up[i] > limit ? limit : up[i];
    u = u < -limit ? -limit : u;
    gate[i] = g / (1.0f + exp_of(-alpha * g)) * (u + 1.0f);
  }
}

MSA_WIDE_CLONES void add_piece(float* x, const float* y, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] += y[i];
}

MSA_WIDE_CLONES void rotate_halves(float* first, float* second, const float* cosines,
                                   const float* sines, std::int64_t half) {
  for (std::int64_t i = 0; i < half; ++i) {
    const float a = first[i];
    const float b = second[i];
    first[i] = a * cosines[i] - b * sines[i];
    second[i] = b * cosines[i] + a * sines[i];
  }
}

}  // namespace

std::vector<float> norm_scale(const TensorView& weight) {
  std::vector<float> scale(static_cast<std::size_t>(weight.num_elements()));
  expand_to_f32(static_cast<const std::byte*>(weight.data), weight.dtype, scale);
  for (float& value : scale) value += 1.0f;
  return scale;
}

void rms_norm(std::span<const float> x, std::int64_t rows, std::span<const float> scale, double eps,
              std::span<float> out) {
  const auto width = static_cast<std::int64_t>(scale.size());
  for_each_piece(rows, width, kElementsOfNorm, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      norm_row(x.data() + row * width, scale.data(), width, eps, out.data() + row * width);
    }
  });
}

RotaryEmbedding::RotaryEmbedding(std::int64_t rotary_dim, double theta, std::int64_t max_tokens)
    : half_(rotary_dim / 2) {
  frequencies_.reserve(static_cast<std::size_t>(half_));
  cos_.reserve(static_cast<std::size_t>(max_tokens * half_));
  sin_.reserve(static_cast<std::size_t>(max_tokens * half_));
  // Frequencies and angles are rounded to f32 because that is how the model was trained: at
  // position 10^6 the rounding of an angle is 0.03 rad, so more exact angles are different angles.
  for (std::int64_t i = 0; i < half_; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(rotary_dim);
    frequencies_.push_back(1.0f /
                           static_cast<float>(std::pow(theta, static_cast<double>(exponent))));
  }
}

void RotaryEmbedding::prepare(std::int64_t first, std::int64_t tokens) {
  cos_.resize(static_cast<std::size_t>(tokens * half_));
  sin_.resize(static_cast<std::size_t>(tokens * half_));
  for_each_piece(tokens, half_, kElementsOfSines, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      for (std::int64_t i = 0; i < half_; ++i) {
        const float angle =
            static_cast<float>(first + token) * frequencies_[static_cast<std::size_t>(i)];
        const auto at = static_cast<std::size_t>(token * half_ + i);
        cos_[at] = static_cast<float>(std::cos(static_cast<double>(angle)));
        sin_[at] = static_cast<float>(std::sin(static_cast<double>(angle)));
      }
    }
  });
}

void RotaryEmbedding::rotate(float* head, std::int64_t token) const {
  rotate_halves(head, head + half_, cos_.data() + token * half_, sin_.data() + token * half_,
                half_);
}

void norm_and_rotate(std::span<float> heads, std::int64_t tokens, std::int64_t num_heads,
                     std::span<const float> scale, double eps, const RotaryEmbedding& rope) {
  const auto dim = static_cast<std::int64_t>(scale.size());
  for_each_piece(tokens, num_heads * dim, kElementsOfNorm,
                 [&](std::int64_t begin, std::int64_t end) {
                   for (std::int64_t token = begin; token < end; ++token) {
                     for (std::int64_t h = 0; h < num_heads; ++h) {
                       float* head = heads.data() + (token * num_heads + h) * dim;
                       norm_row(head, scale.data(), dim, eps, head);
                       rope.rotate(head, token);
                     }
                   }
                 });
}

void swiglu_oai(std::span<float> gate, std::span<const float> up, double alpha, double limit) {
  for_each_piece(static_cast<std::int64_t>(gate.size()), 1, kElementsOfSwiglu,
                 [&](std::int64_t begin, std::int64_t end) {
                   swiglu_piece(gate.data() + begin, up.data() + begin, end - begin,
                                static_cast<float>(alpha), static_cast<float>(limit));
                 });
}

void add(std::span<float> x, std::span<const float> y) {
  for_each_piece(static_cast<std::int64_t>(x.size()), 1, kElementsOfAdd,
                 [&](std::int64_t begin, std::int64_t end) {
                   add_piece(x.data() + begin, y.data() + begin, end - begin);
                 });
}

}  // namespace msa::model
