/* SPDX-License-Identifier: Apache-2.0
 *
 * The C ABI: choose blocks for every token of a sequence, attend to them, and handle a mistake.
 * Every value of token t is t, so token t's output is a mean of the tokens it read: at most t.
 *
 * Expected output: the backend's name, a mean within the chosen blocks, and the text of an error
 * that names the wrong tensor, both its shapes and nothing else.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "msa/msa.h"

enum { kTokens = 640, kHeads = 2, kDim = 16, kTopK = 2 };

static msa_tensor tensor(void* data, msa_dtype dtype, int64_t a, int64_t b, int64_t c) {
  return (msa_tensor){
      .data = data, .dtype = dtype, .rank = 3, .shape = {a, b, c}, .stride = {b * c, c, 1}};
}

static int failed(const char* what, msa_status status) {
  if (status != MSA_OK) fprintf(stderr, "%s: status %d: %s\n", what, status, msa_last_error());
  return status != MSA_OK;
}

/* Workspaces are aligned to 64 bytes; aligned_alloc() wants a multiple of that. */
static size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64 + 64; }

int main(void) {
  static float q[kTokens * kHeads * kDim], k[kTokens * kDim], v[kTokens * kDim];
  static float out[kTokens * kHeads * kDim];
  static int32_t ids[kTokens * kTopK];
  for (int i = 0; i < kTokens * kHeads * kDim; ++i) q[i] = (float)(i % 7) - 3.0f;
  for (int i = 0; i < kTokens * kDim; ++i) {
    k[i] = (float)(i % 5) - 2.0f;
    v[i] = (float)(i / kDim);
  }
  /* Blocks of 128 tokens are the default. */
  const msa_problem problem = {sizeof problem, kHeads, 1, kDim, kDim, 0, kTopK, 0, 0};
  msa_indexer indexer = {.struct_size = sizeof indexer,
                         .problem = &problem,
                         .index_q = tensor(k, MSA_F32, kTokens, 1, kDim),
                         .index_k = tensor(k, MSA_F32, kTokens, 1, kDim),
                         .block_ids = tensor(ids, MSA_I32, 1, kTokens, kTopK)};
  msa_sparse_attention_forward attention = {.struct_size = sizeof attention,
                                            .problem = &problem,
                                            .q = tensor(q, MSA_F32, kTokens, kHeads, kDim),
                                            .k = tensor(k, MSA_F32, kTokens, 1, kDim),
                                            .v = tensor(v, MSA_F32, kTokens, 1, kDim),
                                            .block_ids = indexer.block_ids,
                                            .out = tensor(out, MSA_F32, kTokens, kHeads, kDim)};
  msa_plan *choose = NULL, *attend = NULL;
  if (failed("plan indexer", msa_plan_indexer(&indexer, NULL, &choose))) return 1;
  if (failed("plan attention", msa_plan_sparse_attention_forward(&attention, NULL, &attend)))
    return 1;
  const size_t a = msa_plan_workspace_bytes(choose), b = msa_plan_workspace_bytes(attend);
  const size_t bytes = whole_lines(a > b ? a : b);
  void* workspace = aligned_alloc(64, bytes);
  if (workspace == NULL) return 1;
  if (failed("choose", msa_run_indexer(choose, &indexer, workspace, bytes, NULL)) ||
      failed("attend",
             msa_run_sparse_attention_forward(attend, &attention, workspace, bytes, NULL)))
    return 1;
  const float mean = out[(kTokens - 1) * kHeads * kDim];
  const int32_t* last = ids + (kTokens - 1) * kTopK;
  printf("%s: token %d reads blocks %d and %d; mean token %.1f\n", msa_plan_implementation(attend),
         kTokens - 1, last[0], last[1], mean);

  msa_plan* none = NULL;
  attention.out.shape[0] = 1;
  const msa_status status = msa_plan_sparse_attention_forward(&attention, NULL, &none);
  printf("a wrong shape: %s\n", msa_last_error());
  const int named = status == MSA_INVALID_ARGUMENT && strstr(msa_last_error(), "out") != NULL;
  msa_plan_destroy(choose);
  msa_plan_destroy(attend);
  free(workspace);
  return named && last[1] == 4 && mean >= 128.0f * (float)last[0] && mean < kTokens ? 0 : 1;
}
