// SPDX-License-Identifier: Apache-2.0
//
// The whole model as plain loops in double precision, one function per formula, without cache,
// chunks or the library: what the runtime is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "core/scalar.hpp"
#include "model/config.hpp"
#include "model/weights.hpp"

namespace msa::test {

using Row = std::vector<double>;
using Rows = std::vector<Row>;

inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

inline Row naive_linear(const TensorView& weight, const Row& x) {
  Row y(at(weight.shape[0]));
  for (std::int64_t o = 0; o < weight.shape[0]; ++o) {
    for (std::int64_t i = 0; i < weight.shape[1]; ++i)
      y[at(o)] += core::load(weight, o, i) * x[at(i)];
  }
  return y;
}

inline Row naive_norm(const TensorView& weight, const Row& x, double eps) {
  double sum = 0.0;
  for (double value : x) sum += value * value;
  Row y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    y[i] = x[i] / std::sqrt(sum / static_cast<double>(x.size()) + eps) *
           (1.0 + core::load(weight, static_cast<std::int64_t>(i)));
  }
  return y;
}

inline Row naive_mlp(const model::Config& c, const model::MlpWeights& w, const Row& x) {
  Row gate = naive_linear(w.gate, x);
  const Row up = naive_linear(w.up, x);
  for (std::size_t i = 0; i < gate.size(); ++i) {
    const double g = std::min(gate[i], c.swiglu_limit);
    const double u = std::max(std::min(up[i], c.swiglu_limit), -c.swiglu_limit);
    gate[i] = g * (1.0 / (1.0 + std::exp(-c.swiglu_alpha * g))) * (u + 1.0);
  }
  return naive_linear(w.down, gate);
}

inline Row naive_moe(const model::Config& c, const model::MoeWeights& w, const Row& x) {
  Row score = naive_linear(w.router, x);
  for (double& value : score) value = 1.0 / (1.0 + std::exp(-value));
  std::vector<std::int64_t> order;
  for (std::int64_t e = 0; e < c.num_experts; ++e) order.push_back(e);
  const auto rank = [&](std::int64_t e) {
    return score[at(e)] + core::load(w.score_correction_bias, e);
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return rank(a) > rank(b); });
  order.resize(at(c.num_experts_per_token));
  double sum = 0.0;
  for (std::int64_t e : order) sum += score[at(e)];
  Row out = w.shared.gate.given() ? naive_mlp(c, w.shared, x) : Row(x.size());
  for (std::int64_t e : order) {
    const Row y = naive_mlp(c, w.experts[at(e)], x);
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] += c.routed_scaling_factor * score[at(e)] / sum * y[i];
    }
  }
  return out;
}

/// The heads of one projection of one token, normalised and rotated: [heads][dim].
inline Rows naive_heads(const model::Config& c, const TensorView& projection,
                        const TensorView& norm, const Row& x, std::int64_t heads,
                        std::int64_t position) {
  const Row flat = naive_linear(projection, x);
  const std::size_t dim = flat.size() / at(heads);
  Rows rows;
  for (std::size_t h = 0; h < at(heads); ++h) {
    const auto begin = flat.begin() + static_cast<std::ptrdiff_t>(h * dim);
    Row row(begin, begin + static_cast<std::ptrdiff_t>(dim));
    if (norm.given()) {
      row = naive_norm(norm, row, c.rms_norm_eps);
      const std::size_t half = at(c.rotary_dim / 2);
      for (std::size_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(position) *
                             std::pow(c.rope_theta, -2.0 * static_cast<double>(i) /
                                                        static_cast<double>(c.rotary_dim));
        const double a = row[i];
        const double b = row[i + half];
        row[i] = a * std::cos(angle) - b * std::sin(angle);
        row[i + half] = b * std::cos(angle) + a * std::sin(angle);
      }
    }
    rows.push_back(row);
  }
  return rows;
}

inline double naive_dot(const Row& a, const Row& b) {
  double sum = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

/// What `position` attends under one index head, as one flag per block.
inline std::vector<bool> naive_selection(const Problem& p, const Row& index_q,
                                         const std::vector<Rows>& index_k, std::int64_t position) {
  const std::int64_t local = position / p.block_size;
  Row score(at(local + 1), -std::numeric_limits<double>::infinity());
  for (std::int64_t j = 0; j <= position; ++j) {
    double& best = score[at(j / p.block_size)];
    best = std::max(best, naive_dot(index_q, index_k[at(j)][0]));
  }
  for (std::int64_t b = 0; b <= local; ++b) {
    if (b < p.num_init_blocks || b > local - p.num_local_blocks) {
      score[at(b)] = std::numeric_limits<double>::infinity();
    }
  }
  std::vector<std::int64_t> order;
  for (std::int64_t b = 0; b <= local; ++b) order.push_back(b);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return score[at(a)] > score[at(b)]; });
  order.resize(std::min(order.size(), static_cast<std::size_t>(p.top_k)));
  std::vector<bool> selected(at(local + 1));
  for (std::int64_t b : order) selected[at(b)] = true;
  return selected;
}

inline Rows naive_attention(const model::Config& c, const model::LayerWeights& w, const Rows& x,
                            bool sparse) {
  const Problem& p = c.attention;
  std::vector<Rows> k;
  std::vector<Rows> v;
  std::vector<Rows> index_k;
  Rows out;
  for (std::size_t t = 0; t < x.size(); ++t) {
    const auto position = static_cast<std::int64_t>(t);
    const Rows q = naive_heads(c, w.q_proj, w.q_norm, x[t], p.num_q_heads, position);
    k.push_back(naive_heads(c, w.k_proj, w.k_norm, x[t], p.num_kv_heads, position));
    v.push_back(naive_heads(c, w.v_proj, {}, x[t], p.num_kv_heads, position));
    Rows index_q;
    if (sparse) {
      index_q = naive_heads(c, w.index_q_proj, w.index_q_norm, x[t], p.num_kv_heads, position);
      index_k.push_back(naive_heads(c, w.index_k_proj, w.index_k_norm, x[t], 1, position));
    }
    Row heads;
    for (std::int64_t h = 0; h < p.num_q_heads; ++h) {
      const std::size_t g = at(h / p.group_size());
      std::vector<bool> selected(t / at(p.block_size) + 1, true);
      if (sparse) selected = naive_selection(p, index_q[g], index_k, position);
      double sum = 0.0;
      Row head(at(p.head_dim));
      for (std::size_t j = 0; j <= t; ++j) {
        if (!selected[j / at(p.block_size)]) continue;
        const double weight =
            std::exp(naive_dot(q[at(h)], k[j][g]) / std::sqrt(static_cast<double>(p.head_dim)));
        sum += weight;
        for (std::size_t i = 0; i < head.size(); ++i) head[i] += weight * v[j][g][i];
      }
      for (double value : head) heads.push_back(value / sum);
    }
    out.push_back(naive_linear(w.o_proj, heads));
  }
  return out;
}

/// Logits of every token.
inline Rows naive_forward(const model::Config& c, const model::Weights& w,
                          std::span<const std::int32_t> tokens, bool dense_everywhere = false) {
  Rows x;
  for (std::int32_t token : tokens) {
    Row& row = x.emplace_back();
    for (std::int64_t i = 0; i < c.hidden_size; ++i)
      row.push_back(core::load(w.embed_tokens, token, i));
  }
  const auto add = [](Row& row, const Row& update) {
    for (std::size_t i = 0; i < row.size(); ++i) row[i] += update[i];
  };
  for (std::size_t layer = 0; layer < w.layers.size(); ++layer) {
    const model::LayerWeights& weights = w.layers[layer];
    Rows normalised;
    for (const Row& row : x) {
      normalised.push_back(naive_norm(weights.input_norm, row, c.rms_norm_eps));
    }
    const bool sparse =
        !dense_everywhere && c.attention_kinds[layer] == model::AttentionKind::sparse;
    const Rows update = naive_attention(c, weights, normalised, sparse);
    for (std::size_t t = 0; t < x.size(); ++t) {
      add(x[t], update[t]);
      const Row input = naive_norm(weights.post_attention_norm, x[t], c.rms_norm_eps);
      add(x[t], c.mlp_kinds[layer] == model::MlpKind::dense ? naive_mlp(c, weights.mlp, input)
                                                            : naive_moe(c, weights.moe, input));
    }
  }
  for (Row& row : x) row = naive_linear(w.lm_head, naive_norm(w.final_norm, row, c.rms_norm_eps));
  return x;
}

}  // namespace msa::test
