// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/sparse_attention_fwd_launch.cuh"

namespace msa::cuda::sm90 {

void launch_union_f16(const SparseAttentionForward& args, ColdTiles cold, cudaStream_t stream) {
  launch_for<__half>(args, cold, stream);
}

}  // namespace msa::cuda::sm90
