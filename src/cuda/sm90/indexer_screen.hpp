// SPDX-License-Identifier: Apache-2.0
//
// Selection of decode with the int8 codes of the index keys: bounds of every block's score from 132
// bytes a key instead of 256, then exact scores of the blocks whose bounds do not rule them out.
#pragma once

#include "cuda/sm90/indexer_decode.hpp"

namespace msa::cuda::sm90 {

/// A block of a sequence that some row may select.
struct Survivor {
  int batch_idx;
  int block;
};

struct ScreenParams {
  DecodeScoreParams exact;  ///< its scores hold lower bounds first, exact scores in the end
  const std::byte* codes;
  std::int64_t codes_page_stride, codes_token_stride;  ///< bytes
  const std::byte* scales;
  std::int64_t scales_page_stride, scales_token_stride;  ///< bytes
  float* upper;                                          ///< as exact.scores
  std::uint32_t* seen;  ///< [batch_size][seen_words], a bit a block: it is a survivor
  std::int64_t seen_words;
  Survivor* survivors;  ///< [batch_size * num_columns]
  int* num_survivors;
};

/// Lower and upper bounds of the scores, for 128 dimensions; empties `seen` and the survivors.
void run_screen(const ScreenParams& params, DType dtype, int grid, cudaStream_t stream);
/// Survivors; the scores of all other blocks become -inf.
void run_screen_survivors(const ScreenParams& params, const DecodeSelectParams& select, int heads,
                          cudaStream_t stream);
/// Exact scores of the survivors, bit by bit those of run_decode_scores.
void run_rescore(const ScreenParams& params, DType dtype, int grid, cudaStream_t stream);

}  // namespace msa::cuda::sm90
