// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/sparse_attention_fwd_launch.cuh"

namespace msa::cuda::sm90 {

void launch_union_bf16_e4m3(const SparseAttentionForward& args, cudaStream_t stream) {
  launch_for<__nv_bfloat16, /*kWiden=*/true>(args, {}, stream);
}

}  // namespace msa::cuda::sm90
