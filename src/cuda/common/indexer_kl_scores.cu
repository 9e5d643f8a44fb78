// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/indexer_kl_scores.cuh"

namespace msa::cuda {

void launch_kl_statistics(const kl::Params& g, DType dtype, cudaStream_t stream) {
  (dtype == DType::f16 ? kl::scores::launch_statistics_f16 : kl::scores::launch_statistics_bf16)(
      g, stream);
}

void launch_kl_score_gradients(const kl::Params& g, DType dtype, cudaStream_t stream) {
  (dtype == DType::f16 ? kl::scores::launch_score_gradients_f16
                       : kl::scores::launch_score_gradients_bf16)(g, stream);
}

}  // namespace msa::cuda
