// SPDX-License-Identifier: Apache-2.0
//
// A fraction is no number of blocks.
#include "msa/msa.hpp"

#if defined(MSA_MUST_FAIL)
constexpr double kBlocks = 16.5;
#else
constexpr int kBlocks = 16;
#endif

msa::Problem problem() { return {.num_q_heads = 16, .num_kv_heads = 1, .top_k = kBlocks}; }
