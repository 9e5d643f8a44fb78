// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/sparse_attention_decode.cuh"

namespace msa::cuda::sm90 {

void launch_decode_f16_e4m3(const generic::AttentionParams& params, int num_kv_heads,
                            int num_splits, cudaStream_t stream) {
  launch_decode<__half, std::uint8_t, 128>(params, num_kv_heads, num_splits, stream);
}

}  // namespace msa::cuda::sm90
