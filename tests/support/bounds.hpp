// SPDX-License-Identifier: Apache-2.0
//
// How far an implementation that accumulates in f32 may be from the reference, derived from the
// inputs, and the comparison that uses it.
#pragma once

#include <string>
#include <vector>

#include "msa/ops.hpp"

namespace msa::testing {

/// Spacing of the format relative to a number of its normal range: 2^-7 for bf16.
double ulp(DType dtype);

/// How an implementation computes; the default is f32, every operation rounded to nearest.
struct Arithmetic {
  /// Relative error that one term of a sum adds, to the sum of magnitudes.
  double step = 0x1p-24;
  /// Relative error of exp and absolute error of log (those that are not rounded operations).
  double exp = 8 * 0x1p-24;
  double log = 0.0;
  /// Rounding of the probabilities before they multiply V: relative, and absolute for those below
  /// the format's normal range.
  double probability = 0.0;
  double small_probability = 0.0;
  /// Rounding of `out` as the forward pass stored it, relative, where gradients are computed from
  /// it and from lse; 0 where they are not read.
  double out = 0.0;
  /// Products of e4m3 are summed by Hopper's tensor cores.
  bool e4m3_sums = false;
};

/// That of a backend for V of a dtype.
Arithmetic arithmetic_of(const std::string& backend, DType dtype);
/// That of its index operations, for keys of key_dtype.
Arithmetic index_arithmetic_of(const std::string& backend, DType dtype, DType key_dtype);

/// For each element of block_scores, row-major: the error of scores accumulated in f32.
std::vector<double> score_bounds(const IndexerScores& args, const Arithmetic& arithmetic = {});
std::vector<double> score_bounds(const Indexer& args, std::int64_t num_blocks,
                                 const Arithmetic& arithmetic = {});

/// For each element of out and of lse, row-major.
struct AttentionBounds {
  std::vector<double> out;
  std::vector<double> lse;
};
AttentionBounds attention_bounds(const SparseAttentionForward& args,
                                 const Arithmetic& arithmetic = {});
AttentionBounds attention_bounds(const DenseAttentionForward& args,
                                 const Arithmetic& arithmetic = {});

/// The largest error seen, and the first element that broke the rule.
struct Comparison {
  double max_error = 0.0;  ///< over finite elements
  double max_ratio = 0.0;  ///< of error to allowance; above 1 is a failure
  std::string failure{};   ///< "" where all elements pass
};

/// Infinities and NaN must match exactly; elsewhere
/// |x - reference| <= allowance + bound[i] + ulp(x's dtype) * |reference|.
/// `reference` is f64 and of x's shape.
Comparison compare(const char* name, const TensorView& x, const TensorView& reference,
                   const std::vector<double>& bound, double allowance);

/// max |emulated - reference| over finite elements.
double max_difference(const TensorView& emulated, const TensorView& reference);

/// "" or why block_ids is no top-k selection of `scores` (row-major [num_kv_heads, total_q,
/// num_blocks]) known up to `band`: ascending, unique, visible, forced blocks in, slots filled, and
/// no block left out whose score beats a selected one's by more than both bands. A band of 0 on
/// both sides decides ties: to the lowest id.
std::string check_selection(const Indexer& args, const std::vector<double>& scores,
                            const std::vector<double>& band, std::int64_t num_blocks);

}  // namespace msa::testing
