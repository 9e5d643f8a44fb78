// SPDX-License-Identifier: Apache-2.0
//
// The row of SparseAttentionForward for few query tokens.
#include "cuda/common/attention.cuh"
#include "cuda/cuda.hpp"
#include "cuda/sm90/sparse_attention_decode.hpp"

namespace msa::cuda::sm90 {
namespace {

// Of the whole batch. Beyond it the union kernel, which reads a block once for 8 tokens, is faster.
constexpr std::int64_t kMaxQueries = 1024;
constexpr int kMaxTopK = 64;

std::optional<std::string> declines(const SparseAttentionForward& args, const Options&) {
  const Problem& p = args.problem;
  if (auto reason = declines_device(args, 90, true)) return reason;
  if (auto reason = declines_attention(args)) return reason;
  if (args.k.dtype != args.v.dtype) {
    return core::concat("k is ", name_of(args.k.dtype), ", v is ", name_of(args.v.dtype));
  }
  const bool narrow = args.k.dtype == DType::e4m3;
  if (p.head_dim != 128 && (narrow || p.head_dim != 64)) {
    return core::concat("head_dim ", p.head_dim, " is not ", narrow ? "128" : "64 or 128");
  }
  if (p.group_size() > 16) return core::concat("group size ", p.group_size(), " is above 16");
  if (p.top_k > kMaxTopK) return core::concat("top_k ", p.top_k, " is above ", kMaxTopK);
  if (args.q.shape[0] > kMaxQueries) {
    return core::concat("there are ", args.q.shape[0], " query tokens, more than ", kMaxQueries);
  }
  // 16-byte loads, as TMA's.
  for (const auto& [name, view] : {std::pair{"q", args.q}, {"k", args.k}, {"v", args.v}}) {
    if (auto reason = declines_tma(name, view)) return reason;
  }
  return std::nullopt;
}

}  // namespace

/// CTAs that share a token and KV head: as many as have an SM each. Measured with 4 KV heads at
/// 128K tokens: 8 requests take 130 us a step with 4 splits, 140 with 2 and 139 with 8.
int decode_splits(const SparseAttentionForward& args) {
  const std::int64_t items = args.q.shape[0] * args.problem.num_kv_heads;
  const std::int64_t room = num_sms(args.q.device.index);
  int splits = 1;
  while (2 * splits <= kDecodeMostSplits && 2 * splits <= args.problem.top_k &&
         2 * splits * items <= room) {
    splits *= 2;
  }
  return splits;
}

const msa::detail::Implementation<SparseAttentionForward> kSparseAttentionDecode = {
    .name = "cuda_sm90_decode",
    .dtypes = "f16 bf16, k and v also e4m3",
    .declines = declines,
    .workspace_bytes = [](const SparseAttentionForward&) -> std::size_t { return 0; },
    .run =
        [](const SparseAttentionForward& args, std::span<std::byte>, Stream stream) {
          if (args.q.shape[0] == 0) return;
          const AttentionParams params = make_attention_params(args);
          const bool narrow = args.k.dtype == DType::e4m3;
          const auto start = args.q.dtype == DType::bf16
                                 ? (narrow ? launch_decode_bf16_e4m3 : launch_decode_bf16)
                                 : (narrow ? launch_decode_f16_e4m3 : launch_decode_f16);
          const int splits = decode_splits(args);
          const std::int64_t ctas = args.q.shape[0] * args.problem.num_kv_heads * splits;
          // A CTA that has an SM to itself, or a block, has 8 warps; 4 splits of 8 warps took 137
          // us where 4 warps took 130.
          const bool alone = ctas <= num_sms(args.q.device.index);
          const bool wide = splits == kDecodeMostSplits || (splits == 1 && alone);
          start(params, args.problem.num_kv_heads, {splits, wide}, stream_of(stream));
        }};

}  // namespace msa::cuda::sm90
