// SPDX-License-Identifier: Apache-2.0
#include "tests/support/judge.hpp"

#include <algorithm>
#include <cmath>

#include "core/check.hpp"
#include "core/sequences.hpp"
#include "reference/reference.hpp"

namespace msa::testing {
namespace {

void take(Verdict& verdict, const Comparison& comparison) {
  verdict.max_error = std::max(verdict.max_error, comparison.max_error);
  verdict.max_ratio = std::max(verdict.max_ratio, comparison.max_ratio);
  if (verdict.failure.empty()) verdict.failure = comparison.failure;
}

/// A contiguous tensor of the shape of `view`.
core::Tensor like(const TensorView& view, DType dtype) {
  switch (view.rank) {
    case 2:
      return {dtype, {view.shape[0], view.shape[1]}};
    case 3:
      return {dtype, {view.shape[0], view.shape[1], view.shape[2]}};
    default:
      return {dtype, {view.shape[0], view.shape[1], view.shape[2], view.shape[3]}};
  }
}

/// Sums of small integers and zeros are exact in f32, so the ids are known exactly.
bool has_exact_scores(const Case& spec) {
  return spec.values == Values::ties || spec.values == Values::zeros;
}

core::Tensor exact_scores(const Indexer& args, std::int64_t num_blocks, bool by_cpu) {
  core::Tensor scores(by_cpu ? DType::f32 : DType::f64,
                      {args.problem.num_kv_heads, args.index_q.shape[0], num_blocks});
  const IndexerScores request{.problem = args.problem,
                              .batch = args.batch,
                              .index_q = args.index_q,
                              .index_k = args.index_k,
                              .block_scores = scores};
  if (!by_cpu) {
    reference::indexer_scores(request);
    return scores;
  }
  const auto plan = msa::plan(request, {.backend = "cpu"});
  const core::HostBuffer workspace(plan.workspace_bytes());
  plan.run(request, workspace.span());
  return scores;
}

/// Probabilities that a kernel rounds to f16 or bf16 before they multiply V are part of its budget:
/// on a GPU by a derived term of the bounds; on the CPU for bf16 by the emulation's distance from
/// the exact result, twice (house rule). f32 and f16 kernels of the CPU keep them in f32.
template <class Args, class Run>
Verdict judge_attention(const Case& spec, const Args& args, const Arithmetic& arithmetic, Run run) {
  const core::Tensor out = like(args.out, DType::f64);
  const core::Tensor lse = like(args.lse, DType::f64);
  Args exact = args;
  exact.out = out;
  exact.lse = lse;
  run(exact, reference::Rounding::exact);
  double allowance = 0.0;
  if (spec.dtype == DType::bf16 && arithmetic.probability == 0.0) {
    const core::Tensor rounded = like(args.out, spec.dtype);
    Args emulated = args;
    emulated.out = rounded;
    emulated.lse = {};
    run(emulated, reference::Rounding::bf16);
    allowance = 2.0 * max_difference(emulated.out, exact.out);
  }
  const AttentionBounds bounds = attention_bounds(args, arithmetic);
  Verdict verdict;
  take(verdict, compare("out", args.out, exact.out, bounds.out, allowance));
  take(verdict, compare("lse", args.lse, exact.lse, bounds.lse, 0.0));
  return verdict;
}

/// Largest finite ||row|| over all rows of the last axis.
double longest_row(const TensorView& view) {
  const std::int64_t dim = view.shape[static_cast<std::size_t>(view.rank - 1)];
  const std::vector<double> values = values_of(view);
  double longest = 0.0;
  for (std::size_t i = 0; i < values.size(); i += static_cast<std::size_t>(dim)) {
    double squares = 0.0;
    for (std::size_t d = 0; d < static_cast<std::size_t>(dim); ++d) {
      squares += values[i + d] * values[i + d];
    }
    if (std::isfinite(squares)) longest = std::max(longest, squares);
  }
  return std::sqrt(longest);
}

/// A bound on every score of each (row, head) of `q`, finite ones: Cauchy-Schwarz.
std::vector<double> largest_scores(const TensorView& q, const TensorView& k, double scale) {
  const double longest = longest_row(k);
  const std::vector<double> values = values_of(q);
  const auto dim = static_cast<std::size_t>(q.shape[2]);
  std::vector<double> scores(values.size() / dim);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    double squares = 0.0;
    for (std::size_t d = 0; d < dim; ++d) squares += values[i * dim + d] * values[i * dim + d];
    scores[i] = std::isfinite(squares) ? std::sqrt(squares) * longest * std::fabs(scale) : 0.0;
  }
  return scores;
}

/// Bounds of the scores of both arithmetics, [num_kv_heads, total_q, num_blocks].
template <class Args>
std::vector<double> score_band(const Args& args, float index_scale, const Arithmetic& arithmetic,
                               std::int64_t num_blocks) {
  const Problem& p = args.problem;
  const double scale =
      index_scale != 0.0f ? static_cast<double>(index_scale) : 1.0 / std::sqrt(p.index_dim);
  // [total_q, heads]; sum of |q_d k_d| <= ||q|| ||k||
  const std::vector<double> largest = largest_scores(args.index_q, args.index_k, scale);
  const double relative = 1.01 * (p.index_dim + 2) * (arithmetic.step + Arithmetic{}.step);
  const std::int64_t total_q = args.index_q.shape[0];
  std::vector<double> band(static_cast<std::size_t>(p.num_kv_heads * total_q * num_blocks));
  std::size_t next = 0;
  for (std::int64_t r = 0; r < p.num_kv_heads; ++r) {
    for (std::int64_t row = 0; row < total_q; ++row) {
      for (std::int64_t b = 0; b < num_blocks; ++b) {
        band[next++] = relative * largest[static_cast<std::size_t>(row * p.num_kv_heads + r)];
      }
    }
  }
  return band;
}

template <class Args>
void run_on_cpu(Args args) {
  const auto plan = msa::plan(args, {.backend = "cpu"});
  const core::HostBuffer workspace(plan.workspace_bytes());
  plan.run(args, workspace.span());
}

/// Tokens that one query can attend.
double most_tokens(const SparseAttentionForward& args) {
  return static_cast<double>(args.problem.top_k) * args.problem.block_size;
}
double most_tokens(const DenseAttentionForward& args) {
  return static_cast<double>(core::max_seq_len_k(args));
}

/// The bounds of bound_row() in bounds.cpp with the largest score in place of each, for both
/// arithmetics; sum(p |v|) / sum(p) is the CPU backend's output for |V|.
template <class Args>
Verdict judge_attention_by_cpu(const Args& args, const Arithmetic& arithmetic) {
  const Problem& p = args.problem;
  const core::Tensor out = like(args.out, args.out.dtype);
  const core::Tensor lse = like(args.lse, DType::f32);
  Args request = args;
  request.out = out;
  request.lse = lse;
  run_on_cpu(request);

  const core::Tensor magnitudes = like(args.v, args.v.dtype);
  std::vector<double> v = values_of(args.v);
  double largest_v = 0.0;
  for (double& element : v) {
    element = std::fabs(element);
    if (std::isfinite(element)) largest_v = std::max(largest_v, element);
  }
  set_values(magnitudes, v);
  const core::Tensor weighted = like(args.out, args.out.dtype);
  const core::Tensor unused = like(args.lse, DType::f32);
  request.v = magnitudes;
  request.out = weighted;
  request.lse = unused;
  run_on_cpu(request);

  Arithmetic cpu;  // which may round probabilities of bf16
  if (args.v.dtype == DType::bf16) cpu.probability = 0x1p-8;
  const double scale = args.softmax_scale != 0.0f ? static_cast<double>(args.softmax_scale)
                                                  : 1.0 / std::sqrt(p.head_dim);
  const std::vector<double> largest = largest_scores(args.q, args.k, scale);
  const std::vector<double> spread = values_of(weighted);
  const std::vector<double> expected_out = values_of(out);
  const std::vector<double> expected_lse = values_of(lse);
  const double n = most_tokens(args);
  std::vector<double> out_bound(spread.size(), 0.0);
  std::vector<double> lse_bound(expected_lse.size(), 0.0);
  const auto dim = static_cast<std::size_t>(p.head_dim);
  for (std::size_t row = 0; row < largest.size(); ++row) {
    for (const Arithmetic& each : {cpu, arithmetic}) {
      const double e =
          (1.01 * (p.head_dim + 2) * each.step + 4 * 0x1p-24) * largest[row];  // of one score
      const double of_sum = std::expm1(std::min(2 * e, 1.0)) + 1.01 * (each.exp + n * each.step);
      const bool says_nothing = 2 * e > 0.1;
      for (std::size_t d = row * dim; d < (row + 1) * dim; ++d) {
        // |V|'s result is rounded to the output's dtype, hence the 1.01; numerator and denominator
        // err by of_sum each, the products by their rounding.
        const double relative = 2 * of_sum + each.probability + 1.01 * n * each.step + 2 * 0x1p-24;
        out_bound[d] += 1.01 / (1 - std::min(of_sum, 0.5)) * relative * spread[d] +
                        n * each.small_probability * largest_v;
        // The other's rounding to the output's dtype; compare() adds this one's.
        if (&each != &arithmetic) out_bound[d] += ulp(args.out.dtype) * std::fabs(expected_out[d]);
        if (says_nothing) out_bound[d] = INFINITY;
      }
      lse_bound[row] +=
          e + of_sum + each.log + 4 * 0x1p-24 * (1 + std::log(n) + std::fabs(expected_lse[row]));
      if (says_nothing || !std::isfinite(lse_bound[row])) lse_bound[row] = INFINITY;
    }
  }
  Verdict verdict;
  take(verdict, compare("out (by cpu)", args.out, out, out_bound, 0.0));
  take(verdict, compare("lse (by cpu)", args.lse, lse, lse_bound, 0.0));
  return verdict;
}

}  // namespace

Verdict judge_by_reference(const Case&, const IndexerScores& args, const Arithmetic& arithmetic,
                           std::int64_t) {
  const core::Tensor scores = like(args.block_scores, DType::f64);
  IndexerScores exact = args;
  exact.block_scores = scores;
  reference::indexer_scores(exact);
  Verdict verdict;
  take(verdict,
       compare("block_scores", args.block_scores, scores, score_bounds(args, arithmetic), 0.0));
  return verdict;
}

Verdict judge_by_reference(const Case& spec, const Indexer& args, const Arithmetic& arithmetic,
                           std::int64_t num_blocks) {
  std::vector<double> band = score_bounds(args, num_blocks, arithmetic);
  if (has_exact_scores(spec)) std::fill(band.begin(), band.end(), 0.0);
  const core::Tensor scores = exact_scores(args, num_blocks, /*by_cpu=*/false);
  return {.failure = check_selection(args, values_of(scores), band, num_blocks)};
}

Verdict judge_by_reference(const Case& spec, const SparseAttentionForward& args,
                           const Arithmetic& arithmetic, std::int64_t) {
  return judge_attention(spec, args, arithmetic, reference::sparse_attention_forward);
}

Verdict judge_by_reference(const Case& spec, const DenseAttentionForward& args,
                           const Arithmetic& arithmetic, std::int64_t) {
  return judge_attention(spec, args, arithmetic, reference::dense_attention_forward);
}

Verdict judge_by_cpu(const Case&, const IndexerScores& args, const Arithmetic& arithmetic,
                     std::int64_t num_blocks) {
  const core::Tensor scores = like(args.block_scores, DType::f32);
  IndexerScores request = args;
  request.block_scores = scores;
  run_on_cpu(request);
  Verdict verdict;
  take(verdict, compare("block_scores (by cpu)", args.block_scores, scores,
                        score_band(args, args.index_scale, arithmetic, num_blocks), 0.0));
  return verdict;
}

Verdict judge_by_cpu(const Case& spec, const Indexer& args, const Arithmetic& arithmetic,
                     std::int64_t num_blocks) {
  std::vector<double> band = score_band(args, 0.0f, arithmetic, num_blocks);
  if (has_exact_scores(spec)) std::fill(band.begin(), band.end(), 0.0);
  const core::Tensor scores = exact_scores(args, num_blocks, /*by_cpu=*/true);
  std::string failure = check_selection(args, values_of(scores), band, num_blocks);
  if (!failure.empty()) failure += " (by cpu)";
  return {.failure = failure};
}

Verdict judge_by_cpu(const Case&, const SparseAttentionForward& args, const Arithmetic& arithmetic,
                     std::int64_t) {
  return judge_attention_by_cpu(args, arithmetic);
}

Verdict judge_by_cpu(const Case&, const DenseAttentionForward& args, const Arithmetic& arithmetic,
                     std::int64_t) {
  return judge_attention_by_cpu(args, arithmetic);
}

}  // namespace msa::testing
