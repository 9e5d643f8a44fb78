// SPDX-License-Identifier: Apache-2.0
//
// Block selections for attention benchmarks. A kernel tuned on one kind of selection mis-ranks
// designs, so every attention figure names its family and the overlap that was measured.
#pragma once

#include <cstdint>
#include <vector>

#include "msa/ops.hpp"

namespace msa::bench {

/// For each KV head: u[i] ~ N(0,1) fixed per block, w_t = rho w_{t-1} + sqrt(1-rho^2) N(0,1); the
/// score of block i for token t is a u[i] + sqrt(1-a^2) w_t[i].
struct SelectionFamily {
  const char* name;
  double a;
  double rho;
};

inline constexpr SelectionFamily kRealLike{"real-like", 0.7, 0.9787};  // as on a live M3 server
inline constexpr SelectionFamily kWeak{"weak", 0.7, 0.80};
inline constexpr SelectionFamily kRandom{"random", 0.0, 0.0};

struct Selection {
  std::vector<std::int32_t> block_ids;  ///< [num_kv_heads, seq_len_q, top_k], ascending, -1 tail
  double overlap4 =
      0.0;  ///< distinct blocks of 4 neighbouring tokens / blocks of one; 1: all shared
};

/// The last seq_len_q tokens of a sequence of seq_len_k: each takes its own block and the best
/// top_k - 1 before it.
Selection make_selection(const SelectionFamily& family, const Problem& problem,
                         std::int64_t seq_len_q, std::int64_t seq_len_k, std::uint64_t seed);

}  // namespace msa::bench
