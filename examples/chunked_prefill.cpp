// SPDX-License-Identifier: Apache-2.0
//
// What an engine's scheduler does: prompts of several lengths go through in steps of at most 64
// tokens, mixed as they come, on a paged cache. The result is that of one ragged batch in one
// piece.
//
// Expected output: the number of steps and a distance of 0 up to f32 rounding.
#include <cstdio>

#include "example.hpp"

namespace {

using example::Floats, example::Ints, example::Projections;

constexpr std::int64_t kLengths[] = {333, 41, 200}, kTotal = 574, kBudget = 64, kPages = 6;
constexpr int kHeads = 4, kDim = 64, kBlock = 128, kTopK = 2;
constexpr msa::Problem kProblem{
    .num_q_heads = kHeads, .num_kv_heads = 1, .head_dim = kDim, .index_dim = kDim, .top_k = kTopK};

}  // namespace

int main() {
  // In one piece: ragged keys, sequence s in rows cu_seqlens[s] to cu_seqlens[s + 1].
  Projections all(kTotal, kHeads, kDim);
  Floats expected({kTotal, kHeads, kDim}), result({kTotal, kHeads, kDim});
  for (std::int64_t i = 0; i < kTotal; ++i) all.set(i, static_cast<std::uint32_t>(i));
  Ints cu_seqlens({4});
  for (std::size_t s = 0; s < 3; ++s) {
    cu_seqlens.values()[s + 1] = cu_seqlens.values()[s] + static_cast<std::int32_t>(kLengths[s]);
  }
  example::attend(kProblem, {.cu_seqlens_q = cu_seqlens, .cu_seqlens_k = cu_seqlens}, all, all.k,
                  all.v, all.index_k, Ints({1, kTotal, kTopK}), expected);

  msa::PagedKvCache cache(kPages, kBlock);
  const Floats k({kPages, 1, kBlock, kDim}), v({kPages, 1, kBlock, kDim}),
      index_k({kPages, 1, kBlock, kDim});
  const std::int64_t sequences[] = {cache.create(), cache.create(), cache.create()};
  int num_steps = 0;
  for (std::int64_t left = kTotal; left > 0; ++num_steps) {
    // A third of the budget each; what a sequence does not need goes to the later ones.
    Ints cu_seqlens_q({4});
    std::vector<std::int64_t> rows;  // of the ragged batch
    for (std::size_t s = 0; s < 3; ++s) {
      const std::int64_t done = cache.length(sequences[s]);
      const std::int64_t fair = (kBudget - std::ssize(rows)) / static_cast<std::int64_t>(3 - s);
      const std::int64_t count = std::min(fair, kLengths[s] - done);
      for (std::int64_t i = done; i < done + count; ++i) rows.push_back(cu_seqlens.values()[s] + i);
      cache.append(sequences[s], count);
      cu_seqlens_q.values()[s + 1] = static_cast<std::int32_t>(rows.size());
    }
    Projections some(std::ssize(rows), kHeads, kDim);
    Floats out({std::ssize(rows), kHeads, kDim});
    for (std::size_t i = 0; i < rows.size(); ++i) {
      some.set(static_cast<std::int64_t>(i), static_cast<std::uint32_t>(rows[i]));
    }
    const Ints page_table({3, kPages}), seq_lens_k({3}), ids({1, std::ssize(rows), kTopK});
    cache.fill(sequences, page_table, seq_lens_k);
    const msa::Batch batch{
        .cu_seqlens_q = cu_seqlens_q, .page_table = page_table, .seq_lens_k = seq_lens_k};
    msa::AppendKv append{.problem = kProblem, .batch = batch, .k = some.k, .v = some.v};
    append.index_k = some.index_k;
    append.k_pages = k, append.v_pages = v, append.index_k_pages = index_k;
    example::run(append);
    example::attend(kProblem, batch, some, k, v, index_k, ids, out);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      std::ranges::copy(out.row(static_cast<std::int64_t>(i)), result.row(rows[i]).begin());
    }
    left -= std::ssize(rows);
  }
  const float error = example::largest_difference(expected.values(), result.values());
  std::printf("%d steps; distance %g\n", num_steps, static_cast<double>(error));
  // Means of 256 values in [-1, 1] whose logits are within 8: f32 sums differ by 256 * 8 * 2^-24.
  return num_steps >= kTotal / kBudget && error < 1.3e-4f ? 0 : 1;
}
