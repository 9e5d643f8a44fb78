// SPDX-License-Identifier: Apache-2.0
//
// One operation and one error through the installed C++ headers.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "msa/msa.hpp"

int main() {
  const float hidden = -std::numeric_limits<float>::infinity();
  std::vector<float> scores{1.0f, 3.0f, 2.0f, 0.0f, hidden};
  std::vector<std::int32_t> block_ids(3);
  std::vector<std::int32_t> seq_lens_k{64};  // the query is token 63: blocks 0 to 3 are visible
  msa::SelectTopK args{
      .problem = {.num_q_heads = 1, .num_kv_heads = 1, .block_size = 16, .top_k = 3},
      .batch = {.seq_lens_k =
                    msa::TensorView::contiguous(seq_lens_k.data(), msa::DType::i32, {}, {1})},
      .block_scores = msa::TensorView::contiguous(scores.data(), msa::DType::f32, {}, {1, 1, 5}),
      .block_ids = msa::TensorView::contiguous(block_ids.data(), msa::DType::i32, {}, {1, 1, 3})};
  const auto plan = msa::plan(args, {.backend = "reference"});
  plan.run(args);
  const std::vector<std::int32_t> expected{1, 2, 3};  // the local block 3, then the best two
  if (block_ids != expected) {
    std::printf("selected %d %d %d\n", block_ids[0], block_ids[1], block_ids[2]);
    return 1;
  }

  args.problem.top_k = 0;
  try {
    (void)msa::plan(args);
  } catch (const msa::Error& error) {
    std::printf("msa %s: %s\n", msa::version(), error.what());
    return error.code() == msa::ErrorCode::invalid_argument ? 0 : 1;
  }
  return 1;
}
