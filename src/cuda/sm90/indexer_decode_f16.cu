// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/indexer_decode_scores.cuh"

namespace msa::cuda::sm90 {

void run_decode_scores_f16(const DecodeScoreParams& params, int dim, int grid,
                           cudaStream_t stream) {
  run_decode_scores<__half, __half>(params, dim, grid, stream);
}

}  // namespace msa::cuda::sm90
