// SPDX-License-Identifier: Apache-2.0
#include "reference/support.hpp"

namespace msa::reference {

void dense_attention_forward(const DenseAttentionForward& args, Rounding rounding) {
  const Problem& problem = args.problem;
  const core::Sequences sequences(args);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    for (std::int64_t i = 0; i < sequence.q_len; ++i) {
      for (std::int64_t h = 0; h < problem.num_q_heads; ++h) {
        const std::vector<std::int64_t> T = support(args, sequence, h / problem.group_size(), i);
        attend(args, sequence, h, i, T, rounding);
      }
    }
  }
}

const detail::Implementation<DenseAttentionForward> kDenseAttentionForward =
    implementation<DenseAttentionForward>(
        "f64 f32 f16 bf16, k and v also e4m3",
        [](const DenseAttentionForward& args, std::span<std::byte>, Stream) {
          dense_attention_forward(args);
        });

}  // namespace msa::reference
