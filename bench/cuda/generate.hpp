// SPDX-License-Identifier: Apache-2.0
//
// Inputs of the GPU benchmarks, made in GPU memory: a prompt of a million tokens has 17 GB of
// queries. All values follow from the seed and their place alone.
#pragma once

#include "bench/cuda/memory.hpp"
#include "bench/selection.hpp"

namespace msa::bench {

/// Independent N(0, 1); bf16 or e4m3.
void fill_normal(const DeviceTensor& tensor, std::uint64_t seed);

/// index_q [tokens, heads, dim] whose directions follow the family from token to token:
/// q_t = a u + sqrt(1 - a^2) w_t, w_t = rho w_(t-1) + sqrt(1 - rho^2) N(0, 1), in runs of
/// kRunTokens that each begin with a fresh w.
void fill_index_queries(const DeviceTensor& index_q, const SelectionFamily& family,
                        std::uint64_t seed);

/// index_k [pages, 1, block_size, dim]: keys of one page share a direction with weight 0.9 where
/// the family has a fixed part, as in bench/op_inputs.cpp.
void fill_index_keys(const DeviceTensor& index_k, const SelectionFamily& family,
                     std::uint64_t seed);

/// i32 [1, pages]: a random permutation.
void fill_page_table(const DeviceTensor& page_table, std::uint64_t seed);

inline constexpr int kRunTokens = 512;

/// block_ids [heads, seq_len_q, top_k] of the last seq_len_q tokens of seq_len_k, as
/// make_selection() in bench/selection.hpp has them, but in runs of kRunTokens tokens.
void fill_selection(const DeviceTensor& block_ids, const SelectionFamily& family,
                    const Problem& problem, std::int64_t seq_len_k, std::uint64_t seed);

/// What a selection asks for.
struct SelectionFacts {
  double attended_tokens = 0.0;  ///< summed over queries and KV heads
  double overlap2 = 0.0;  ///< distinct blocks of 2 neighbouring tokens over the blocks of one
  double overlap4 = 0.0;
  double overlap8 = 0.0;
};
SelectionFacts facts_of(const DeviceTensor& block_ids, const Problem& problem,
                        std::int64_t seq_len_k);

}  // namespace msa::bench
