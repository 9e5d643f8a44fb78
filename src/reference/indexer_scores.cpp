// SPDX-License-Identifier: Apache-2.0
#include "reference/support.hpp"

namespace msa::reference {

std::vector<double> block_scores_of(const TensorView& index_q, const TensorView& index_k,
                                    const Batch& batch, const Problem& problem, double scale,
                                    const core::Sequence& sequence, std::int64_t r,
                                    std::int64_t i) {
  const Row q = row_of(index_q, sequence.q_begin + i, r);
  const std::int64_t p = sequence.position(i);
  std::vector<double> M;
  for (std::int64_t b = 0; b < core::ceil_div(sequence.k_len, problem.block_size); ++b) {
    std::vector<std::int64_t> tokens;
    append_visible(tokens, index_k, batch, problem.block_size, sequence, p, b);
    std::vector<double> S_idx;
    for (std::int64_t j : tokens) {
      const Row k = token_row(index_k, batch, problem.block_size, sequence, 0, j);
      S_idx.push_back(scale * dot(q, k, problem.index_dim));
    }
    M.push_back(max_of(S_idx));
  }
  return M;
}

void indexer_scores(const IndexerScores& args) {
  const Problem& problem = args.problem;
  const core::Sequences sequences(args);
  const double scale = scale_or_default(args.index_scale, problem.index_dim);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    for (std::int64_t r = 0; r < problem.num_kv_heads; ++r) {
      for (std::int64_t i = 0; i < sequence.q_len; ++i) {
        std::vector<double> M =
            block_scores_of(args.index_q, args.index_k, args.batch, problem, scale, sequence, r, i);
        M.resize(static_cast<std::size_t>(args.block_scores.shape[2]), -kInfinity);
        for (std::size_t b = 0; b < M.size(); ++b) {
          core::store(args.block_scores, M[b], r, sequence.q_begin + i, b);
        }
      }
    }
  }
}

const detail::Implementation<IndexerScores> kIndexerScores = implementation<IndexerScores>(
    "f64 f32 f16 bf16 e4m3",
    [](const IndexerScores& args, std::span<std::byte>, Stream) { indexer_scores(args); });

}  // namespace msa::reference
