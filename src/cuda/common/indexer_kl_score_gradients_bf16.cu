// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/indexer_kl_scores.cuh"

namespace msa::cuda::kl::scores {

void launch_score_gradients_bf16(const Params& g, cudaStream_t stream) {
  launch_score_gradients<__nv_bfloat16>(g, stream);
}

}  // namespace msa::cuda::kl::scores
