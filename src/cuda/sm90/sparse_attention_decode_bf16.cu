// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/sparse_attention_decode.cuh"

namespace msa::cuda::sm90 {

void launch_decode_bf16(const AttentionParams& params, int num_kv_heads, DecodeSplit split,
                        cudaStream_t stream) {
  if (params.head_dim == 64) {
    launch_decode<__nv_bfloat16, __nv_bfloat16, 64>(params, num_kv_heads, split, stream);
  } else {
    launch_decode<__nv_bfloat16, __nv_bfloat16, 128>(params, num_kv_heads, split, stream);
  }
}

}  // namespace msa::cuda::sm90
