// SPDX-License-Identifier: Apache-2.0
//
// The training side: gradient steps on both losses of a sparse layer. SparseAttentionBackward fits
// the attention's output to a target; IndexerKlBackward aligns the index branch with what the
// attention weighs, on the blocks that the indexer itself chooses anew in every step.
//
// Expected output: both losses at the first and the last step; each ends below half of its start.
#include <cstdio>

#include "example.hpp"

namespace {

using example::Floats, example::Projections;

constexpr std::int64_t kTokens = 192, kSteps = 60;
constexpr int kHeads = 4, kDim = 16, kTopK = 3;
constexpr msa::Problem kProblem{.num_q_heads = kHeads,
                                .num_kv_heads = 1,
                                .head_dim = kDim,
                                .index_dim = kDim,
                                .block_size = 16,
                                .top_k = kTopK};
constexpr float kTarget = 0.25f;  // of every element of the output

void descend(Floats& parameter, Floats& gradient, float rate) {
  for (std::size_t i = 0; i < parameter.values().size(); ++i) {
    parameter.values()[i] -= rate * gradient.values()[i];
  }
}

}  // namespace

int main() {
  Projections x(kTokens, kHeads, kDim), dx(kTokens, kHeads, kDim);
  Floats out({kTokens, kHeads, kDim}), dout({kTokens, kHeads, kDim});
  Floats lse({kTokens, kHeads}), loss({1});
  const example::Ints ids({1, kTokens, kTopK});
  for (std::int64_t i = 0; i < kTokens; ++i) x.set(i, static_cast<std::uint32_t>(i));

  float fit_first = 0.0f, fit = 0.0f, kl_first = 0.0f;
  for (std::int64_t step = 0; step < kSteps; ++step) {
    example::attend(kProblem, {}, x, x.k, x.v, x.index_k, ids, out, lse);
    fit = 0.0f;  // half the squared distance; dout is its gradient
    for (std::size_t i = 0; i < out.values().size(); ++i) {
      dout.values()[i] = out.values()[i] - kTarget;
      fit += 0.5f * dout.values()[i] * dout.values()[i];
    }
    msa::SparseAttentionBackward backward{.problem = kProblem, .q = x.q, .k = x.k, .v = x.v};
    backward.block_ids = ids;
    backward.out = out, backward.lse = lse, backward.dout = dout;
    backward.dq = dx.q, backward.dk = dx.k, backward.dv = dx.v;
    example::run(backward);
    msa::IndexerKlBackward align{.problem = kProblem, .q = x.q, .k = x.k, .index_q = x.index_q};
    align.index_k = x.index_k, align.block_ids = ids, align.loss = loss;
    align.dindex_q = dx.index_q, align.dindex_k = dx.index_k;
    example::run(align);
    if (step == 0) fit_first = fit, kl_first = loss.values()[0];
    for (auto part : {&Projections::q, &Projections::k, &Projections::v}) {
      descend(x.*part, dx.*part, 0.1f);
    }
    // The KL loss is a mean over tokens, so its gradients are small.
    for (auto part : {&Projections::index_q, &Projections::index_k}) {
      descend(x.*part, dx.*part, 60.0f);
    }
  }
  const float kl = loss.values()[0];
  std::printf("squared distance %g -> %g, indexer's KL %g -> %g\n", static_cast<double>(fit_first),
              static_cast<double>(fit), static_cast<double>(kl_first), static_cast<double>(kl));
  return fit < 0.5f * fit_first && kl < 0.5f * kl_first ? 0 : 1;
}
