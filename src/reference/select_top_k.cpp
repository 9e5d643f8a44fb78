// SPDX-License-Identifier: Apache-2.0
#include "reference/support.hpp"

namespace msa::reference {

std::vector<std::int64_t> select_blocks(const std::vector<double>& M, const Problem& problem,
                                        std::int64_t p) {
  if (p < 0) return {};
  const std::int64_t local = p / problem.block_size;
  struct Candidate {
    bool forced = false;
    double score = 0.0;
    std::int64_t b = 0;
  };
  std::vector<Candidate> candidates;
  for (std::int64_t b = 0; b <= local; ++b) {
    candidates.push_back(
        {.forced = b > local - problem.num_local_blocks || b < problem.num_init_blocks,
         .score = M[static_cast<std::size_t>(b)],
         .b = b});
  }
  // Stable: equal candidates stay in the order of their ids. There is a slot for every forced block
  // (top_k >= num_init_blocks + num_local_blocks).
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& x, const Candidate& y) {
                     if (x.forced != y.forced) return x.forced;
                     if (x.forced) return false;
                     if (std::isnan(y.score)) return !std::isnan(x.score);
                     return x.score > y.score;
                   });
  std::vector<std::int64_t> I;
  for (const Candidate& candidate : candidates) {
    if (static_cast<int>(I.size()) < problem.top_k) I.push_back(candidate.b);
  }
  std::sort(I.begin(), I.end());
  return I;
}

void select_top_k(const SelectTopK& args) {
  const Problem& problem = args.problem;
  const core::Sequences sequences(args);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    for (std::int64_t r = 0; r < problem.num_kv_heads; ++r) {
      for (std::int64_t i = 0; i < sequence.q_len; ++i) {
        const std::int64_t row = sequence.q_begin + i;
        std::vector<double> M;
        for (std::int64_t b = 0; b < core::ceil_div(sequence.k_len, problem.block_size); ++b) {
          M.push_back(core::load(args.block_scores, r, row, b));
        }
        std::vector<std::int64_t> I = select_blocks(M, problem, sequence.position(i));
        I.resize(static_cast<std::size_t>(problem.top_k), -1);
        for (std::size_t slot = 0; slot < I.size(); ++slot) {
          core::store_i32(args.block_ids, static_cast<std::int32_t>(I[slot]), r, row, slot);
        }
      }
    }
  }
}

const detail::Implementation<SelectTopK> kSelectTopK = implementation<SelectTopK>(
    "f64 f32", [](const SelectTopK& args, std::span<std::byte>, Stream) { select_top_k(args); });

}  // namespace msa::reference
