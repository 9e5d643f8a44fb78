// SPDX-License-Identifier: Apache-2.0
//
// The binary layout of the C structs on LP64. A failing line means that programs built against an
// earlier header break: fields and enumerators may only be appended.
#include <gtest/gtest.h>

#include <cstddef>
#include <vector>

#include "msa/msa.h"

namespace {

struct Field {
  const char* name;
  std::size_t offset;
};

#define FIELD(type, field) #field, offsetof(type, field)

void expect_layout(const std::vector<std::pair<Field, std::size_t>>& fields) {
  for (const auto& [field, expected] : fields) EXPECT_EQ(field.offset, expected) << field.name;
}

TEST(AbiLayout, Tensor) {
  EXPECT_EQ(sizeof(msa_tensor), 104u);
  expect_layout({{{FIELD(msa_tensor, data)}, 0},
                 {{FIELD(msa_tensor, dtype)}, 8},
                 {{FIELD(msa_tensor, device_type)}, 12},
                 {{FIELD(msa_tensor, device_index)}, 16},
                 {{FIELD(msa_tensor, rank)}, 20},
                 {{FIELD(msa_tensor, shape)}, 24},
                 {{FIELD(msa_tensor, stride)}, 64}});
}

TEST(AbiLayout, ProblemBatchOptions) {
  EXPECT_EQ(sizeof(msa_problem), 40u);
  expect_layout({{{FIELD(msa_problem, struct_size)}, 0},
                 {{FIELD(msa_problem, num_q_heads)}, 8},
                 {{FIELD(msa_problem, num_kv_heads)}, 12},
                 {{FIELD(msa_problem, head_dim)}, 16},
                 {{FIELD(msa_problem, index_dim)}, 20},
                 {{FIELD(msa_problem, block_size)}, 24},
                 {{FIELD(msa_problem, top_k)}, 28},
                 {{FIELD(msa_problem, num_init_blocks)}, 32},
                 {{FIELD(msa_problem, num_local_blocks)}, 36}});
  EXPECT_EQ(sizeof(msa_batch), 440u);
  expect_layout({{{FIELD(msa_batch, cu_seqlens_q)}, 8},
                 {{FIELD(msa_batch, cu_seqlens_k)}, 112},
                 {{FIELD(msa_batch, page_table)}, 216},
                 {{FIELD(msa_batch, seq_lens_k)}, 320},
                 {{FIELD(msa_batch, max_seq_len_q)}, 424},
                 {{FIELD(msa_batch, max_seq_len_k)}, 432}});
  EXPECT_EQ(sizeof(msa_options), 24u);
  expect_layout(
      {{{FIELD(msa_options, backend)}, 8}, {{FIELD(msa_options, allow_nondeterministic)}, 16}});
}

TEST(AbiLayout, Operations) {
  EXPECT_EQ(sizeof(msa_indexer_scores), 344u);
  expect_layout({{{FIELD(msa_indexer_scores, problem)}, 8},
                 {{FIELD(msa_indexer_scores, batch)}, 16},
                 {{FIELD(msa_indexer_scores, index_q)}, 24},
                 {{FIELD(msa_indexer_scores, index_k)}, 128},
                 {{FIELD(msa_indexer_scores, index_scale)}, 232},
                 {{FIELD(msa_indexer_scores, block_scores)}, 240}});
  EXPECT_EQ(sizeof(msa_select_top_k), 232u);
  expect_layout(
      {{{FIELD(msa_select_top_k, block_scores)}, 24}, {{FIELD(msa_select_top_k, block_ids)}, 128}});
  EXPECT_EQ(sizeof(msa_indexer), 544u);
  expect_layout({{{FIELD(msa_indexer, index_q)}, 24},
                 {{FIELD(msa_indexer, index_k)}, 128},
                 {{FIELD(msa_indexer, block_ids)}, 232},
                 {{FIELD(msa_indexer, index_k_codes)}, 336},
                 {{FIELD(msa_indexer, index_k_scales)}, 440}});
  EXPECT_EQ(sizeof(msa_indexed_attention_forward), 1280u);
  expect_layout({{{FIELD(msa_indexed_attention_forward, index_q)}, 24},
                 {{FIELD(msa_indexed_attention_forward, index_k)}, 128},
                 {{FIELD(msa_indexed_attention_forward, index_k_codes)}, 232},
                 {{FIELD(msa_indexed_attention_forward, index_k_scales)}, 336},
                 {{FIELD(msa_indexed_attention_forward, q)}, 440},
                 {{FIELD(msa_indexed_attention_forward, k)}, 544},
                 {{FIELD(msa_indexed_attention_forward, v)}, 648},
                 {{FIELD(msa_indexed_attention_forward, softmax_scale)}, 752},
                 {{FIELD(msa_indexed_attention_forward, block_ids)}, 760},
                 {{FIELD(msa_indexed_attention_forward, out)}, 864},
                 {{FIELD(msa_indexed_attention_forward, lse)}, 968},
                 {{FIELD(msa_indexed_attention_forward, k_scale)}, 1072},
                 {{FIELD(msa_indexed_attention_forward, v_scale)}, 1176}});
  EXPECT_EQ(sizeof(msa_sparse_attention_forward), 864u);
  expect_layout({{{FIELD(msa_sparse_attention_forward, q)}, 24},
                 {{FIELD(msa_sparse_attention_forward, k)}, 128},
                 {{FIELD(msa_sparse_attention_forward, v)}, 232},
                 {{FIELD(msa_sparse_attention_forward, block_ids)}, 336},
                 {{FIELD(msa_sparse_attention_forward, softmax_scale)}, 440},
                 {{FIELD(msa_sparse_attention_forward, out)}, 448},
                 {{FIELD(msa_sparse_attention_forward, lse)}, 552},
                 {{FIELD(msa_sparse_attention_forward, k_scale)}, 656},
                 {{FIELD(msa_sparse_attention_forward, v_scale)}, 760}});
  EXPECT_EQ(sizeof(msa_dense_attention_forward), 760u);
  expect_layout({{{FIELD(msa_dense_attention_forward, softmax_scale)}, 336},
                 {{FIELD(msa_dense_attention_forward, out)}, 344},
                 {{FIELD(msa_dense_attention_forward, lse)}, 448},
                 {{FIELD(msa_dense_attention_forward, k_scale)}, 552},
                 {{FIELD(msa_dense_attention_forward, v_scale)}, 656}});
  EXPECT_EQ(sizeof(msa_sparse_attention_backward), 1072u);
  expect_layout({{{FIELD(msa_sparse_attention_backward, block_ids)}, 336},
                 {{FIELD(msa_sparse_attention_backward, out)}, 440},
                 {{FIELD(msa_sparse_attention_backward, lse)}, 544},
                 {{FIELD(msa_sparse_attention_backward, dout)}, 648},
                 {{FIELD(msa_sparse_attention_backward, softmax_scale)}, 752},
                 {{FIELD(msa_sparse_attention_backward, dq)}, 760},
                 {{FIELD(msa_sparse_attention_backward, dk)}, 864},
                 {{FIELD(msa_sparse_attention_backward, dv)}, 968}});
  EXPECT_EQ(sizeof(msa_indexer_kl_backward), 976u);
  expect_layout({{{FIELD(msa_indexer_kl_backward, index_q)}, 232},
                 {{FIELD(msa_indexer_kl_backward, index_k)}, 336},
                 {{FIELD(msa_indexer_kl_backward, block_ids)}, 440},
                 {{FIELD(msa_indexer_kl_backward, softmax_scale)}, 544},
                 {{FIELD(msa_indexer_kl_backward, index_scale)}, 548},
                 {{FIELD(msa_indexer_kl_backward, loss_coefficient)}, 552},
                 {{FIELD(msa_indexer_kl_backward, loss)}, 560},
                 {{FIELD(msa_indexer_kl_backward, dindex_q)}, 664},
                 {{FIELD(msa_indexer_kl_backward, dindex_k)}, 768},
                 {{FIELD(msa_indexer_kl_backward, lse)}, 872}});
  EXPECT_EQ(sizeof(msa_append_kv), 856u);
  expect_layout({{{FIELD(msa_append_kv, k)}, 24},
                 {{FIELD(msa_append_kv, v)}, 128},
                 {{FIELD(msa_append_kv, index_k)}, 232},
                 {{FIELD(msa_append_kv, k_pages)}, 336},
                 {{FIELD(msa_append_kv, v_pages)}, 440},
                 {{FIELD(msa_append_kv, index_k_pages)}, 544},
                 {{FIELD(msa_append_kv, index_k_codes_pages)}, 648},
                 {{FIELD(msa_append_kv, index_k_scales_pages)}, 752}});
  EXPECT_EQ(sizeof(msa_norm_rope_append_kv), 2112u);
  expect_layout({{{FIELD(msa_norm_rope_append_kv, q)}, 24},
                 {{FIELD(msa_norm_rope_append_kv, k)}, 128},
                 {{FIELD(msa_norm_rope_append_kv, v)}, 232},
                 {{FIELD(msa_norm_rope_append_kv, index_q)}, 336},
                 {{FIELD(msa_norm_rope_append_kv, index_k)}, 440},
                 {{FIELD(msa_norm_rope_append_kv, q_weight)}, 544},
                 {{FIELD(msa_norm_rope_append_kv, k_weight)}, 648},
                 {{FIELD(msa_norm_rope_append_kv, index_q_weight)}, 752},
                 {{FIELD(msa_norm_rope_append_kv, index_k_weight)}, 856},
                 {{FIELD(msa_norm_rope_append_kv, norm_eps)}, 960},
                 {{FIELD(msa_norm_rope_append_kv, norm_weight_offset)}, 964},
                 {{FIELD(msa_norm_rope_append_kv, cos_sin)}, 968},
                 {{FIELD(msa_norm_rope_append_kv, positions)}, 1072},
                 {{FIELD(msa_norm_rope_append_kv, q_out)}, 1176},
                 {{FIELD(msa_norm_rope_append_kv, index_q_out)}, 1280},
                 {{FIELD(msa_norm_rope_append_kv, k_pages)}, 1384},
                 {{FIELD(msa_norm_rope_append_kv, v_pages)}, 1488},
                 {{FIELD(msa_norm_rope_append_kv, index_k_pages)}, 1592},
                 {{FIELD(msa_norm_rope_append_kv, index_k_codes_pages)}, 1696},
                 {{FIELD(msa_norm_rope_append_kv, index_k_scales_pages)}, 1800},
                 {{FIELD(msa_norm_rope_append_kv, k_scale)}, 1904},
                 {{FIELD(msa_norm_rope_append_kv, v_scale)}, 2008}});
}

template <class T>
void expect_head() {
  EXPECT_EQ(offsetof(T, struct_size), 0u);
  EXPECT_EQ(offsetof(T, problem), 8u);
  EXPECT_EQ(offsetof(T, batch), 16u);
  // What struct_size is checked for: no field is cut in two.
  EXPECT_EQ(alignof(T), 8u);
  EXPECT_EQ(sizeof(T) % 8, 0u);
}

TEST(AbiLayout, OperationsBeginAlike) {
  EXPECT_EQ(offsetof(msa_batch, struct_size), 0u);
  EXPECT_EQ(offsetof(msa_options, struct_size), 0u);
  expect_head<msa_indexer_scores>();
  expect_head<msa_select_top_k>();
  expect_head<msa_indexer>();
  expect_head<msa_indexed_attention_forward>();
  expect_head<msa_sparse_attention_forward>();
  expect_head<msa_dense_attention_forward>();
  expect_head<msa_sparse_attention_backward>();
  expect_head<msa_indexer_kl_backward>();
  expect_head<msa_append_kv>();
  expect_head<msa_norm_rope_append_kv>();
  expect_layout({{{FIELD(msa_dense_attention_forward, q)}, 24},
                 {{FIELD(msa_dense_attention_forward, k)}, 128},
                 {{FIELD(msa_dense_attention_forward, v)}, 232},
                 {{FIELD(msa_sparse_attention_backward, q)}, 24},
                 {{FIELD(msa_sparse_attention_backward, k)}, 128},
                 {{FIELD(msa_sparse_attention_backward, v)}, 232},
                 {{FIELD(msa_indexer_kl_backward, q)}, 24},
                 {{FIELD(msa_indexer_kl_backward, k)}, 128}});
}

TEST(AbiLayout, Enumerators) {
  EXPECT_EQ(MSA_MAX_RANK, 5);
  const int statuses[] = {MSA_OK,         MSA_INVALID_ARGUMENT, MSA_UNSUPPORTED, MSA_OUT_OF_MEMORY,
                          MSA_CUDA_ERROR, MSA_INTERNAL};
  for (int i = 0; i < 6; ++i) EXPECT_EQ(statuses[i], i);
  const int dtypes[] = {MSA_F32, MSA_F64, MSA_F16, MSA_BF16, MSA_E4M3, MSA_I8, MSA_I32};
  for (int i = 0; i < 7; ++i) EXPECT_EQ(dtypes[i], i);
  EXPECT_EQ(MSA_CPU, 0);
  EXPECT_EQ(MSA_CUDA, 1);
}

}  // namespace
