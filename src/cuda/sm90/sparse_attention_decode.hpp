// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include "msa/ops.hpp"

namespace msa::cuda {
struct AttentionParams;
}

namespace msa::cuda::sm90 {

/// CTAs at most that share a token's blocks: one cluster.
inline constexpr int kDecodeMostSplits = 16;

/// How a token's blocks are divided.
struct DecodeSplit {
  int ctas;   ///< a power of two
  bool wide;  ///< CTAs of 8 warps, not 4
};

/// CTAs that share a token and KV head.
int decode_splits(const SparseAttentionForward& args);

/// Queries of the first type, keys and values of the second where there is one.
void launch_decode_bf16(const AttentionParams& params, int num_kv_heads, DecodeSplit split,
                        cudaStream_t stream);
void launch_decode_f16(const AttentionParams& params, int num_kv_heads, DecodeSplit split,
                       cudaStream_t stream);
void launch_decode_bf16_e4m3(const AttentionParams& params, int num_kv_heads, DecodeSplit split,
                             cudaStream_t stream);
void launch_decode_f16_e4m3(const AttentionParams& params, int num_kv_heads, DecodeSplit split,
                            cudaStream_t stream);

}  // namespace msa::cuda::sm90
