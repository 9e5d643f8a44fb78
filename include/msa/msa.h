/* SPDX-License-Identifier: Apache-2.0
 *
 * The C ABI. The operations, their shapes and their rules are those of msa/ops.hpp; a struct here
 * has the fields of its namesake there, in the same order.
 *
 * Structs other than msa_tensor begin with struct_size, to be set to sizeof(the struct): later
 * versions only append fields, and a shorter struct means defaults for the rest. Zero is the
 * default of every field; a msa_tensor of rank 0 means "not given".
 *
 * Functions return a status; on failure msa_last_error() has the text. Plans are immutable and may
 * be used by several threads, each with a workspace of its own.
 */
#ifndef MSA_MSA_H
#define MSA_MSA_H

#include <stddef.h>
#include <stdint.h>

#include "msa/export.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MSA_MAX_RANK 5

typedef enum msa_status {
  MSA_OK = 0,
  MSA_INVALID_ARGUMENT = 1,
  MSA_UNSUPPORTED = 2,
  MSA_OUT_OF_MEMORY = 3,
  MSA_CUDA_ERROR = 4,
  MSA_INTERNAL = 5
} msa_status;

typedef enum msa_dtype {
  MSA_F32 = 0,
  MSA_F64 = 1,
  MSA_F16 = 2,
  MSA_BF16 = 3,
  MSA_E4M3 = 4,
  MSA_I8 = 5,
  MSA_I32 = 6
} msa_dtype;

typedef enum msa_device_type { MSA_CPU = 0, MSA_CUDA = 1 } msa_device_type;

/* A non-owning, strided view; strides in elements. */
typedef struct msa_tensor {
  void* data;
  int32_t dtype;       /* msa_dtype */
  int32_t device_type; /* msa_device_type */
  int32_t device_index;
  int32_t rank;
  int64_t shape[MSA_MAX_RANK];
  int64_t stride[MSA_MAX_RANK];
} msa_tensor;

/* num_q_heads, num_kv_heads and head_dim are required. */
typedef struct msa_problem {
  size_t struct_size;
  int32_t num_q_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t index_dim;  /* 0: 128 */
  int32_t block_size; /* 0: 128 */
  int32_t top_k;      /* 0: 16 */
  int32_t num_init_blocks;
  int32_t num_local_blocks; /* 0: 1 */
} msa_problem;

typedef struct msa_batch {
  size_t struct_size;
  msa_tensor cu_seqlens_q;
  msa_tensor cu_seqlens_k;
  msa_tensor page_table;
  msa_tensor seq_lens_k;
  int64_t max_seq_len_q;
  int64_t max_seq_len_k;
} msa_batch;

typedef struct msa_options {
  size_t struct_size;
  const char* backend; /* null: $MSA_BACKEND, or else the first that takes the request */
  int32_t allow_nondeterministic;
} msa_options;

/* In every operation `problem` is required; a null `batch` is one sequence of all tokens. */

typedef struct msa_indexer_scores {
  size_t struct_size;
  const msa_problem* problem;
  const msa_batch* batch;
  msa_tensor index_q;
  msa_tensor index_k;
  float index_scale;
  msa_tensor block_scores;
} msa_indexer_scores;

typedef struct msa_select_top_k {
  size_t struct_size;
  const msa_problem* problem;
  const msa_batch* batch;
  msa_tensor block_scores;
  msa_tensor block_ids;
} msa_select_top_k;

typedef struct msa_indexer {
  size_t struct_size;
  const msa_problem* problem;
  const msa_batch* batch;
  msa_tensor index_q;
  msa_tensor index_k;
  msa_tensor block_ids;
  msa_tensor index_k_codes; /* optional, with index_k_scales */
  msa_tensor index_k_scales;
} msa_indexer;

typedef struct msa_sparse_attention_forward {
  size_t struct_size;
  const msa_problem* problem;
  const msa_batch* batch;
  msa_tensor q;
  msa_tensor k;
  msa_tensor v;
  msa_tensor block_ids;
  float softmax_scale;
  msa_tensor out;
  msa_tensor lse;
  msa_tensor k_scale; /* optional, with k in e4m3 */
  msa_tensor v_scale; /* optional, with v in e4m3 */
} msa_sparse_attention_forward;

/* include/msa/indexed_attention.hpp */
typedef struct msa_indexed_attention_forward {
  size_t struct_size;
  const msa_problem* problem;
  const msa_batch* batch;
  msa_tensor index_q;
  msa_tensor index_k;
  msa_tensor index_k_codes; /* optional, with index_k_scales */
  msa_tensor index_k_scales;
  msa_tensor q;
  msa_tensor k;
  msa_tensor v;
  float softmax_scale;
  msa_tensor block_ids; /* written */
  msa_tensor out;
  msa_tensor lse;
  msa_tensor k_scale; /* optional, with k in e4m3 */
  msa_tensor v_scale; /* optional, with v in e4m3 */
} msa_indexed_attention_forward;

typedef struct msa_dense_attention_forward {
  size_t struct_size;
  const msa_problem* problem;
  const msa_batch* batch;
  msa_tensor q;
  msa_tensor k;
  msa_tensor v;
  float softmax_scale;
  msa_tensor out;
  msa_tensor lse;
  msa_tensor k_scale; /* optional, with k in e4m3 */
  msa_tensor v_scale; /* optional, with v in e4m3 */
} msa_dense_attention_forward;

typedef struct msa_sparse_attention_backward {
  size_t struct_size;
  const msa_problem* problem;
  const msa_batch* batch;
  msa_tensor q;
  msa_tensor k;
  msa_tensor v;
  msa_tensor block_ids;
  msa_tensor out;
  msa_tensor lse;
  msa_tensor dout;
  float softmax_scale;
  msa_tensor dq;
  msa_tensor dk;
  msa_tensor dv;
} msa_sparse_attention_backward;

typedef struct msa_indexer_kl_backward {
  size_t struct_size;
  const msa_problem* problem;
  const msa_batch* batch;
  msa_tensor q;
  msa_tensor k;
  msa_tensor index_q;
  msa_tensor index_k;
  msa_tensor block_ids;
  float softmax_scale;
  float index_scale;
  float loss_coefficient; /* 0: 1 */
  msa_tensor loss;
  msa_tensor dindex_q;
  msa_tensor dindex_k;
  msa_tensor lse; /* optional: of the teacher's forward pass over the same support */
} msa_indexer_kl_backward;

typedef struct msa_append_kv {
  size_t struct_size;
  const msa_problem* problem;
  const msa_batch* batch;
  msa_tensor k;
  msa_tensor v;
  msa_tensor index_k;
  msa_tensor k_pages;
  msa_tensor v_pages;
  msa_tensor index_k_pages;
  msa_tensor index_k_codes_pages; /* optional, with index_k_scales_pages */
  msa_tensor index_k_scales_pages;
} msa_append_kv;

typedef struct msa_norm_rope_append_kv {
  size_t struct_size;
  const msa_problem* problem;
  const msa_batch* batch;
  msa_tensor q;
  msa_tensor k;
  msa_tensor v;
  msa_tensor index_q;
  msa_tensor index_k;
  msa_tensor q_weight;
  msa_tensor k_weight;
  msa_tensor index_q_weight;
  msa_tensor index_k_weight;
  float norm_eps; /* 0: 1e-6 */
  float norm_weight_offset;
  msa_tensor cos_sin;
  msa_tensor positions;
  msa_tensor q_out;
  msa_tensor index_q_out;
  msa_tensor k_pages;
  msa_tensor v_pages;
  msa_tensor index_k_pages;
  msa_tensor index_k_codes_pages;
  msa_tensor index_k_scales_pages;
  msa_tensor k_scale;
  msa_tensor v_scale;
} msa_norm_rope_append_kv;

/* A checked request bound to one implementation of one operation. */
typedef struct msa_plan msa_plan;

/* Check shapes and choose an implementation; `options` may be null. */
MSA_API msa_status msa_plan_indexer_scores(const msa_indexer_scores* args,
                                           const msa_options* options, msa_plan** plan);
MSA_API msa_status msa_plan_select_top_k(const msa_select_top_k* args, const msa_options* options,
                                         msa_plan** plan);
MSA_API msa_status msa_plan_indexer(const msa_indexer* args, const msa_options* options,
                                    msa_plan** plan);
MSA_API msa_status msa_plan_sparse_attention_forward(const msa_sparse_attention_forward* args,
                                                     const msa_options* options, msa_plan** plan);
MSA_API msa_status msa_plan_indexed_attention_forward(const msa_indexed_attention_forward* args,
                                                      const msa_options* options, msa_plan** plan);
MSA_API msa_status msa_plan_dense_attention_forward(const msa_dense_attention_forward* args,
                                                    const msa_options* options, msa_plan** plan);
MSA_API msa_status msa_plan_sparse_attention_backward(const msa_sparse_attention_backward* args,
                                                      const msa_options* options, msa_plan** plan);
MSA_API msa_status msa_plan_indexer_kl_backward(const msa_indexer_kl_backward* args,
                                                const msa_options* options, msa_plan** plan);
MSA_API msa_status msa_plan_append_kv(const msa_append_kv* args, const msa_options* options,
                                      msa_plan** plan);
MSA_API msa_status msa_plan_norm_rope_append_kv(const msa_norm_rope_append_kv* args,
                                                const msa_options* options, msa_plan** plan);

MSA_API size_t msa_plan_workspace_bytes(const msa_plan* plan);
MSA_API const char* msa_plan_implementation(const msa_plan* plan);
MSA_API void msa_plan_destroy(msa_plan* plan); /* null is fine */

/* Run a plan of the same operation on tensors of the planned shapes. `workspace`: at least
 * msa_plan_workspace_bytes(), aligned to 64 bytes (256 on a GPU). `stream`: a cudaStream_t or null.
 */
MSA_API msa_status msa_run_indexer_scores(const msa_plan* plan, const msa_indexer_scores* args,
                                          void* workspace, size_t workspace_bytes, void* stream);
MSA_API msa_status msa_run_select_top_k(const msa_plan* plan, const msa_select_top_k* args,
                                        void* workspace, size_t workspace_bytes, void* stream);
MSA_API msa_status msa_run_indexer(const msa_plan* plan, const msa_indexer* args, void* workspace,
                                   size_t workspace_bytes, void* stream);
MSA_API msa_status msa_run_sparse_attention_forward(const msa_plan* plan,
                                                    const msa_sparse_attention_forward* args,
                                                    void* workspace, size_t workspace_bytes,
                                                    void* stream);
MSA_API msa_status msa_run_indexed_attention_forward(const msa_plan* plan,
                                                     const msa_indexed_attention_forward* args,
                                                     void* workspace, size_t workspace_bytes,
                                                     void* stream);
MSA_API msa_status msa_run_dense_attention_forward(const msa_plan* plan,
                                                   const msa_dense_attention_forward* args,
                                                   void* workspace, size_t workspace_bytes,
                                                   void* stream);
MSA_API msa_status msa_run_sparse_attention_backward(const msa_plan* plan,
                                                     const msa_sparse_attention_backward* args,
                                                     void* workspace, size_t workspace_bytes,
                                                     void* stream);
MSA_API msa_status msa_run_indexer_kl_backward(const msa_plan* plan,
                                               const msa_indexer_kl_backward* args, void* workspace,
                                               size_t workspace_bytes, void* stream);
MSA_API msa_status msa_run_append_kv(const msa_plan* plan, const msa_append_kv* args,
                                     void* workspace, size_t workspace_bytes, void* stream);
MSA_API msa_status msa_run_norm_rope_append_kv(const msa_plan* plan,
                                               const msa_norm_rope_append_kv* args, void* workspace,
                                               size_t workspace_bytes, void* stream);

/* Text of this thread's last failure, "" if none; valid until the thread's next call. */
MSA_API const char* msa_last_error(void);
MSA_API const char* msa_version(void);

/* The backends in the order in which they are asked. */
MSA_API int32_t msa_backend_count(void);
MSA_API const char* msa_backend_name(int32_t index);  /* null where out of range */
MSA_API int32_t msa_backend_available(int32_t index); /* 1 or 0 */

/* Threads of the CPU backend; not during a run. */
MSA_API msa_status msa_set_num_threads(int32_t num_threads);
MSA_API int32_t msa_num_threads(void);

#ifdef __cplusplus
}
#endif

#endif
