// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/indexer_decode_scores.cuh"

namespace msa::cuda::sm90 {

void run_decode_scores_e4m3(const DecodeScoreParams& params, int dim, int grid,
                            cudaStream_t stream) {
  run_decode_scores<std::uint8_t, __half>(params, dim, grid, stream);
}

}  // namespace msa::cuda::sm90
