/* SPDX-License-Identifier: Apache-2.0
 *
 * The C ABI used from C11: select, attend and every kind of failure. Prints the first failed line.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "msa/msa.h"

#define EXPECT(condition)                                                            \
  do {                                                                               \
    if (!(condition)) {                                                              \
      fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition, \
              msa_last_error());                                                     \
      return 1;                                                                      \
    }                                                                                \
  } while (0)

enum { kTokens = 40, kHeads = 2, kDim = 8, kTopK = 2 };

static msa_tensor tensor(void* data, msa_dtype dtype, int64_t a, int64_t b, int64_t c) {
  msa_tensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.dtype = dtype;
  t.rank = 3;
  t.shape[0] = a;
  t.shape[1] = b;
  t.shape[2] = c;
  t.stride[0] = b * c;
  t.stride[1] = c;
  t.stride[2] = 1;
  return t;
}

int main(void) {
  static float q[kTokens * kHeads * kDim], k[kTokens * kDim], v[kTokens * kDim];
  static float out[kTokens * kHeads * kDim];
  static int32_t ids[kTokens * kTopK];
  for (int i = 0; i < kTokens * kHeads * kDim; ++i) q[i] = (float)(i % 7) - 3.0f;
  for (int i = 0; i < kTokens * kDim; ++i) {
    k[i] = (float)(i % 5) - 2.0f;
    v[i] = (float)(i / kDim); /* every value of token t is t */
  }

  msa_problem problem = {.struct_size = sizeof problem,
                         .num_q_heads = kHeads,
                         .num_kv_heads = 1,
                         .head_dim = kDim,
                         .index_dim = kDim,
                         .block_size = 16,
                         .top_k = kTopK};
  msa_indexer indexer = {.struct_size = sizeof indexer,
                         .problem = &problem,
                         .index_q = tensor(q, MSA_F32, kTokens, kHeads, kDim),
                         .index_k = tensor(k, MSA_F32, kTokens, 1, kDim),
                         .block_ids = tensor(ids, MSA_I32, 1, kTokens, kTopK)};
  msa_plan* plan = NULL;
  EXPECT(msa_plan_indexer(&indexer, NULL, &plan) == MSA_INVALID_ARGUMENT);
  EXPECT(plan == NULL);
  EXPECT(strcmp(msa_last_error(),
                "Indexer: index_q has shape [40, 2, 8], expected [total_q, num_kv_heads=1, "
                "index_dim=8]") == 0);

  /* The first query head doubles as the index query: a strided view, no copy. */
  indexer.index_q.shape[1] = 1;
  EXPECT(msa_plan_indexer(&indexer, NULL, &plan) == MSA_OK);
  EXPECT(strcmp(msa_last_error(), "") == 0);
  EXPECT(msa_plan_implementation(plan) != NULL);
  size_t bytes = (msa_plan_workspace_bytes(plan) + 63) / 64 * 64;
  void* workspace = aligned_alloc(64, bytes == 0 ? 64 : bytes);
  EXPECT(msa_run_indexer(plan, &indexer, workspace, bytes, NULL) == MSA_OK);
  free(workspace);
  EXPECT(ids[0] == 0 && ids[1] == -1);                     /* token 0 sees its own block only */
  EXPECT(ids[39 * kTopK + 1] == 2 && ids[39 * kTopK] < 2); /* ascending, local block last */

  msa_sparse_attention_forward attention = {.struct_size = sizeof attention,
                                            .problem = &problem,
                                            .q = tensor(q, MSA_F32, kTokens, kHeads, kDim),
                                            .k = tensor(k, MSA_F32, kTokens, 1, kDim),
                                            .v = tensor(v, MSA_F32, kTokens, 1, kDim),
                                            .block_ids = indexer.block_ids,
                                            .out = tensor(out, MSA_F32, kTokens, kHeads, kDim)};
  EXPECT(msa_run_sparse_attention_forward(plan, &attention, NULL, 0, NULL) == MSA_INVALID_ARGUMENT);
  EXPECT(strstr(msa_last_error(), "another operation") != NULL);
  msa_plan_destroy(plan);

  msa_options options = {.struct_size = sizeof options, .backend = "reference"};
  EXPECT(msa_plan_sparse_attention_forward(&attention, &options, &plan) == MSA_OK);
  EXPECT(strcmp(msa_plan_implementation(plan), "reference") == 0);
  EXPECT(msa_run_sparse_attention_forward(plan, &attention, NULL, 0, NULL) == MSA_OK);
  EXPECT(out[0] == 0.0f); /* token 0 sees only value 0 */
  for (int i = 0; i < kHeads * kDim; ++i)
    EXPECT(out[kHeads * kDim + i] > 0.0f && out[kHeads * kDim + i] < 1.0f);
  attention.q.shape[0] = 39;
  EXPECT(msa_run_sparse_attention_forward(plan, &attention, NULL, 0, NULL) == MSA_INVALID_ARGUMENT);
  EXPECT(strstr(msa_last_error(), "q is f32[39, 2, 8], planned was f32[40, 2, 8]") != NULL);
  msa_plan_destroy(plan);

  options.backend = "abacus";
  attention.q.shape[0] = kTokens;
  EXPECT(msa_plan_sparse_attention_forward(&attention, &options, &plan) == MSA_UNSUPPORTED);
  EXPECT(strstr(msa_last_error(), "no implementation is named 'abacus'") != NULL);

  /* A struct from an older header is shorter; one from a newer header may be longer, but only with
   * zeros where this library knows nothing. */
  struct {
    msa_options known;
    int64_t later;
  } newer = {.known = {.struct_size = sizeof newer}, .later = 0};
  EXPECT(msa_plan_sparse_attention_forward(&attention, &newer.known, &plan) == MSA_OK);
  msa_plan_destroy(plan);
  newer.later = 1;
  EXPECT(msa_plan_sparse_attention_forward(&attention, &newer.known, &plan) ==
         MSA_INVALID_ARGUMENT);
  attention.struct_size = 12; /* half of a pointer */
  EXPECT(msa_plan_sparse_attention_forward(&attention, NULL, &plan) == MSA_INVALID_ARGUMENT);
  attention.struct_size = 0;
  EXPECT(msa_plan_sparse_attention_forward(&attention, NULL, &plan) == MSA_INVALID_ARGUMENT);
  EXPECT(msa_plan_sparse_attention_forward(NULL, NULL, &plan) == MSA_INVALID_ARGUMENT);
  attention.struct_size = sizeof attention;
  attention.problem = NULL;
  EXPECT(msa_plan_sparse_attention_forward(&attention, NULL, &plan) == MSA_INVALID_ARGUMENT);
  EXPECT(strcmp(msa_last_error(), "msa_problem is null") == 0);
  attention.problem = &problem;
  attention.out.dtype = 99;
  EXPECT(msa_plan_sparse_attention_forward(&attention, NULL, &plan) == MSA_INVALID_ARGUMENT);
  EXPECT(strcmp(msa_last_error(), "out.dtype is 99, expected an msa_dtype") == 0);

  EXPECT(msa_backend_count() >= 2);
  EXPECT(strcmp(msa_backend_name(msa_backend_count() - 1), "reference") == 0);
  EXPECT(msa_backend_available(msa_backend_count() - 1) == 1);
  EXPECT(msa_backend_name(99) == NULL);
  EXPECT(msa_set_num_threads(0) == MSA_INVALID_ARGUMENT);
  EXPECT(msa_set_num_threads(1) == MSA_OK && msa_num_threads() == 1);
  EXPECT(strcmp(msa_version(), "0.1.0") == 0);
  msa_plan_destroy(NULL);
  puts("C API: all expectations hold");
  return 0;
}
