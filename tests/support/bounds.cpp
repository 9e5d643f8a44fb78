// SPDX-License-Identifier: Apache-2.0
#include "tests/support/bounds.hpp"

#include <algorithm>
#include <cmath>

#include "core/check.hpp"
#include "reference/support.hpp"
#include "tests/support/device.hpp"
#include "tests/support/guarded_tensor.hpp"

namespace msa::testing {
namespace {

// Unit roundoff of f32. A sum of n products in any order, each operation rounded, is within
// n * u / (1 - n * u) of the exact one, relative to the sum of magnitudes; 1.01 * n * u covers the
// denominator for n below 10^5.
constexpr double kU = 0x1p-24;
double gamma(double n, const Arithmetic& arithmetic) { return 1.01 * n * arithmetic.step; }

// Rounded operations beside sums: scaling a score, the change to base 2, the subtraction of the
// maximum (each relative to the score).
constexpr double kScoreSteps = 4.0;

double magnitude_dot(const reference::Row& a, const reference::Row& b, std::int64_t dim) {
  double sum = 0.0;
  for (std::int64_t d = 0; d < dim; ++d) sum += std::fabs(a[d] * b[d]);
  return sum;
}

/// Error of a sum of e4m3 products in Hopper's tensor cores: docs/numerics.md. In steps of 32 the
/// products and the sum so far are cut at 2^-12 of the largest of them (one bit less than was
/// measured), 33 times, and the new sum likewise.
double e4m3_error(const reference::Row& a, const reference::Row& b, std::int64_t dim) {
  constexpr std::int64_t kStep = 32;
  constexpr std::int64_t kPadded = 128;  // a kernel may fill the dimension up with zeros
  double sum = 0.0;
  double error = 0.0;
  for (std::int64_t first = 0; first < std::max(dim, kPadded); first += kStep) {
    double largest = std::fabs(sum) + error;
    for (std::int64_t d = first; d < std::min(first + kStep, dim); ++d) {
      sum += a[d] * b[d];
      largest = std::max(largest, std::fabs(a[d] * b[d]));
    }
    error += 33 * 0x1p-12 * largest;
    error += 0x1p-12 * (std::fabs(sum) + error);
  }
  return error;
}

/// Error of one score: the dot product's and its scaling's.
double score_error(const reference::Row& a, const reference::Row& b, std::int64_t dim, double scale,
                   const Arithmetic& arithmetic) {
  const double error =
      gamma(static_cast<double>(dim) + 2, arithmetic) * std::fabs(scale) * magnitude_dot(a, b, dim);
  const double of_e4m3 = arithmetic.e4m3_sums ? std::fabs(scale) * e4m3_error(a, b, dim) : 0.0;
  // An infinite or NaN score is what it is in f32 too.
  if (!std::isfinite(error + of_e4m3)) return 0.0;
  return error + of_e4m3;
}

template <class Args>
std::vector<double> score_bounds_of(const Args& args, float index_scale, std::int64_t num_blocks,
                                    const Arithmetic& arithmetic) {
  const Problem& p = args.problem;
  const double scale = reference::scale_or_default(index_scale, p.index_dim);
  const core::Sequences sequences(args);
  const std::int64_t total_q = args.index_q.shape[0];
  std::vector<double> bounds(static_cast<std::size_t>(p.num_kv_heads * total_q * num_blocks), 0.0);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    for (std::int64_t i = 0; i < sequence.q_len; ++i) {
      const std::int64_t row = sequence.q_begin + i;
      for (std::int64_t r = 0; r < p.num_kv_heads; ++r) {
        const reference::Row q = reference::row_of(args.index_q, row, r);
        for (std::int64_t b = 0; b * p.block_size <= sequence.position(i); ++b) {
          std::vector<std::int64_t> tokens;
          reference::append_visible(tokens, args.index_k, args.batch, p.block_size, sequence,
                                    sequence.position(i), b);
          // A maximum moves by no more than its largest candidate error.
          double& bound = bounds[static_cast<std::size_t>((r * total_q + row) * num_blocks + b)];
          for (std::int64_t j : tokens) {
            const reference::Row k =
                reference::token_row(args.index_k, args.batch, p.block_size, sequence, 0, j);
            bound = std::max(bound, score_error(q, k, p.index_dim, scale, arithmetic));
          }
        }
      }
    }
  }
  return bounds;
}

/// The bounds of one row and head. With S the exact scores, m their maximum, p = exp(S - m), and e
/// the error of S[j] - m: the kernel's p lies within p_low = exp(S - m - e) and p_high = exp(S - m
/// + e) (relative arithmetic.exp), so numerator and denominator move by at most the sums below; the
/// quotient follows. A rounded probability moves its product with V, not the sum.
template <class Args>
void bound_row(const Args& args, const core::Sequence& sequence, std::int64_t i, std::int64_t h,
               const Arithmetic& arithmetic, AttentionBounds& bounds) {
  const Problem& p = args.problem;
  const std::int64_t r = h / p.group_size();
  const std::int64_t row = sequence.q_begin + i;
  const std::vector<std::int64_t> T = reference::support(args, sequence, r, i);
  const auto stat = static_cast<std::size_t>(row * p.num_q_heads + h);
  if (T.empty()) return;
  const std::vector<double> S = reference::attention_scores(args, sequence, h, i, T);
  const double m = reference::max_of(S);
  const double scale = reference::scale_or_default(args.softmax_scale, p.head_dim) *
                       reference::head_scale(args.k_scale, r);
  const double v_scale = reference::head_scale(args.v_scale, r);
  const reference::Row q = reference::row_of(args.q, row, h);
  std::vector<double> errors;
  std::size_t best = 0;
  for (std::size_t t = 0; t < T.size(); ++t) {
    const reference::Row k =
        reference::token_row(args.k, args.batch, p.block_size, sequence, r, T[t]);
    const double magnitude = std::isfinite(S[t]) ? std::fabs(S[t]) : 0.0;
    errors.push_back(score_error(q, k, p.head_dim, scale, arithmetic) +
                     kScoreSteps * kU * magnitude);
    if (S[t] == m) best = t;
  }
  const double n = static_cast<double>(T.size());
  double sum = 0.0;
  double sum_error = 0.0;
  std::vector<double> probability;
  std::vector<double> probability_error;
  for (std::size_t t = 0; t < T.size(); ++t) {
    const double value = reference::weight(S[t], m);
    // The maximum's own distance to itself is 0 in f32 too; all others move with both errors.
    const double e = t == best ? 0.0 : errors[t] + errors[best];
    const double high = std::exp(std::min(S[t] - m + e, 300.0));
    // f32 flushes what is below its smallest normal number.
    double error = S[t] == -reference::kInfinity ? 0.0 : high - value + 0x1p-126;
    error += (1.01 * arithmetic.exp + gamma(n, arithmetic)) * value;
    probability.push_back(value);
    probability_error.push_back(error);
    sum += value;
    sum_error += error;
  }
  if (sum == 0.0) return;
  const double rest = std::max(sum - sum_error, 0x1p-126);
  const auto dim = static_cast<std::size_t>(p.head_dim);
  std::vector<double> out(dim, 0.0);
  std::vector<double> out_error(dim, 0.0);
  const double product_error = gamma(n, arithmetic) + arithmetic.probability;
  for (std::size_t t = 0; t < T.size(); ++t) {
    const reference::Row v =
        reference::token_row(args.v, args.batch, p.block_size, sequence, r, T[t]);
    const double error = probability_error[t] + product_error * probability[t] +
                         (probability[t] > 0.0 ? arithmetic.small_probability : 0.0);
    for (std::size_t d = 0; d < dim; ++d) {
      const double value = v_scale * v[static_cast<std::int64_t>(d)];
      out[d] += probability[t] * value;
      out_error[d] += error * std::fabs(value);
    }
  }
  for (std::size_t d = 0; d < dim; ++d) {
    // Three more roundings: the reciprocal of the sum, its product, and that with the scale of V.
    const double quotient = std::fabs(out[d] / sum);
    bounds.out[stat * dim + d] = (out_error[d] + quotient * sum_error) / rest + 3 * kU * quotient;
  }
  const double worst = *std::max_element(errors.begin(), errors.end());
  const double lse = std::fabs(m + std::log(sum));
  // log(sum of exp) moves no more than its scores do; then the sum, the log and the change of base.
  bounds.lse[stat] = worst + 1.01 * arithmetic.exp + gamma(n, arithmetic) + arithmetic.log +
                     kScoreSteps * kU * (1 + std::log(n) + lse);
}

template <class Args>
AttentionBounds attention_bounds_of(const Args& args, const Arithmetic& arithmetic) {
  const core::Sequences sequences(args);
  AttentionBounds bounds;
  bounds.out.resize(static_cast<std::size_t>(args.out.num_elements()), 0.0);
  bounds.lse.resize(static_cast<std::size_t>(args.q.shape[0] * args.q.shape[1]), 0.0);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    for (std::int64_t i = 0; i < sequences[n].q_len; ++i) {
      for (std::int64_t h = 0; h < args.problem.num_q_heads; ++h) {
        bound_row(args, sequences[n], i, h, arithmetic, bounds);
      }
    }
  }
  return bounds;
}

/// Smallest positive number that a kernel must tell from 0.
double smallest(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 0.0;
    case DType::f16:
      return 0x1p-24;
    default:
      return 0x1p-126;  // subnormal f32 and bf16 may be flushed
  }
}

}  // namespace

double ulp(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 0x1p-52;
    case DType::f32:
      return 0x1p-23;
    case DType::f16:
      return 0x1p-10;
    case DType::bf16:
      return 0x1p-7;
    case DType::e4m3:
      return 0x1p-3;
    case DType::i8:
    case DType::i32:
      return 0.0;
  }
  return 0.0;
}

Arithmetic arithmetic_of(const std::string& backend, DType dtype) {
  if (!runs_on_device(backend)) return {};
  // A tensor core adds 16 products and the running sum in one step (k = 16): it aligns them to the
  // largest, cuts each below 24 bits, and cuts the result: 18 errors of at most 2^-23 per 16 terms.
  // Sums on ordinary cores, and the rare rescaling of a running sum, are within that too.
  // ex2.approx and lg2.approx are within 2^-22 (PTX ISA).
  Arithmetic arithmetic{
      .step = 18.0 / 16.0 * 0x1p-23, .exp = 0x1p-22, .log = 0x1p-22, .out = 0x1p-24};
  if (dtype == DType::bf16) arithmetic.probability = arithmetic.out = 0x1p-8;
  if (dtype == DType::f16) {
    arithmetic.probability = arithmetic.out = 0x1p-11;
    arithmetic.small_probability = 0x1p-25;
  }
  return arithmetic;
}

Arithmetic index_arithmetic_of(const std::string& backend, DType dtype, DType key_dtype) {
  Arithmetic arithmetic = arithmetic_of(backend, dtype);
  // cuda_generic widens e4m3 to 16 bits first.
  arithmetic.e4m3_sums = backend == "cuda_sm90" && key_dtype == DType::e4m3;
  return arithmetic;
}

std::vector<double> score_bounds(const IndexerScores& args, const Arithmetic& arithmetic) {
  return score_bounds_of(args, args.index_scale, args.block_scores.shape[2], arithmetic);
}

std::vector<double> score_bounds(const Indexer& args, std::int64_t num_blocks,
                                 const Arithmetic& arithmetic) {
  return score_bounds_of(args, 0.0f, num_blocks, arithmetic);
}

AttentionBounds attention_bounds(const SparseAttentionForward& args, const Arithmetic& arithmetic) {
  return attention_bounds_of(args, arithmetic);
}
AttentionBounds attention_bounds(const DenseAttentionForward& args, const Arithmetic& arithmetic) {
  return attention_bounds_of(args, arithmetic);
}

double max_difference(const TensorView& emulated, const TensorView& reference) {
  const std::vector<double> a = values_of(emulated);
  const std::vector<double> b = values_of(reference);
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (std::isfinite(a[i]) && std::isfinite(b[i])) {
      largest = std::max(largest, std::fabs(a[i] - b[i]));
    }
  }
  return largest;
}

Comparison compare(const char* name, const TensorView& x, const TensorView& reference,
                   const std::vector<double>& bound, double allowance) {
  Comparison result;
  const std::vector<double> expected = values_of(reference);
  std::size_t next = 0;
  for_each_index(x, [&](const auto& indices) {
    const std::size_t i = next++;
    const double actual = core::load_element(core::address_at(x, offset_at(x, indices)), x.dtype);
    bool pass = true;
    double allowed = 0.0;
    if (!std::isfinite(expected[i])) {
      pass = std::isnan(expected[i]) ? std::isnan(actual) : actual == expected[i];
    } else {
      allowed = allowance + bound[i] + ulp(x.dtype) * std::fabs(expected[i]) + smallest(x.dtype);
      const double error = std::fabs(actual - expected[i]);
      pass = error <= allowed;  // false for NaN
      if (std::isfinite(error)) {
        result.max_error = std::max(result.max_error, error);
        if (allowed > 0) result.max_ratio = std::max(result.max_ratio, error / allowed);
      }
    }
    if (pass || !result.failure.empty()) return;
    result.failure = core::concat(name, "[");
    for (int axis = 0; axis < x.rank; ++axis) {
      result.failure +=
          core::concat(axis == 0 ? "" : ", ", indices[static_cast<std::size_t>(axis)]);
    }
    result.failure += core::concat("] is ", actual, ", the reference is ", expected[i],
                                   ", allowed difference ", allowed);
  });
  return result;
}

std::string check_selection(const Indexer& args, const std::vector<double>& scores,
                            const std::vector<double>& band, std::int64_t num_blocks) {
  const Problem& p = args.problem;
  const core::Sequences sequences(args);
  const std::int64_t total_q = args.index_q.shape[0];
  for (std::int64_t row = 0; row < total_q; ++row) {
    const core::Sequence sequence = sequences.of_query(row);
    const std::int64_t position = sequence.position(row - sequence.q_begin);
    const std::int64_t visible = position < 0 ? 0 : position / p.block_size + 1;
    const std::int64_t count = std::min<std::int64_t>(visible, p.top_k);
    for (std::int64_t r = 0; r < p.num_kv_heads; ++r) {
      const std::string where = core::concat("block_ids[", r, ", ", row, "]");
      std::vector<bool> selected(static_cast<std::size_t>(visible), false);
      std::int64_t previous = -1;
      for (std::int64_t slot = 0; slot < p.top_k; ++slot) {
        const std::int32_t id = core::load_i32(args.block_ids, r, row, slot);
        if (slot >= count) {
          if (id != -1) return core::concat(where, " slot ", slot, " is ", id, ", expected -1");
          continue;
        }
        if (id <= previous || id >= visible) {
          return core::concat(where, " slot ", slot, " is ", id, " after ", previous, " of ",
                              visible, " visible blocks");
        }
        selected[static_cast<std::size_t>(id)] = true;
        previous = id;
      }
      const std::size_t first = static_cast<std::size_t>((r * total_q + row) * num_blocks);
      for (std::int64_t b = 0; b < visible; ++b) {
        const auto out = static_cast<std::size_t>(b);
        if (selected[out]) continue;
        if (b < p.num_init_blocks || b >= visible - p.num_local_blocks) {
          return core::concat(where, " lacks the forced block ", b);
        }
        for (std::int64_t c = p.num_init_blocks; c < visible - p.num_local_blocks; ++c) {
          const auto in = static_cast<std::size_t>(c);
          if (!selected[in]) continue;
          const double low = scores[first + out] - band[first + out];
          const double high = scores[first + in] + band[first + in];
          const bool exact = band[first + out] == 0 && band[first + in] == 0;
          if (low > high || (exact && low == high && b < c)) {
            return core::concat(where, " has block ", c, " (score ", scores[first + in],
                                ") but not block ", b, " (score ", scores[first + out], ")");
          }
        }
      }
    }
  }
  return "";
}

}  // namespace msa::testing
