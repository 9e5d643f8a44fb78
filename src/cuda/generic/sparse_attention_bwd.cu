// SPDX-License-Identifier: Apache-2.0
//
// SparseAttentionBackward: statistics of rows, the queries of each block, dq per query, dk and dv
// per block. No sum is shared by two CTAs, so every result is bitwise repeatable. See
// docs/kernels/backward.md.
#include "cuda/cuda.hpp"
#include "cuda/generic/sparse_attention_bwd.cuh"

namespace msa::cuda::generic {
namespace {

std::optional<std::string> declines(const SparseAttentionBackward& args, const Options&) {
  if (auto reason = declines_device(args, 80, false)) return reason;
  return declines_gradients(args, {DType::f32, DType::f16, DType::bf16});
}

void run(const SparseAttentionBackward& args, std::span<std::byte> workspace, Stream stream) {
  core::WorkspaceLayout layout(workspace.data());
  const GradientWorkspace parts = lay_out_gradients(args, layout);
  const AttentionGradients g = make_attention_gradients(args, parts);
  const cudaStream_t on = stream_of(stream);
  build_query_lists(parts.build, on);
  compute_row_statistics(g, args.q.dtype, on);
  const int heads = args.problem.num_kv_heads;
  switch (args.q.dtype) {
    case DType::f16:
      return launch_gradients_f16(g, heads, on);
    case DType::bf16:
      return launch_gradients_bf16(g, heads, on);
    default:
      return launch_gradients_f32(g, heads, on);
  }
}

}  // namespace

const msa::detail::Implementation<SparseAttentionBackward> kSparseAttentionBackward = {
    .name = "cuda_generic",
    .dtypes = "f32 f16 bf16",
    .declines = declines,
    .workspace_bytes =
        [](const SparseAttentionBackward& args) {
          core::WorkspaceLayout layout;
          lay_out_gradients(args, layout);
          return layout.bytes();
        },
    .run = run};

}  // namespace msa::cuda::generic
