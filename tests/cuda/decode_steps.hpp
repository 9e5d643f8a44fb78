// SPDX-License-Identifier: Apache-2.0
//
// What an engine's scheduler and projections do between two steps of a decode loop, as kernels:
// they can be part of a captured graph, and every value follows from the seed and the step counter
// in GPU memory alone.
#pragma once

#include <cstdint>

#include "msa/ops.hpp"

namespace msa::testing {

/// Arrays in GPU memory.
struct LoopState {
  std::int32_t* step;          ///< [1]
  std::int32_t* cu_seqlens_q;  ///< [batch_size + 1]
  std::int32_t* seq_lens_k;    ///< [batch_size]
  std::int32_t* page_table;    ///< [batch_size, max_pages]
  const std::int32_t* pages;   ///< [batch_size, max_pages]: the page that each block will have
  const std::int32_t* counts;  ///< [batch_size] query tokens; they move on by one request a step
  int batch_size;
  int max_pages;
  int block_size;
};

/// Counts the step, gives each request its query tokens and makes its length longer by them. Page
/// table entries that a length has not reached name no page.
void advance(const LoopState& state, Stream stream);

/// bf16 values in [-1, 1) of this step's tokens, from the seed.
void fill_tokens(const TensorView& tensor, const std::int32_t* step, std::uint32_t seed,
                 Stream stream);

/// digest[i] becomes a mix of itself and 32 bits of the tensor's element i (rows of 4 bytes).
void mix_into(const TensorView& tensor, std::uint32_t* digest, Stream stream);

}  // namespace msa::testing
