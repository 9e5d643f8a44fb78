/* SPDX-License-Identifier: Apache-2.0
 *
 * One operation and one error through the installed C header.
 */
#include <stdio.h>
#include <string.h>

#include "msa/msa.h"

int main(void) {
  float scores[] = {1.0f, 3.0f, 2.0f, 0.0f};
  int32_t ids[3] = {0};
  int32_t length = 64; /* the query is token 63 and sees all four blocks */
  msa_problem problem = {.struct_size = sizeof problem,
                         .num_q_heads = 1,
                         .num_kv_heads = 1,
                         .head_dim = 16,
                         .block_size = 16,
                         .top_k = 3};
  msa_batch batch = {
      .struct_size = sizeof batch,
      .seq_lens_k = {.data = &length, .dtype = MSA_I32, .rank = 1, .shape = {1}, .stride = {1}}};
  msa_select_top_k args = {
      .struct_size = sizeof args,
      .problem = &problem,
      .batch = &batch,
      .block_scores = {.data = scores, .rank = 3, .shape = {1, 1, 4}, .stride = {4, 4, 1}},
      .block_ids = {
          .data = ids, .dtype = MSA_I32, .rank = 3, .shape = {1, 1, 3}, .stride = {3, 3, 1}}};
  msa_options options = {.struct_size = sizeof options, .backend = "reference"};
  msa_plan* plan = NULL;
  if (msa_plan_select_top_k(&args, &options, &plan) != MSA_OK ||
      msa_run_select_top_k(plan, &args, NULL, 0, NULL) != MSA_OK) {
    printf("%s\n", msa_last_error());
    return 1;
  }
  msa_plan_destroy(plan);
  if (ids[0] != 1 || ids[1] != 2 || ids[2] != 3) return 1;

  problem.top_k = -1;
  plan = NULL;
  if (msa_plan_select_top_k(&args, &options, &plan) != MSA_INVALID_ARGUMENT) return 1;
  printf("msa %s: %s\n", msa_version(), msa_last_error());
  return strlen(msa_last_error()) > 0 ? 0 : 1;
}
