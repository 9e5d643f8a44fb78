// SPDX-License-Identifier: Apache-2.0
#include "reference/support.hpp"

namespace msa::reference {

void sparse_attention_forward(const SparseAttentionForward& args, Rounding rounding) {
  const Problem& problem = args.problem;
  const core::Sequences sequences(args);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    for (std::int64_t i = 0; i < sequence.q_len; ++i) {
      for (std::int64_t r = 0; r < problem.num_kv_heads; ++r) {
        const std::vector<std::int64_t> T = support(args, sequence, r, i);
        for (std::int64_t h = r * problem.group_size(); h < (r + 1) * problem.group_size(); ++h) {
          attend(args, sequence, h, i, T, rounding);
        }
      }
    }
  }
}

const detail::Implementation<SparseAttentionForward> kSparseAttentionForward =
    implementation<SparseAttentionForward>(
        "f64 f32 f16 bf16, k and v also e4m3",
        [](const SparseAttentionForward& args, std::span<std::byte>, Stream) {
          sparse_attention_forward(args);
        });

}  // namespace msa::reference
