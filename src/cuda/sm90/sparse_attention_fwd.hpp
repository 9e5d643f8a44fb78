// SPDX-License-Identifier: Apache-2.0
//
// What the files of the union kernel share on the host.
#pragma once

#include "cuda/common/support.hpp"
#include "cuda/sm90/attention_row.cuh"
#include "cuda/sm90/sparse_attention_kv_outer.hpp"
#include "cuda/sm90/sparse_attention_union.cuh"

namespace msa::cuda::sm90 {

inline AttentionTensors tensors_of(const SparseAttentionForward& args) {
  const bool paged = args.batch.page_table.given();
  AttentionTensors g{};
  g.batch = make_device_batch(args);
  g.q = args.q.data;
  g.k = args.k.data;
  g.v = args.v.data;
  g.block_ids = static_cast<const std::int32_t*>(args.block_ids.data);
  g.out = args.out.data;
  g.lse = static_cast<float*>(args.lse.given() ? args.lse.data : nullptr);
  g.q_token_stride = args.q.stride[0];
  g.q_head_stride = args.q.stride[1];
  g.k_page_stride = paged ? args.k.stride[0] : 0;
  g.k_head_stride = args.k.stride[1];
  g.k_token_stride = args.k.stride[paged ? 2 : 0];
  g.v_page_stride = paged ? args.v.stride[0] : 0;
  g.v_head_stride = args.v.stride[1];
  g.v_token_stride = args.v.stride[paged ? 2 : 0];
  g.ids_head_stride = args.block_ids.stride[0];
  g.ids_token_stride = args.block_ids.stride[1];
  g.out_token_stride = args.out.stride[0];
  g.out_head_stride = args.out.stride[1];
  g.lse_token_stride = args.lse.stride[0];
  g.lse_head_stride = args.lse.stride[1];
  g.num_kv_heads = args.problem.num_kv_heads;
  g.group_size = args.problem.group_size();
  g.head_dim = args.problem.head_dim;
  g.top_k = args.problem.top_k;
  constexpr double kLog2E = 1.4426950408889634;
  g.scale_log2 =
      static_cast<float>(scale_or_default(args.softmax_scale, args.problem.head_dim) * kLog2E);
  if (args.k_scale.given()) {
    g.k_scale = static_cast<const float*>(args.k_scale.data);
    g.k_scale_stride = args.k_scale.stride[0];
  }
  if (args.v_scale.given()) {
    g.v_scale = static_cast<const float*>(args.v_scale.data);
    g.v_scale_stride = args.v_scale.stride[0];
  }
  return g;
}

/// Tokens of cold tiles (of kColdTile tokens) are left to the KV-outer kernel.
void launch_union_bf16(const SparseAttentionForward& args, ColdTiles cold, cudaStream_t stream);
void launch_union_f16(const SparseAttentionForward& args, ColdTiles cold, cudaStream_t stream);

/// The same for e4m3 K and V; no tile is cold.
void launch_union_bf16_e4m3(const SparseAttentionForward& args, cudaStream_t stream);
void launch_union_f16_e4m3(const SparseAttentionForward& args, cudaStream_t stream);

}  // namespace msa::cuda::sm90
