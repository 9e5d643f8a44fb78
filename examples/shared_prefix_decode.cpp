// SPDX-License-Identifier: Apache-2.0
//
// A decode loop on a paged cache that two sequences with a common prefix share: the prefix is
// computed and stored once, ends inside a block, and each sequence goes on with tokens of its own.
//
// Expected output: 4 pages in use (two caches apart would need 6), one page copied, and a distance
// of 0 up to f32 rounding from the same sequences computed alone and in one piece.
#include <cstdio>

#include "example.hpp"

namespace {

using example::Floats, example::Ints, example::Projections;

constexpr std::int64_t kPrefix = 300, kTokens = 320, kPages = 8, kBlock = 128;
constexpr int kHeads = 4, kDim = 64, kTopK = 2;
constexpr msa::Problem kProblem{
    .num_q_heads = kHeads, .num_kv_heads = 1, .head_dim = kDim, .index_dim = kDim, .top_k = kTopK};

std::uint32_t token_of(std::int64_t sequence, std::int64_t position) {
  const std::int64_t token = position < kPrefix ? position : 1000 * (sequence + 1) + position;
  return static_cast<std::uint32_t>(token);
}

}  // namespace

int main() {
  msa::PagedKvCache cache(kPages, kBlock);
  const auto shape = {kPages, std::int64_t{1}, kBlock, std::int64_t{kDim}};
  Floats k(shape), v(shape), index_k(shape);
  int num_copies = 0;
  const auto step = [&](std::span<const std::int64_t> sequences, const Projections& x,
                        Floats& out) {
    const auto count = static_cast<std::int64_t>(sequences.size());
    const std::int64_t tokens = out.size(0);
    for (const std::int64_t sequence : sequences) {
      const auto copy = cache.append(sequence, tokens / count);
      if (!copy) continue;
      for (Floats* pages : {&k, &v, &index_k}) {  // a shared page that is about to be written
        const auto destination = pages->row(copy->destination_page).begin();
        std::ranges::copy(pages->row(copy->source_page), destination);
      }
      ++num_copies;
    }
    const Ints page_table({count, kPages}), seq_lens_k({count}), ids({1, tokens, kTopK});
    cache.fill(sequences, page_table, seq_lens_k);
    const msa::Batch batch{.page_table = page_table, .seq_lens_k = seq_lens_k};
    msa::AppendKv append{.problem = kProblem, .batch = batch, .k = x.k, .v = x.v};
    append.index_k = x.index_k, append.k_pages = k, append.v_pages = v;
    append.index_k_pages = index_k;
    example::run(append);
    example::attend(kProblem, batch, x, k, v, index_k, ids, out);
  };

  Projections prefix(kPrefix, kHeads, kDim), newest(2, kHeads, kDim);
  Floats prefix_out({kPrefix, kHeads, kDim}), out({2, kHeads, kDim});
  float error = 0.0f;
  for (std::int64_t i = 0; i < kPrefix; ++i) prefix.set(i, token_of(0, i));
  std::int64_t both[2] = {cache.create(), 0};
  step({both, 1}, prefix, prefix_out);
  both[1] = cache.fork(both[0], kPrefix);  // shares three pages, the last with 44 of 128 tokens
  for (std::int64_t i = kPrefix; i < kTokens; ++i) {
    for (std::int64_t s : {0, 1}) newest.set(s, token_of(s, i));
    step(both, newest, out);
  }
  for (std::int64_t s : {0, 1}) {
    Projections alone(kTokens, kHeads, kDim);
    const Ints ids({1, kTokens, kTopK});
    Floats whole({kTokens, kHeads, kDim});
    for (std::int64_t i = 0; i < kTokens; ++i) alone.set(i, token_of(s, i));
    example::attend(kProblem, {}, alone, alone.k, alone.v, alone.index_k, ids, whole);
    error = std::max(error, example::largest_difference(whole.row(kTokens - 1), out.row(s)));
  }
  const int used = static_cast<int>(kPages - cache.num_free_pages());
  std::printf("%d pages, %d copied; distance %g\n", used, num_copies, static_cast<double>(error));
  // Means of 256 values in [-1, 1] whose logits are within 8: f32 sums differ by 256 * 8 * 2^-24.
  return used == 4 && num_copies == 1 && error < 1.3e-4f ? 0 : 1;
}
