// SPDX-License-Identifier: Apache-2.0
//
// Indexer: scores and selection by turns, for as many queries at a time as a bounded workspace
// holds the scores of. The int8 codes of the keys are not read.
#include <algorithm>

#include "core/workspace.hpp"
#include "cuda/common/support.hpp"
#include "cuda/cuda.hpp"
#include "cuda/generic/indexer_scores.hpp"
#include "cuda/generic/select_top_k.hpp"

namespace msa::cuda::generic {
namespace {

constexpr std::int64_t kMostScores = std::int64_t{1} << 26;  // 256 MiB of f32

struct Chunks {
  std::int64_t num_columns;
  std::int64_t queries;  ///< of a chunk
  float* scores;         ///< [num_kv_heads][queries][num_columns]
};

Chunks lay_out(const Indexer& args, core::WorkspaceLayout& layout) {
  Chunks chunks{};
  chunks.num_columns =
      std::max<std::int64_t>(ceil_div(core::max_seq_len_k(args), args.problem.block_size), 1);
  const std::int64_t of_query = chunks.num_columns * args.problem.num_kv_heads;
  chunks.queries = std::clamp<std::int64_t>(kMostScores / of_query, 1,
                                            std::max<std::int64_t>(args.index_q.shape[0], 1));
  chunks.scores = layout.take<float>(chunks.queries * of_query);
  return chunks;
}

}  // namespace

const msa::detail::Implementation<Indexer> kIndexer = {
    .name = "cuda_generic",
    .dtypes = "f16 bf16 e4m3",
    .declines = [](const Indexer& args, const Options&) -> std::optional<std::string> {
      if (auto reason = declines_device(args, 80, false)) return reason;
      return declines_index_inputs(args.index_q, args.index_k);
    },
    .workspace_bytes = [](const Indexer& args) -> std::size_t {
      core::WorkspaceLayout layout;
      lay_out(args, layout);
      return layout.bytes();
    },
    .run =
        [](const Indexer& args, std::span<std::byte> workspace, Stream stream) {
          core::WorkspaceLayout layout(workspace.data());
          const Chunks chunks = lay_out(args, layout);
          const Problem& p = args.problem;
          const std::int64_t total_q = args.index_q.shape[0];
          const IndexerScores scores{
              .problem = p, .batch = args.batch, .index_q = args.index_q, .index_k = args.index_k};
          SelectTopKParams selection{.batch = make_device_batch(args),
                                     .scores = chunks.scores,
                                     .score_head_stride = chunks.queries * chunks.num_columns,
                                     .score_query_stride = chunks.num_columns,
                                     .num_columns = chunks.num_columns,
                                     .ids = static_cast<std::int32_t*>(args.block_ids.data),
                                     .id_head_stride = args.block_ids.stride[0],
                                     .id_query_stride = args.block_ids.stride[1],
                                     .query_begin = 0,
                                     .num_queries = 0,
                                     .top_k = p.top_k,
                                     .num_init_blocks = p.num_init_blocks,
                                     .num_local_blocks = p.num_local_blocks};
          for (std::int64_t begin = 0; begin < total_q; begin += chunks.queries) {
            const std::int64_t end = std::min(begin + chunks.queries, total_q);
            run_indexer_scores(scores,
                               {.query_begin = begin,
                                .query_end = end,
                                .scores = chunks.scores,
                                .head_stride = selection.score_head_stride,
                                .query_stride = selection.score_query_stride,
                                .num_columns = chunks.num_columns,
                                .fill = false},
                               stream_of(stream));
            selection.query_begin = begin;
            selection.num_queries = end - begin;
            run_select_top_k(selection, p.num_kv_heads, stream_of(stream));
          }
        }};

}  // namespace msa::cuda::generic
