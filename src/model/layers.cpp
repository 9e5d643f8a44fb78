// SPDX-License-Identifier: Apache-2.0
#include "model/layers.hpp"

#include <algorithm>
#include <cmath>

#include "core/scalar.hpp"
#include "core/thread_pool.hpp"
#include "model/linear.hpp"

namespace msa::model {
namespace {

// Elements per task: some 10 us of work, well above the cost of handing it out.
constexpr std::int64_t kElementsPerTask = 1 << 14;

/// Calls body(begin, end) on pieces of [0, count) whose rows have `width` elements.
template <class Body>
void for_each_piece(std::int64_t count, std::int64_t width, Body body) {
  const std::int64_t piece =
      std::max<std::int64_t>(kElementsPerTask / std::max<std::int64_t>(width, 1), 1);
  core::parallel_for((count + piece - 1) / piece, [&](std::int64_t index, int) {
    body(index * piece, std::min((index + 1) * piece, count));
  });
}

void norm_row(const float* x, std::span<const float> scale, double eps, float* out) {
  double sum = 0.0;
  for (std::size_t i = 0; i < scale.size(); ++i) {
    sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  }
  const auto factor =
      static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(scale.size()) + eps));
  for (std::size_t i = 0; i < scale.size(); ++i) out[i] = x[i] * factor * scale[i];
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
  for_each_piece(rows, width, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      norm_row(x.data() + row * width, scale, eps, out.data() + row * width);
    }
  });
}

RotaryEmbedding::RotaryEmbedding(std::int64_t rotary_dim, double theta) : half_(rotary_dim / 2) {
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
  for_each_piece(tokens, half_, [&](std::int64_t begin, std::int64_t end) {
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
  const float* cosines = cos_.data() + token * half_;
  const float* sines = sin_.data() + token * half_;
  for (std::int64_t i = 0; i < half_; ++i) {
    const float a = head[i];
    const float b = head[i + half_];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + half_] = b * cosines[i] + a * sines[i];
  }
}

void norm_and_rotate(std::span<float> heads, std::int64_t tokens, std::int64_t num_heads,
                     std::span<const float> scale, double eps, const RotaryEmbedding& rope) {
  const auto dim = static_cast<std::int64_t>(scale.size());
  for_each_piece(tokens, num_heads * dim, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t token = begin; token < end; ++token) {
      for (std::int64_t h = 0; h < num_heads; ++h) {
        float* head = heads.data() + (token * num_heads + h) * dim;
        norm_row(head, scale, eps, head);
        rope.rotate(head, token);
      }
    }
  });
}

void swiglu_oai(std::span<float> gate, std::span<const float> up, double alpha, double limit) {
  const auto slope = static_cast<float>(alpha);
  const auto bound = static_cast<float>(limit);
  for_each_piece(
      static_cast<std::int64_t>(gate.size()), 1, [&](std::int64_t begin, std::int64_t end) {
        for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
          const float g = std::min(gate[i], bound);
          const float u = std::clamp(up[i], -bound, bound);
          gate[i] = g / (1.0f + std::exp(-slope * g)) * (u + 1.0f);
        }
      });
}

void add(std::span<float> x, std::span<const float> y) {
  for_each_piece(static_cast<std::int64_t>(x.size()), 1, [&](std::int64_t begin, std::int64_t end) {
    for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i)
      x[i] += y[i];
  });
}

}  // namespace msa::model
