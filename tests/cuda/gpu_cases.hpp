// SPDX-License-Identifier: Apache-2.0
//
// The cases of the GPU tests: the shared table as it stands, the same geometries in shapes that
// tensor-core kernels take, and larger ones aimed at how those kernels cut their work.
#pragma once

#include <vector>

#include "tests/cases.hpp"

namespace msa::testing {

/// From all_cases(): 16-bit tensors, blocks of 64 tokens in place of 16 with all lengths scaled,
/// strides that TMA can take.
std::vector<Case> scaled_cases();

/// M3 shapes and every group size, head_dim, block_size and top_k that issue 4 promises. Too large
/// to be judged by the reference in every row.
std::vector<Case> large_cases();

/// Scaled and large cases with e4m3 k, v, index_q and index_k; q stays of 16 bits.
std::vector<Case> fp8_cases();

/// For the backward operations: M3's shape and others that only they can tell apart, few tokens,
/// since the reference judges every row.
std::vector<Case> gradient_cases();

/// For the index operations alone: enough rows for the clusters of sm90 whose CTAs share keys.
std::vector<Case> cluster_cases();

/// For the indexer of decode alone: rows of more blocks than one round of its selection takes,
/// more rows than one pass over the keys, requests longer than the rest.
std::vector<Case> decode_index_cases();

}  // namespace msa::testing
