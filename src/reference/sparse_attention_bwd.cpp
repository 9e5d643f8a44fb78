// SPDX-License-Identifier: Apache-2.0
#include "reference/support.hpp"

namespace msa::reference {
// P and O are computed again from q, k and v: `out` and `lse` carry the rounding of whoever made
// them and are not read.
void sparse_attention_backward(const SparseAttentionBackward& args) {
  const Problem& problem = args.problem;
  const core::Sequences sequences(args);
  const double scale = scale_or_default(args.softmax_scale, problem.head_dim);
  Gradient dQ(args.dq);
  Gradient dK(args.dk);
  Gradient dV(args.dv);
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    for (std::int64_t i = 0; i < sequence.q_len; ++i) {
      for (std::int64_t h = 0; h < problem.num_q_heads; ++h) {
        const std::int64_t r = h / problem.group_size();
        const std::int64_t row = sequence.q_begin + i;
        const Row q = row_of(args.q, row, h);
        const Row dO = row_of(args.dout, row, h);
        const std::vector<std::int64_t> T = support(args, sequence, r, i);
        const std::vector<double> P = softmax(attention_scores(args, sequence, h, i, T));

        // dP[j] = <dO, V[j]>, and the softmax's Jacobian: dS[j] = P[j] * (dP[j] - sum(P * dP)).
        std::vector<double> dP;
        double delta = 0.0;
        for (std::size_t t = 0; t < T.size(); ++t) {
          dP.push_back(dot(dO, row_of(args.v, sequence.k_begin + T[t], r), problem.head_dim));
          delta += P[t] * dP[t];
        }
        for (std::size_t t = 0; t < T.size(); ++t) {
          const std::int64_t token = sequence.k_begin + T[t];
          const double dS = P[t] * (dP[t] - delta);
          const Row k = row_of(args.k, token, r);
          for (std::int64_t d = 0; d < problem.head_dim; ++d) {
            dQ.at(row, h, d) += scale * dS * k[d];
            dK.at(token, r, d) += scale * dS * q[d];
            dV.at(token, r, d) += P[t] * dO[d];
          }
        }
      }
    }
  }
  dQ.store();
  dK.store();
  dV.store();
}

const detail::Implementation<SparseAttentionBackward> kSparseAttentionBackward =
    implementation<SparseAttentionBackward>(
        "f64 f32 f16 bf16", [](const SparseAttentionBackward& args, std::span<std::byte>, Stream) {
          sparse_attention_backward(args);
        });

}  // namespace msa::reference
