// SPDX-License-Identifier: Apache-2.0
#include "tests/support/gradient_bounds.hpp"

#include <algorithm>
#include <cmath>

#include "reference/support.hpp"

namespace msa::testing {
namespace {

constexpr double kU = 0x1p-24;

/// n errors of one step, 1.01 as in bounds.cpp.
double gamma(double n, const Arithmetic& arithmetic) { return 1.01 * n * arithmetic.step; }

double magnitude_dot(const reference::Row& a, const reference::Row& b, std::int64_t dim) {
  double sum = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) sum += std::fabs(a[d] * b[d]);
  return sum;
}

/// A softmax over a row's support and the relative error of its probabilities: with e the error of
/// a score minus the maximum, each exponential moves by expm1(e), and so does their sum.
struct Probabilities {
  std::vector<double> values;
  double relative = 0.0;  ///< infinite where it is above a tenth
};

/// Scores of row `a` with the keys b(t). `given_error`: of the logarithm of their sum, where that
/// is an argument.
template <class Key>
Probabilities probabilities_of(const std::vector<double>& scores, const reference::Row& a, Key b,
                               std::int64_t dim, double scale, const Arithmetic& arithmetic,
                               double given_error = 0.0) {
  double worst = 0.0;
  for (std::size_t t = 0; t < scores.size(); ++t) {
    if (!std::isfinite(scores[t])) continue;
    // The dot product and its scaling; then the change of base and the subtraction of the maximum.
    worst = std::max(worst, gamma(static_cast<double>(dim) + 2, arithmetic) * std::fabs(scale) *
                                    magnitude_dot(a, b(t), dim) +
                                4 * kU * std::fabs(scores[t]));
  }
  const auto n = static_cast<double>(scores.size());
  // Both the score's error and the maximum's, in the exponential and in the sum.
  const double of_exp = std::expm1(std::min(2 * worst + given_error, 1.0)) + 1.01 * arithmetic.exp;
  const double relative = (2 * of_exp + gamma(n + 4, arithmetic)) * 1.1;
  return {reference::softmax(scores), of_exp > 0.1 ? reference::kInfinity : relative};
}

/// A given lse is rounded to f32, and so are its change to base 2 and that constant.
double lse_error(const IndexerKlBackward& args, std::int64_t row, std::int64_t head) {
  const double lse = args.lse.given() ? core::load(args.lse, row, head) : 0.0;
  return std::isfinite(lse) ? 4 * kU * std::fabs(lse) : 0.0;
}

/// Of sum(dO O), where O is rounded as the forward pass stores it.
double error_from_out(const SparseAttentionBackward& args, const core::Sequence& sequence,
                      std::int64_t r, const std::vector<std::int64_t>& T,
                      const std::vector<double>& P, const reference::Row& dO,
                      const Arithmetic& arithmetic) {
  const std::int64_t dim = args.problem.head_dim;
  std::vector<double> O(static_cast<std::size_t>(dim), 0.0);
  for (std::size_t t = 0; t < T.size(); ++t) {
    const reference::Row v = reference::row_of(args.v, sequence.k_begin + T[t], r);
    for (std::int64_t d = 0; d < dim; ++d) O[static_cast<std::size_t>(d)] += P[t] * v[d];
  }
  double error = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) {
    const double terms = arithmetic.out + gamma(static_cast<double>(dim) + 2, arithmetic);
    error += std::fabs(dO[d]) *
             (terms * std::fabs(O[static_cast<std::size_t>(d)]) + arithmetic.small_probability);
  }
  return error;
}

/// Products with an infinite bound: 0 times it is 0, for what does not depend on it.
double times(double factor, double bound) { return factor == 0.0 ? 0.0 : factor * bound; }

}  // namespace

/// With S, P, dP, delta and dS as in the reference and B[t] = sum |dO V[t]|: dP errs by its own
/// sum, delta by that of P, of dP and of its sum, dS by all of them, and the gradients by those of
/// their factors and of their own sums. Probabilities and dS that are rounded to 16 bits before
/// they multiply err by arithmetic.probability as well, and dS by the same of itself. A backend
/// that reads lse and out has P = exp(S - lse), with lse rounded to f32 twice (as it is stored, and
/// in base 2), and delta = sum(dO O), with the rounding of O and the error of that sum.
AttentionGradientBounds gradient_bounds(const SparseAttentionBackward& args,
                                        const Arithmetic& arithmetic) {
  const Problem& problem = args.problem;
  const core::Sequences sequences(args);
  const double scale = reference::scale_or_default(args.softmax_scale, problem.head_dim);
  const auto dim = static_cast<std::size_t>(problem.head_dim);
  const auto steps = static_cast<double>(dim) + 2;
  AttentionGradientBounds bounds;
  bounds.dq.resize(static_cast<std::size_t>(args.dq.num_elements()), 0.0);
  bounds.dk.resize(static_cast<std::size_t>(args.dk.num_elements()), 0.0);
  bounds.dv.resize(bounds.dk.size(), 0.0);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    // Terms of a key's sums, at most: every query and head of the group.
    const auto rows = static_cast<double>(sequence.q_len * problem.group_size());
    for (std::int64_t i = 0; i < sequence.q_len; ++i) {
      for (std::int64_t h = 0; h < problem.num_q_heads; ++h) {
        const std::int64_t r = h / problem.group_size();
        const std::int64_t row = sequence.q_begin + i;
        const reference::Row q = reference::row_of(args.q, row, h);
        const reference::Row dO = reference::row_of(args.dout, row, h);
        const std::vector<std::int64_t> T = reference::support(args, sequence, r, i);
        const auto key = [&](std::size_t t) {
          return reference::row_of(args.k, sequence.k_begin + T[t], r);
        };
        const std::vector<double> S = reference::attention_scores(args, sequence, h, i, T);
        auto [P, relative] = probabilities_of(S, q, key, problem.head_dim, scale, arithmetic);
        std::vector<double> dP;
        std::vector<double> dP_error;
        double delta = 0.0;
        double delta_error = 0.0;
        if (arithmetic.out > 0.0) {
          const double lse = std::fabs(reference::log_sum_exp(S));
          if (std::isfinite(lse)) relative += 3 * kU * lse;
          delta_error = error_from_out(args, sequence, r, T, P, dO, arithmetic);
        }
        for (std::size_t t = 0; t < T.size(); ++t) {
          const reference::Row v = reference::row_of(args.v, sequence.k_begin + T[t], r);
          dP.push_back(reference::dot(dO, v, problem.head_dim));
          const double magnitude = magnitude_dot(dO, v, problem.head_dim);
          dP_error.push_back(gamma(steps, arithmetic) * magnitude);
          delta += P[t] * dP[t];
          delta_error += times(P[t] * std::fabs(dP[t]),
                               relative + gamma(static_cast<double>(T.size()) + 4, arithmetic)) +
                         P[t] * dP_error[t] + 0x1p-126 * magnitude;
        }
        for (std::size_t t = 0; t < T.size(); ++t) {
          const double dS = P[t] * (dP[t] - delta);
          // Flushed powers of two below f32's normal numbers are the last term of each.
          const double p_error = times(P[t], relative) + 0x1p-126;
          const double dS_error = times(std::fabs(dP[t] - delta), p_error) +
                                  times(P[t], dP_error[t] + delta_error) +
                                  2 * kU * P[t] * (std::fabs(dP[t]) + std::fabs(delta));
          const double dS_used =
              dS_error + arithmetic.probability * std::fabs(dS) + arithmetic.small_probability;
          const double p_used =
              p_error + arithmetic.probability * P[t] + arithmetic.small_probability;
          const reference::Row k = key(t);
          const auto q_at = static_cast<std::size_t>((row * problem.num_q_heads + h)) * dim;
          const auto k_at =
              static_cast<std::size_t>((sequence.k_begin + T[t]) * problem.num_kv_heads + r) * dim;
          const double of_q = gamma(static_cast<double>(T.size()) + 4, arithmetic);
          const double of_k = gamma(rows + 4, arithmetic);
          for (std::size_t d = 0; d < dim; ++d) {
            const double k_d = std::fabs(scale * k[static_cast<std::int64_t>(d)]);
            const double q_d = std::fabs(scale * q[static_cast<std::int64_t>(d)]);
            const double dO_d = std::fabs(dO[static_cast<std::int64_t>(d)]);
            bounds.dq[q_at + d] += times(k_d, dS_used) + of_q * std::fabs(dS) * k_d;
            bounds.dk[k_at + d] += times(q_d, dS_used) + of_k * std::fabs(dS) * q_d;
            bounds.dv[k_at + d] += times(dO_d, p_used) + of_k * P[t] * dO_d;
          }
        }
      }
    }
  }
  return bounds;
}

/// Teacher and student err as softmaxes do, the teacher by a given lse too, the mean over the group
/// by its own sum; a term P (log P - S_idx + lse) of the loss by P's error times 1 + |log P - log
/// P_idx|, which is its slope, and by the errors of its parts.
IndexGradientBounds gradient_bounds(const IndexerKlBackward& args, const Arithmetic& arithmetic) {
  const Problem& problem = args.problem;
  const core::Sequences sequences(args);
  const double softmax_scale = reference::scale_or_default(args.softmax_scale, problem.head_dim);
  const double scale = reference::scale_or_default(args.index_scale, problem.index_dim);
  const auto total_q = static_cast<double>(std::max<std::int64_t>(args.q.shape[0], 1));
  const double weight =
      std::fabs(static_cast<double>(args.loss_coefficient)) / (total_q * problem.num_kv_heads);
  const auto dim = static_cast<std::size_t>(problem.index_dim);
  const std::int64_t group = problem.group_size();
  IndexGradientBounds bounds;
  bounds.loss.resize(1, 0.0);
  bounds.dindex_q.resize(static_cast<std::size_t>(args.index_q.num_elements()), 0.0);
  bounds.dindex_k.resize(static_cast<std::size_t>(args.index_k.num_elements()), 0.0);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    const auto rows = static_cast<double>(sequence.q_len * problem.num_kv_heads);
    for (std::int64_t i = 0; i < sequence.q_len; ++i) {
      for (std::int64_t r = 0; r < problem.num_kv_heads; ++r) {
        const std::int64_t row = sequence.q_begin + i;
        const std::vector<std::int64_t> T = reference::support(args, sequence, r, i);
        std::vector<double> teacher(T.size(), 0.0);
        std::vector<double> teacher_error(T.size(), 0.0);
        for (std::int64_t h = r * group; h < (r + 1) * group; ++h) {
          const auto [P, relative] = probabilities_of(
              reference::attention_scores(args, sequence, h, i, T),
              reference::row_of(args.q, row, h),
              [&](std::size_t t) { return reference::row_of(args.k, sequence.k_begin + T[t], r); },
              problem.head_dim, softmax_scale, arithmetic, lse_error(args, row, h));
          for (std::size_t t = 0; t < T.size(); ++t) {
            const double share = P[t] / static_cast<double>(group);
            teacher[t] += share;
            teacher_error[t] +=
                times(share, relative + gamma(static_cast<double>(group) + 2, arithmetic)) +
                0x1p-126;
          }
        }
        const reference::Row q = reference::row_of(args.index_q, row, r);
        std::vector<double> S;
        double worst = 0.0;
        for (std::int64_t j : T) {
          const reference::Row k = reference::row_of(args.index_k, sequence.k_begin + j, 0);
          S.push_back(scale * reference::dot(q, k, problem.index_dim));
          const double error = gamma(static_cast<double>(dim) + 2, arithmetic) * scale *
                                   magnitude_dot(q, k, problem.index_dim) +
                               8 * kU * std::fabs(S.back());
          if (std::isfinite(error)) worst = std::max(worst, error);
        }
        const auto [student, relative] = probabilities_of(
            S, q,
            [&](std::size_t t) {
              return reference::row_of(args.index_k, sequence.k_begin + T[t], 0);
            },
            problem.index_dim, scale, arithmetic);
        const double lse = reference::log_sum_exp(S);
        const double of_lse = worst + relative + arithmetic.log + 8 * kU * (1 + std::fabs(lse));
        for (std::size_t t = 0; t < T.size(); ++t) {
          if (teacher[t] != 0.0) {
            const double log_teacher = std::log(teacher[t]);
            const double log_ratio = log_teacher - (S[t] - lse);
            bounds.loss[0] +=
                weight *
                (times(teacher_error[t], 1 + std::fabs(log_ratio)) +
                 times(teacher[t], of_lse + worst + arithmetic.log +
                                       8 * kU * (1 + std::fabs(log_teacher) + std::fabs(S[t])) +
                                       gamma(static_cast<double>(T.size()) + 4, arithmetic) *
                                           std::fabs(log_ratio)));
          }
          const double dS = student[t] - teacher[t];
          const double dS_error = times(student[t], relative) + teacher_error[t] + 0x1p-126 +
                                  2 * kU * (student[t] + teacher[t]);
          const double dS_used =
              dS_error + arithmetic.probability * std::fabs(dS) + arithmetic.small_probability;
          const reference::Row k = reference::row_of(args.index_k, sequence.k_begin + T[t], 0);
          const auto q_at = static_cast<std::size_t>(row * problem.num_kv_heads + r) * dim;
          const auto k_at = static_cast<std::size_t>(sequence.k_begin + T[t]) * dim;
          const double of_q = gamma(static_cast<double>(T.size()) + 6, arithmetic);
          const double of_k = gamma(rows + 6, arithmetic);
          for (std::size_t d = 0; d < dim; ++d) {
            const double k_d = weight * scale * std::fabs(k[static_cast<std::int64_t>(d)]);
            const double q_d = weight * scale * std::fabs(q[static_cast<std::int64_t>(d)]);
            bounds.dindex_q[q_at + d] += times(k_d, dS_used) + of_q * std::fabs(dS) * k_d;
            bounds.dindex_k[k_at + d] += times(q_d, dS_used) + of_k * std::fabs(dS) * q_d;
          }
        }
      }
    }
  }
  return bounds;
}

}  // namespace msa::testing
