// SPDX-License-Identifier: Apache-2.0
//
// An engine's steps: chunks of prompts and decoding requests mixed, in shape buckets planned once.
// What a step leaves empty of its bucket is padding: queries of a sequence without keys.
#include <cstdio>

#include "example.hpp"

namespace {

using example::Floats, example::Ints, example::Planned, example::Projections, std::int64_t;
constexpr int64_t kPages = 16, kBlock = 128;
constexpr msa::Problem kModel{
    .num_q_heads = 4, .num_kv_heads = 1, .head_dim = 64, .index_dim = 64, .top_k = 2};
const auto kCache = {kPages, int64_t{1}, kBlock, int64_t{64}};
std::uint32_t token_of(int64_t s, int64_t i) { return static_cast<std::uint32_t>(1000 * s + i); }

struct Engine {  // one layer
  msa::PagedKvCache pages{kPages, kBlock};
  Floats k{kCache}, v{kCache}, index_k{kCache};
  int64_t padding = pages.create();  // a sequence that stays empty
};

struct Bucket {  // room for a number of requests and of query tokens
  Bucket(Engine& e, int64_t requests, int64_t tokens)
      : engine(e),
        offsets({requests + 2}),
        lengths({requests + 1}),
        table({requests + 1, kPages}),
        ids({1, tokens, kModel.top_k}),
        x(tokens, 4, 64),
        out({tokens, 4, 64}) {}
  void run(std::span<const int64_t> sequences, std::span<const int64_t> new_tokens) {
    std::vector<int64_t> all(lengths.values().size(), engine.padding);
    std::ranges::fill(offsets.values(), static_cast<std::int32_t>(out.size(0)));
    std::int32_t row = offsets.values()[0] = 0;
    for (std::size_t r = 0; r < sequences.size(); ++r) {
      const int64_t s = all[r] = sequences[r], begin = engine.pages.length(s);
      engine.pages.append(s, new_tokens[r]);
      for (int64_t i = 0; i < new_tokens[r]; ++i) x.set(row++, token_of(s, begin + i));
      offsets.values()[r + 1] = row;
    }
    engine.pages.fill(all, table, lengths);
    append.run(), indexer.run(), attention.run();
  }
  Engine& engine;
  Ints offsets, lengths, table, ids;
  Projections x;
  Floats out;
  msa::Batch batch{.cu_seqlens_q = offsets, .page_table = table, .seq_lens_k = lengths};
  Planned<msa::AppendKv> append{
      {kModel, batch, x.k, x.v, x.index_k, engine.k, engine.v, engine.index_k, {}, {}}};
  Planned<msa::Indexer> indexer{{kModel, batch, x.index_q, engine.index_k, {}, {}, ids}};
  Planned<msa::SparseAttentionForward> attention{
      {kModel, batch, x.q, engine.k, engine.v, ids, 0.0f, out, {}, {}, {}}};
};

}  // namespace

int main() {
  Engine e;
  Bucket chunk(e, 3, 100), decode(e, 4, 4);
  const int64_t all[] = {e.pages.create(), e.pages.create(), e.pages.create()};
  const int64_t first[] = {97}, second[] = {30, 60}, mixed[] = {1, 1, 90}, one[] = {1, 1, 1};
  chunk.run({all, 1}, first);
  chunk.run({all, 2}, second);
  for (int i = 0; i < 3; ++i) chunk.run(all, mixed);
  for (int i = 0; i < 20; ++i) decode.run(all, one);
  const int64_t tokens = e.pages.length(all[2]);  // the same request alone and in one piece
  Projections alone(tokens, 4, 64);
  const Ints ids({1, tokens, kModel.top_k});
  Floats whole({tokens, 4, 64});
  for (int64_t i = 0; i < tokens; ++i) alone.set(i, token_of(all[2], i));
  example::attend(kModel, {}, alone, alone.k, alone.v, alone.index_k, ids, whole);
  const float error = example::largest_difference(whole.row(tokens - 1), decode.out.row(2));
  std::printf("%d tokens; distance %g\n", static_cast<int>(tokens), static_cast<double>(error));
  // Means of 256 values in [-1, 1] whose logits are within 8: f32 sums differ by 256 * 8 * 2^-24.
  return error < 1.3e-4f ? 0 : 1;
}
