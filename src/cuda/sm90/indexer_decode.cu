// SPDX-License-Identifier: Apache-2.0
//
// The row of Indexer for few query tokens a sequence: scores into the workspace, then their top-k.
#include <algorithm>

#include "core/workspace.hpp"
#include "cuda/common/support.hpp"
#include "cuda/cuda.hpp"
#include "cuda/sm90/indexer_decode.hpp"
#include "cuda/sm90/indexer_screen.hpp"

namespace msa::cuda::sm90 {
namespace {

// Beyond this the prefill kernel, which reads keys once for 64 tokens, is as fast.
constexpr std::int64_t kMaxQueryTokens = 16;
constexpr std::int64_t kMaxSequences = 4096;  // their ends are in shared memory
/// Two CTAs fill an SM. Of few blocks one is enough, and leaves room for the CTAs of selection and
/// attention, which so are on their SMs, waiting, when their turn comes.
constexpr std::int64_t kFewBlocks = 2048;
int ctas_per_sm(const Indexer& args) {
  const std::int64_t blocks =
      core::batch_size(args.batch) * ceil_div(core::max_seq_len_k(args), kDecodeBlock);
  return blocks <= kFewBlocks ? 1 : 2;
}

std::int64_t num_columns(const Indexer& args) {
  const std::int64_t blocks = ceil_div(core::max_seq_len_k(args), kDecodeBlock);
  return round_up(std::max<std::int64_t>(blocks, 1), 4);
}

/// Query tokens of a sequence: known, or the caller's bound, or the mean. Longer ones take more
/// passes over the keys.
std::int64_t query_tokens(const Indexer& args) {
  const std::int64_t batch_size = std::max<std::int64_t>(core::batch_size(args.batch), 1);
  const std::int64_t mean = ceil_div(args.index_q.shape[0], batch_size);
  if (!args.batch.cu_seqlens_q.given()) return mean;
  return args.batch.max_seq_len_q > 0 ? args.batch.max_seq_len_q : mean;
}

std::optional<std::string> declines(const Indexer& args, const Options&) {
  const Problem& p = args.problem;
  if (auto reason = declines_device(args, 90, true)) return reason;
  const DType dtype = args.index_q.dtype;
  if (dtype != DType::bf16 && dtype != DType::f16 && dtype != DType::e4m3) {
    return core::concat("index_q is ", name_of(dtype), ", not bf16, f16 or e4m3");
  }
  if (args.index_k.dtype != dtype) {
    return core::concat("index_q is ", name_of(dtype), " and index_k is ",
                        name_of(args.index_k.dtype));
  }
  if (p.index_dim != 64 && p.index_dim != 128) {
    return core::concat("index_dim is ", p.index_dim, ", not 64 or 128");
  }
  if (p.block_size != kDecodeBlock) {
    return core::concat("block_size is ", p.block_size, ", not ", kDecodeBlock);
  }
  if (p.top_k > kDecodeTopK) return core::concat("top_k is ", p.top_k, ", above ", kDecodeTopK);
  if (query_tokens(args) > kMaxQueryTokens) {
    return core::concat("sequences have ", query_tokens(args), " query tokens, more than ",
                        kMaxQueryTokens);
  }
  if (core::batch_size(args.batch) > kMaxSequences) {
    return core::concat("there are ", core::batch_size(args.batch), " sequences, more than ",
                        kMaxSequences);
  }
  if (core::max_seq_len_k(args) > INT32_MAX) {
    return core::concat("sequences may have ", core::max_seq_len_k(args),
                        " keys, more than 2^31 - 1; give max_seq_len_k");
  }
  // 16-byte loads, as TMA's.
  if (auto reason = declines_tma("index_q", args.index_q)) return reason;
  return declines_tma("index_k", args.index_k);
}

float* lay_out(const Indexer& args, core::WorkspaceLayout& layout) {
  return layout.take<float>(args.problem.num_kv_heads * args.index_q.shape[0] * num_columns(args));
}

DecodeScoreParams score_params(const Indexer& args, float* scores) {
  const std::int64_t total_q = args.index_q.shape[0];
  const Problem& p = args.problem;
  const auto size = static_cast<std::int64_t>(size_of(args.index_k.dtype));
  const bool paged = core::is_paged(args.batch);
  const std::int64_t rows = query_tokens(args) * p.num_kv_heads;
  return {
      .batch = make_device_batch(args),
      .index_q = static_cast<const std::byte*>(args.index_q.data),
      .query_stride = args.index_q.stride[0] * size,
      .query_head_stride = args.index_q.stride[1] * size,
      .index_k = static_cast<const std::byte*>(args.index_k.data),
      .page_stride = paged ? args.index_k.stride[0] * size : 0,
      .token_stride = args.index_k.stride[paged ? 2 : 0] * size,
      .scores = scores,
      .head_stride = total_q * num_columns(args),
      .row_stride = num_columns(args),
      .num_columns = num_columns(args),
      .heads = p.num_kv_heads,
      .pass_rows = static_cast<int>(std::clamp<std::int64_t>(round_up(rows, 8), 8, kDecodeRows))};
}

DecodeSelectParams select_params(const Indexer& args, const DecodeScoreParams& params) {
  return {.batch = params.batch,
          .scores = params.scores,
          .head_stride = params.head_stride,
          .row_stride = params.row_stride,
          .ids = static_cast<std::int32_t*>(args.block_ids.data),
          .id_head_stride = args.block_ids.stride[0],
          .id_row_stride = args.block_ids.stride[1],
          .top_k = args.problem.top_k,
          .num_init_blocks = args.problem.num_init_blocks,
          .num_local_blocks = args.problem.num_local_blocks};
}

int grid_of(const Indexer& args) { return ctas_per_sm(args) * num_sms(args.index_q.device.index); }

void run(const Indexer& args, std::span<std::byte> workspace, Stream stream) {
  if (args.index_q.shape[0] == 0) return;
  const auto [params, selection] = make_decode_params(args, workspace);
  const Problem& p = args.problem;
  const int grid = grid_of(args);
  switch (args.index_k.dtype) {
    case DType::bf16:
      run_decode_scores_bf16(params, p.index_dim, grid, stream_of(stream));
      break;
    case DType::f16:
      run_decode_scores_f16(params, p.index_dim, grid, stream_of(stream));
      break;
    default:
      run_decode_scores_e4m3(params, p.index_dim, grid, stream_of(stream));
  }
  run_decode_select(selection, p.num_kv_heads, stream_of(stream));
}

constexpr const char* kScreenName = "cuda_sm90_decode_screened";
// Two more kernels take as long as the bytes saved on fewer keys: of 512K keys a step takes 65 us,
// 69 without codes.
constexpr std::int64_t kLeastScreenedKeys = 512 * 1024;

std::optional<std::string> declines_screen(const Indexer& args, const Options& options) {
  if (!args.index_k_codes.given()) return "there are no index_k_codes";
  if (auto reason = declines(args, options)) return reason;
  if (args.index_k.dtype == DType::e4m3) return "index_k is e4m3, as small as its codes";
  if (args.problem.index_dim != 128) {
    return core::concat("index_dim is ", args.problem.index_dim, ", not 128");
  }
  if (auto reason = declines_tma("index_k_codes", args.index_k_codes)) return reason;
  const std::int64_t keys = core::batch_size(args.batch) * core::max_seq_len_k(args);
  const bool asked = options.backend != nullptr && std::string_view(options.backend) == kScreenName;
  const auto& scales = args.index_k_scales;
  if (reinterpret_cast<std::uintptr_t>(scales.data) % 4 != 0 || scales.stride[0] % 2 != 0 ||
      scales.stride[2] % 2 != 0) {
    return "index_k_scales are not pairs at multiples of 4 bytes";
  }
  if (!asked && keys < kLeastScreenedKeys) {
    return core::concat("there are up to ", keys, " keys, fewer than ", kLeastScreenedKeys);
  }
  return std::nullopt;
}

ScreenParams lay_out_screen(const Indexer& args, core::WorkspaceLayout& layout) {
  const std::int64_t batch_size = core::batch_size(args.batch);
  ScreenParams params{};
  params.exact = score_params(args, lay_out(args, layout));
  params.upper = lay_out(args, layout);
  params.codes = static_cast<const std::byte*>(args.index_k_codes.data);
  params.codes_page_stride = args.index_k_codes.stride[0];
  params.codes_token_stride = args.index_k_codes.stride[2];
  params.scales = static_cast<const std::byte*>(args.index_k_scales.data);
  params.scales_page_stride = args.index_k_scales.stride[0] * 2;
  params.scales_token_stride = args.index_k_scales.stride[2] * 2;
  params.seen_words = ceil_div(num_columns(args), 32);
  params.seen = layout.take<std::uint32_t>(batch_size * params.seen_words);
  params.survivors = layout.take<Survivor>(batch_size * num_columns(args));
  params.num_survivors = layout.take<int>(1);
  return params;
}

void run_screened(const Indexer& args, std::span<std::byte> workspace, Stream stream) {
  if (args.index_q.shape[0] == 0) return;
  core::WorkspaceLayout layout(workspace.data());
  const ScreenParams params = lay_out_screen(args, layout);
  const DecodeSelectParams selection = select_params(args, params.exact);
  const int heads = args.problem.num_kv_heads;
  run_screen(params, args.index_k.dtype, grid_of(args), stream_of(stream));
  run_screen_survivors(params, selection, heads, stream_of(stream));
  run_rescore(params, args.index_k.dtype, grid_of(args), stream_of(stream));
  run_decode_select(selection, heads, stream_of(stream));
}

}  // namespace

DecodeParams make_decode_params(const Indexer& args, std::span<std::byte> workspace) {
  core::WorkspaceLayout layout(workspace.data());
  const DecodeScoreParams scores = score_params(args, lay_out(args, layout));
  return {scores, select_params(args, scores)};
}

std::size_t decode_score_smem(const DecodeScoreParams& params) {
  const auto rows = static_cast<std::size_t>(params.pass_rows);
  constexpr std::size_t kRowBytes = 256;  // 128 dimensions in 16 bits
  const std::size_t maxima = 2 * (kDecodeThreads / 32) * sizeof(float);
  return rows * (kRowBytes + maxima) +
         static_cast<std::size_t>(params.batch.batch_size) * sizeof(int);
}

const msa::detail::Implementation<Indexer> kIndexerDecode = {
    .name = "cuda_sm90_decode",
    .dtypes = "f16 bf16 e4m3",
    .declines = declines,
    .workspace_bytes = [](const Indexer& args) -> std::size_t {
      core::WorkspaceLayout layout;
      lay_out(args, layout);
      return layout.bytes();
    },
    .run = run};

const msa::detail::Implementation<Indexer> kIndexerDecodeScreened = {
    .name = kScreenName,
    .dtypes = "f16 bf16",
    .declines = declines_screen,
    .workspace_bytes = [](const Indexer& args) -> std::size_t {
      core::WorkspaceLayout layout;
      lay_out_screen(args, layout);
      return layout.bytes();
    },
    .run = run_screened};

}  // namespace msa::cuda::sm90
