// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/sparse_attention_fwd_launch.cuh"

namespace msa::cuda::sm90 {

void launch_union_f16(const SparseAttentionForward& args, const std::uint8_t* tile_is_cold,
                      cudaStream_t stream) {
  launch_for<__half>(args, tile_is_cold, stream);
}

}  // namespace msa::cuda::sm90
