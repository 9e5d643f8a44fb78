// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/sparse_attention_decode.cuh"

namespace msa::cuda::sm90 {

void launch_decode_f16(const AttentionParams& params, int num_kv_heads, DecodeSplit split,
                       cudaStream_t stream) {
  if (params.head_dim == 64) {
    launch_decode<__half, __half, 64>(params, num_kv_heads, split, stream);
  } else {
    launch_decode<__half, __half, 128>(params, num_kv_heads, split, stream);
  }
}

}  // namespace msa::cuda::sm90
