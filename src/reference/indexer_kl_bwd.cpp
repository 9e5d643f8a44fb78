// SPDX-License-Identifier: Apache-2.0
#include "reference/support.hpp"

namespace msa::reference {
namespace {

/// S_idx[r, i, j] on the support (paper eq. 5).
std::vector<double> index_scores(const IndexerKlBackward& args, double scale,
                                 const core::Sequence& sequence, std::int64_t r, std::int64_t i,
                                 const std::vector<std::int64_t>& T) {
  const Row q = row_of(args.index_q, sequence.q_begin + i, r);
  std::vector<double> S_idx;
  for (std::int64_t j : T) {
    S_idx.push_back(scale *
                    dot(q, row_of(args.index_k, sequence.k_begin + j, 0), args.problem.index_dim));
  }
  return S_idx;
}

/// P[r, i, j]: the mean over the group of each head's softmax on the support (paper eq. 9).
std::vector<double> teacher(const IndexerKlBackward& args, const core::Sequence& sequence,
                            std::int64_t r, std::int64_t i, const std::vector<std::int64_t>& T) {
  const std::int64_t G = args.problem.group_size();
  std::vector<double> P(T.size(), 0.0);
  for (std::int64_t h = r * G; h < (r + 1) * G; ++h) {
    const std::vector<double> P_head = softmax(attention_scores(args, sequence, h, i, T));
    for (std::size_t t = 0; t < T.size(); ++t) P[t] += P_head[t] / static_cast<double>(G);
  }
  return P;
}

}  // namespace

void indexer_kl_backward(const IndexerKlBackward& args) {
  const Problem& problem = args.problem;
  const core::Sequences sequences(args);
  const double scale = scale_or_default(args.index_scale, problem.index_dim);
  const double N = static_cast<double>(std::max<std::int64_t>(args.q.shape[0], 1));
  const double weight = static_cast<double>(args.loss_coefficient) / (N * problem.num_kv_heads);
  Gradient dQ_idx(args.dindex_q);
  Gradient dK_idx(args.dindex_k);
  double loss = 0.0;
  for (std::int64_t n = 0; n < sequences.size(); ++n) {
    const core::Sequence sequence = sequences[n];
    for (std::int64_t i = 0; i < sequence.q_len; ++i) {
      for (std::int64_t r = 0; r < problem.num_kv_heads; ++r) {
        const std::vector<std::int64_t> T = support(args, sequence, r, i);
        const std::vector<double> P = teacher(args, sequence, r, i, T);
        const std::vector<double> S_idx = index_scores(args, scale, sequence, r, i, T);
        const std::vector<double> P_idx = softmax(S_idx);
        const double lse = log_sum_exp(S_idx);

        // KL(P || P_idx), where log P_idx[j] = S_idx[j] - lse stays finite if P_idx underflows.
        for (std::size_t t = 0; t < T.size(); ++t) {
          if (P[t] != 0.0) loss += weight * P[t] * (std::log(P[t]) - (S_idx[t] - lse));
        }
        if (!args.dindex_q.given()) continue;
        // The gradient with respect to S_idx (paper eq. 10); the teacher is a constant (eq. 11).
        const std::int64_t row = sequence.q_begin + i;
        const Row q = row_of(args.index_q, row, r);
        for (std::size_t t = 0; t < T.size(); ++t) {
          const double dS_idx = weight * (P_idx[t] - P[t]);
          const std::int64_t token = sequence.k_begin + T[t];
          const Row k = row_of(args.index_k, token, 0);
          for (std::int64_t d = 0; d < problem.index_dim; ++d) {
            dQ_idx.at(row, r, d) += scale * dS_idx * k[d];
            dK_idx.at(token, 0, d) += scale * dS_idx * q[d];
          }
        }
      }
    }
  }
  if (args.loss.given()) core::store(args.loss, loss, 0);
  dQ_idx.store();
  dK_idx.store();
}

const detail::Implementation<IndexerKlBackward> kIndexerKlBackward =
    implementation<IndexerKlBackward>(
        "f64 f32 f16 bf16", [](const IndexerKlBackward& args, std::span<std::byte>, Stream) {
          indexer_kl_backward(args);
        });

}  // namespace msa::reference
