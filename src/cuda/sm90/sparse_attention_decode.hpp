// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

namespace msa::cuda::generic {
struct AttentionParams;
}

namespace msa::cuda::sm90 {

/// CTAs at most that share a token's blocks: one cluster.
inline constexpr int kDecodeMostSplits = 16;

/// Queries of the first type, keys and values of the second where there is one.
void launch_decode_bf16(const generic::AttentionParams& params, int num_kv_heads, int num_splits,
                        cudaStream_t stream);
void launch_decode_f16(const generic::AttentionParams& params, int num_kv_heads, int num_splits,
                       cudaStream_t stream);
void launch_decode_bf16_e4m3(const generic::AttentionParams& params, int num_kv_heads,
                             int num_splits, cudaStream_t stream);
void launch_decode_f16_e4m3(const generic::AttentionParams& params, int num_kv_heads,
                            int num_splits, cudaStream_t stream);

}  // namespace msa::cuda::sm90
