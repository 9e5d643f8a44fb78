// SPDX-License-Identifier: Apache-2.0
//
// Sparse attention on your own tensors: one query finds one token among 65,536 by reading 16 blocks
// of 128 tokens.
//
// Expected output: the number of tokens read and a distance of 0 up to 2e-5 from that token's
// value.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "msa/msa.hpp"

namespace {

constexpr std::int64_t kTokens = 65536, kNeedle = 12345, kDim = 128;

// A workspace is aligned to 64 bytes.
struct alignas(64) Line {
  std::byte bytes[64];
};

template <class Args>
void run(const Args& args) {
  const auto plan = msa::plan(args);  // checks every shape, then picks the best backend
  std::vector<Line> workspace(plan.workspace_bytes() / sizeof(Line) + 1);
  plan.run(args, std::as_writable_bytes(std::span(workspace)));
}

template <class T>
msa::TensorView view(std::vector<T>& data, std::int64_t rows, std::int64_t heads) {
  const auto dtype = std::is_same_v<T, float> ? msa::DType::f32 : msa::DType::i32;
  const auto size = static_cast<std::int64_t>(data.size());
  return msa::TensorView::contiguous(data.data(), dtype, {}, {rows, heads, size / rows / heads});
}

}  // namespace

int main() {
  const msa::Problem problem{.num_q_heads = 4, .num_kv_heads = 1};  // 16 blocks of 128 tokens
  std::mt19937 random(1);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> q(4 * kDim, 1.0f), index_q(kDim, 1.0f), out(4 * kDim);
  std::vector<float> k(kTokens * kDim), v(kTokens * kDim), index_k(kTokens * kDim);
  for (auto* tensor : {&k, &v, &index_k}) {
    for (float& x : *tensor) x = uniform(random);
  }
  for (std::int64_t i = kNeedle * kDim; i < (kNeedle + 1) * kDim; ++i) {
    const auto at = static_cast<std::size_t>(i);
    index_k[at] = 1.0f;  // the index query's own direction: the needle's block scores best
    k[at] = 2.0f;        // a logit of 2 * 128 / sqrt(128) = 22.6; the others stay below 4
  }

  std::vector<std::int32_t> block_ids(16);
  run(msa::Indexer{.problem = problem,
                   .index_q = view(index_q, 1, 1),
                   .index_k = view(index_k, kTokens, 1),
                   .block_ids = view(block_ids, 1, 1)});
  run(msa::SparseAttentionForward{.problem = problem,
                                  .q = view(q, 1, 4),
                                  .k = view(k, kTokens, 1),
                                  .v = view(v, kTokens, 1),
                                  .block_ids = view(block_ids, 1, 1),
                                  .out = view(out, 1, 4)});

  // exp(22.6) against at most 2048 * exp(4) for the rest: its weight is above 1 - 2e-5.
  float error = 0.0f;
  for (std::size_t i = 0; i < out.size(); ++i) {
    error = std::fmax(error, std::fabs(out[i] - v[kNeedle * kDim + i % kDim]));
  }
  std::printf("read %d of %d tokens; distance from the needle's value: %g\n", 16 * 128,
              static_cast<int>(kTokens), static_cast<double>(error));
  return error < 1e-4f ? 0 : 1;
}
