// SPDX-License-Identifier: Apache-2.0
#include "cuda/generic/sparse_attention_bwd_mma.cuh"

namespace msa::cuda::generic {
void launch_gradients_f16(const AttentionGradients& g, int num_kv_heads, cudaStream_t stream) {
  launch_gradients<__half>(g, num_kv_heads, stream);
}
}  // namespace msa::cuda::generic
