// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/sparse_attention_decode.cuh"

namespace msa::cuda::sm90 {

void launch_decode_f16_e4m3(const AttentionParams& params, int num_kv_heads, DecodeSplit split,
                            cudaStream_t stream) {
  launch_decode<__half, std::uint8_t, 128>(params, num_kv_heads, split, stream);
}

}  // namespace msa::cuda::sm90
