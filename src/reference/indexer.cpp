// SPDX-License-Identifier: Apache-2.0
#include "reference/support.hpp"

namespace msa::reference {

void indexer(const Indexer& args) {
  const Problem& problem = args.problem;
  const core::Sequences sequences(args);
  const double scale = scale_or_default(0.0f, problem.index_dim);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    for (std::int64_t r = 0; r < problem.num_kv_heads; ++r) {
      for (std::int64_t i = 0; i < sequence.q_len; ++i) {
        std::vector<double> M =
            block_scores_of(args.index_q, args.index_k, args.batch, problem, scale, sequence, r, i);
        // Block scores are f32 between IndexerScores and SelectTopK; ties are ties of f32.
        for (double& score : M) score = static_cast<double>(static_cast<float>(score));
        std::vector<std::int64_t> I = select_blocks(M, problem, sequence.position(i));
        I.resize(static_cast<std::size_t>(problem.top_k), -1);
        for (std::size_t slot = 0; slot < I.size(); ++slot) {
          core::store_i32(args.block_ids, static_cast<std::int32_t>(I[slot]), r,
                          sequence.q_begin + i, slot);
        }
      }
    }
  }
}

const detail::Implementation<Indexer> kIndexer = implementation<Indexer>(
    "f64 f32 f16 bf16 e4m3",
    [](const Indexer& args, std::span<std::byte>, Stream) { indexer(args); });

}  // namespace msa::reference
