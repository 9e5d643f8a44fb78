// SPDX-License-Identifier: Apache-2.0
//
// How far gradients that are computed in f32 may be from the reference's, derived from the inputs.
#pragma once

#include <vector>

#include "tests/support/bounds.hpp"

namespace msa::testing {

/// For each element, row-major. Infinite where scores are so large that their error moves a
/// probability by more than a tenth: the bound says nothing there.
struct AttentionGradientBounds {
  std::vector<double> dq;
  std::vector<double> dk;
  std::vector<double> dv;
};
AttentionGradientBounds gradient_bounds(const SparseAttentionBackward& args,
                                        const Arithmetic& arithmetic = {});

struct IndexGradientBounds {
  std::vector<double> loss;  ///< one
  std::vector<double> dindex_q;
  std::vector<double> dindex_k;
};
IndexGradientBounds gradient_bounds(const IndexerKlBackward& args,
                                    const Arithmetic& arithmetic = {});

}  // namespace msa::testing
