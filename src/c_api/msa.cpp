// SPDX-License-Identifier: Apache-2.0
//
// The C ABI: copies C structs into their C++ namesakes and turns exceptions into statuses. The only
// place of the library that catches.
#include "msa/msa.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>
#include <variant>

#include "core/check.hpp"
#include "core/indexed_attention.hpp"
#include "msa/backend.hpp"
#include "msa/indexed_attention.hpp"
#include "msa/ops.hpp"

using msa::core::concat;

struct msa_plan {
  std::variant<msa::Plan<msa::IndexerScores>, msa::Plan<msa::SelectTopK>, msa::Plan<msa::Indexer>,
               msa::Plan<msa::SparseAttentionForward>, msa::Plan<msa::DenseAttentionForward>,
               msa::Plan<msa::SparseAttentionBackward>, msa::Plan<msa::IndexerKlBackward>,
               msa::Plan<msa::AppendKv>, msa::Plan<msa::NormRopeAppendKv>,
               msa::Plan<msa::IndexedAttentionForward>>
      plan;
};

namespace {

thread_local std::string last_error;

template <class Body>
msa_status guarded(Body body) {
  last_error.clear();
  try {
    body();
    return MSA_OK;
  } catch (const msa::Error& error) {
    last_error = error.what();
    return static_cast<msa_status>(error.code());
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return MSA_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    last_error = error.what();
    return MSA_INTERNAL;
  }
}

/// The caller's struct in this version's size: a shorter one is filled with zeros; a longer one
/// (from a newer header) is fine as long as it does not use what this version does not know.
template <class T>
T copy_struct(const T* given, const char* name) {
  MSA_CHECK(given != nullptr, name, " is null");
  std::size_t size = 0;
  std::memcpy(&size, given, sizeof(size));
  // Structs of all versions end at a multiple of their alignment, so no pointer is cut in two.
  MSA_CHECK(size > sizeof(size) && size < 65536 && size % alignof(T) == 0, name, ".struct_size is ",
            size, ", expected sizeof(", name, ") = ", sizeof(T));
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (std::size_t i = sizeof(T); i < size; ++i) {
    MSA_CHECK(bytes[i] == 0, name, " has a field at byte ", i, " that libmsa ", MSA_VERSION,
              " does not know");
  }
  T copy{};
  std::memcpy(&copy, given, std::min(size, sizeof(T)));
  return copy;
}

msa::TensorView to_cpp(const msa_tensor& tensor, const char* name) {
  MSA_CHECK(tensor.rank >= 0 && tensor.rank <= MSA_MAX_RANK, name, ".rank is ", tensor.rank,
            ", expected 0 to ", MSA_MAX_RANK);
  MSA_CHECK(tensor.dtype >= MSA_F32 && tensor.dtype <= MSA_I32, name, ".dtype is ", tensor.dtype,
            ", expected an msa_dtype");
  MSA_CHECK(tensor.device_type == MSA_CPU || tensor.device_type == MSA_CUDA, name,
            ".device_type is ", tensor.device_type, ", expected MSA_CPU or MSA_CUDA");
  msa::TensorView view{.data = tensor.data,
                       .dtype = static_cast<msa::DType>(tensor.dtype),
                       .device = {.type = static_cast<msa::DeviceType>(tensor.device_type),
                                  .index = tensor.device_index},
                       .rank = tensor.rank};
  std::copy_n(tensor.shape, tensor.rank, view.shape.begin());
  std::copy_n(tensor.stride, tensor.rank, view.stride.begin());
  return view;
}

msa::Problem to_cpp(const msa_problem* given) {
  const msa_problem c = copy_struct(given, "msa_problem");
  const msa::Problem defaults{};
  const auto or_default = [](std::int32_t value, int fallback) {
    return value != 0 ? value : fallback;
  };
  return {.num_q_heads = c.num_q_heads,
          .num_kv_heads = c.num_kv_heads,
          .head_dim = c.head_dim,
          .index_dim = or_default(c.index_dim, defaults.index_dim),
          .block_size = or_default(c.block_size, defaults.block_size),
          .top_k = or_default(c.top_k, defaults.top_k),
          .num_init_blocks = c.num_init_blocks,
          .num_local_blocks = or_default(c.num_local_blocks, defaults.num_local_blocks)};
}

msa::Batch to_cpp(const msa_batch* given) {
  if (given == nullptr) return {};
  const msa_batch c = copy_struct(given, "msa_batch");
  return {.cu_seqlens_q = to_cpp(c.cu_seqlens_q, "cu_seqlens_q"),
          .cu_seqlens_k = to_cpp(c.cu_seqlens_k, "cu_seqlens_k"),
          .page_table = to_cpp(c.page_table, "page_table"),
          .seq_lens_k = to_cpp(c.seq_lens_k, "seq_lens_k"),
          .max_seq_len_q = c.max_seq_len_q,
          .max_seq_len_k = c.max_seq_len_k};
}

msa::IndexerScores to_cpp(const msa_indexer_scores* given) {
  const auto c = copy_struct(given, "msa_indexer_scores");
  return {.problem = to_cpp(c.problem),
          .batch = to_cpp(c.batch),
          .index_q = to_cpp(c.index_q, "index_q"),
          .index_k = to_cpp(c.index_k, "index_k"),
          .index_scale = c.index_scale,
          .block_scores = to_cpp(c.block_scores, "block_scores")};
}

msa::SelectTopK to_cpp(const msa_select_top_k* given) {
  const auto c = copy_struct(given, "msa_select_top_k");
  return {.problem = to_cpp(c.problem),
          .batch = to_cpp(c.batch),
          .block_scores = to_cpp(c.block_scores, "block_scores"),
          .block_ids = to_cpp(c.block_ids, "block_ids")};
}

msa::Indexer to_cpp(const msa_indexer* given) {
  const auto c = copy_struct(given, "msa_indexer");
  return {.problem = to_cpp(c.problem),
          .batch = to_cpp(c.batch),
          .index_q = to_cpp(c.index_q, "index_q"),
          .index_k = to_cpp(c.index_k, "index_k"),
          .index_k_codes = to_cpp(c.index_k_codes, "index_k_codes"),
          .index_k_scales = to_cpp(c.index_k_scales, "index_k_scales"),
          .block_ids = to_cpp(c.block_ids, "block_ids")};
}

msa::SparseAttentionForward to_cpp(const msa_sparse_attention_forward* given) {
  const auto c = copy_struct(given, "msa_sparse_attention_forward");
  return {.problem = to_cpp(c.problem),
          .batch = to_cpp(c.batch),
          .q = to_cpp(c.q, "q"),
          .k = to_cpp(c.k, "k"),
          .v = to_cpp(c.v, "v"),
          .block_ids = to_cpp(c.block_ids, "block_ids"),
          .softmax_scale = c.softmax_scale,
          .out = to_cpp(c.out, "out"),
          .lse = to_cpp(c.lse, "lse"),
          .k_scale = to_cpp(c.k_scale, "k_scale"),
          .v_scale = to_cpp(c.v_scale, "v_scale")};
}

msa::IndexedAttentionForward to_cpp(const msa_indexed_attention_forward* given) {
  const auto c = copy_struct(given, "msa_indexed_attention_forward");
  return {.problem = to_cpp(c.problem),
          .batch = to_cpp(c.batch),
          .index_q = to_cpp(c.index_q, "index_q"),
          .index_k = to_cpp(c.index_k, "index_k"),
          .index_k_codes = to_cpp(c.index_k_codes, "index_k_codes"),
          .index_k_scales = to_cpp(c.index_k_scales, "index_k_scales"),
          .q = to_cpp(c.q, "q"),
          .k = to_cpp(c.k, "k"),
          .v = to_cpp(c.v, "v"),
          .softmax_scale = c.softmax_scale,
          .block_ids = to_cpp(c.block_ids, "block_ids"),
          .out = to_cpp(c.out, "out"),
          .lse = to_cpp(c.lse, "lse"),
          .k_scale = to_cpp(c.k_scale, "k_scale"),
          .v_scale = to_cpp(c.v_scale, "v_scale")};
}

msa::DenseAttentionForward to_cpp(const msa_dense_attention_forward* given) {
  const auto c = copy_struct(given, "msa_dense_attention_forward");
  return {.problem = to_cpp(c.problem),
          .batch = to_cpp(c.batch),
          .q = to_cpp(c.q, "q"),
          .k = to_cpp(c.k, "k"),
          .v = to_cpp(c.v, "v"),
          .softmax_scale = c.softmax_scale,
          .out = to_cpp(c.out, "out"),
          .lse = to_cpp(c.lse, "lse"),
          .k_scale = to_cpp(c.k_scale, "k_scale"),
          .v_scale = to_cpp(c.v_scale, "v_scale")};
}

msa::SparseAttentionBackward to_cpp(const msa_sparse_attention_backward* given) {
  const auto c = copy_struct(given, "msa_sparse_attention_backward");
  return {.problem = to_cpp(c.problem),
          .batch = to_cpp(c.batch),
          .q = to_cpp(c.q, "q"),
          .k = to_cpp(c.k, "k"),
          .v = to_cpp(c.v, "v"),
          .block_ids = to_cpp(c.block_ids, "block_ids"),
          .out = to_cpp(c.out, "out"),
          .lse = to_cpp(c.lse, "lse"),
          .dout = to_cpp(c.dout, "dout"),
          .softmax_scale = c.softmax_scale,
          .dq = to_cpp(c.dq, "dq"),
          .dk = to_cpp(c.dk, "dk"),
          .dv = to_cpp(c.dv, "dv")};
}

msa::IndexerKlBackward to_cpp(const msa_indexer_kl_backward* given) {
  const auto c = copy_struct(given, "msa_indexer_kl_backward");
  return {.problem = to_cpp(c.problem),
          .batch = to_cpp(c.batch),
          .q = to_cpp(c.q, "q"),
          .k = to_cpp(c.k, "k"),
          .index_q = to_cpp(c.index_q, "index_q"),
          .index_k = to_cpp(c.index_k, "index_k"),
          .block_ids = to_cpp(c.block_ids, "block_ids"),
          .softmax_scale = c.softmax_scale,
          .index_scale = c.index_scale,
          .loss_coefficient = c.loss_coefficient != 0.0f ? c.loss_coefficient : 1.0f,
          .loss = to_cpp(c.loss, "loss"),
          .dindex_q = to_cpp(c.dindex_q, "dindex_q"),
          .dindex_k = to_cpp(c.dindex_k, "dindex_k"),
          .lse = to_cpp(c.lse, "lse")};
}

msa::AppendKv to_cpp(const msa_append_kv* given) {
  const auto c = copy_struct(given, "msa_append_kv");
  return {.problem = to_cpp(c.problem),
          .batch = to_cpp(c.batch),
          .k = to_cpp(c.k, "k"),
          .v = to_cpp(c.v, "v"),
          .index_k = to_cpp(c.index_k, "index_k"),
          .k_pages = to_cpp(c.k_pages, "k_pages"),
          .v_pages = to_cpp(c.v_pages, "v_pages"),
          .index_k_pages = to_cpp(c.index_k_pages, "index_k_pages"),
          .index_k_codes_pages = to_cpp(c.index_k_codes_pages, "index_k_codes_pages"),
          .index_k_scales_pages = to_cpp(c.index_k_scales_pages, "index_k_scales_pages")};
}

msa::NormRopeAppendKv to_cpp(const msa_norm_rope_append_kv* given) {
  const auto c = copy_struct(given, "msa_norm_rope_append_kv");
  return {.problem = to_cpp(c.problem),
          .batch = to_cpp(c.batch),
          .q = to_cpp(c.q, "q"),
          .k = to_cpp(c.k, "k"),
          .v = to_cpp(c.v, "v"),
          .index_q = to_cpp(c.index_q, "index_q"),
          .index_k = to_cpp(c.index_k, "index_k"),
          .q_weight = to_cpp(c.q_weight, "q_weight"),
          .k_weight = to_cpp(c.k_weight, "k_weight"),
          .index_q_weight = to_cpp(c.index_q_weight, "index_q_weight"),
          .index_k_weight = to_cpp(c.index_k_weight, "index_k_weight"),
          .norm_eps = c.norm_eps != 0.0f ? c.norm_eps : 1e-6f,
          .norm_weight_offset = c.norm_weight_offset,
          .cos_sin = to_cpp(c.cos_sin, "cos_sin"),
          .positions = to_cpp(c.positions, "positions"),
          .q_out = to_cpp(c.q_out, "q_out"),
          .index_q_out = to_cpp(c.index_q_out, "index_q_out"),
          .k_pages = to_cpp(c.k_pages, "k_pages"),
          .v_pages = to_cpp(c.v_pages, "v_pages"),
          .index_k_pages = to_cpp(c.index_k_pages, "index_k_pages"),
          .index_k_codes_pages = to_cpp(c.index_k_codes_pages, "index_k_codes_pages"),
          .index_k_scales_pages = to_cpp(c.index_k_scales_pages, "index_k_scales_pages"),
          .k_scale = to_cpp(c.k_scale, "k_scale"),
          .v_scale = to_cpp(c.v_scale, "v_scale")};
}

template <class CArgs>
msa_status make_plan(const CArgs* args, const msa_options* options, msa_plan** plan) {
  return guarded([&] {
    MSA_CHECK(plan != nullptr, "plan is null: there is nowhere to return the plan");
    *plan = nullptr;
    msa::Options cpp_options{};
    if (options != nullptr) {
      const msa_options c = copy_struct(options, "msa_options");
      cpp_options = {.backend = c.backend, .deterministic = c.allow_nondeterministic == 0};
    }
    *plan = new msa_plan{msa::plan(to_cpp(args), cpp_options)};
  });
}

template <class CArgs>
msa_status run_plan(const msa_plan* plan, const CArgs* args, void* workspace,
                    std::size_t workspace_bytes, void* stream) {
  return guarded([&] {
    MSA_CHECK(plan != nullptr, "plan is null");
    const auto cpp_args = to_cpp(args);
    using CppArgs = std::remove_const_t<decltype(cpp_args)>;
    const auto* typed = std::get_if<msa::Plan<CppArgs>>(&plan->plan);
    MSA_CHECK(typed != nullptr, "the plan was made for another operation than ",
              msa::core::operation_name(cpp_args));
    MSA_CHECK(workspace != nullptr || typed->workspace_bytes() == 0,
              "workspace is null, the plan needs ", typed->workspace_bytes(), " bytes");
    typed->run(cpp_args, {static_cast<std::byte*>(workspace), workspace_bytes}, {stream});
  });
}

}  // namespace

extern "C" {

#define MSA_C_OPERATION(name)                                                              \
  msa_status msa_plan_##name(const msa_##name* args, const msa_options* options,           \
                             msa_plan** plan) {                                            \
    return make_plan(args, options, plan);                                                 \
  }                                                                                        \
  msa_status msa_run_##name(const msa_plan* plan, const msa_##name* args, void* workspace, \
                            size_t workspace_bytes, void* stream) {                        \
    return run_plan(plan, args, workspace, workspace_bytes, stream);                       \
  }
MSA_C_OPERATION(indexer_scores)
MSA_C_OPERATION(select_top_k)
MSA_C_OPERATION(indexer)
MSA_C_OPERATION(sparse_attention_forward)
MSA_C_OPERATION(indexed_attention_forward)
MSA_C_OPERATION(dense_attention_forward)
MSA_C_OPERATION(sparse_attention_backward)
MSA_C_OPERATION(indexer_kl_backward)
MSA_C_OPERATION(append_kv)
MSA_C_OPERATION(norm_rope_append_kv)
#undef MSA_C_OPERATION

size_t msa_plan_workspace_bytes(const msa_plan* plan) {
  if (plan == nullptr) return 0;
  return std::visit([](const auto& typed) { return typed.workspace_bytes(); }, plan->plan);
}

const char* msa_plan_implementation(const msa_plan* plan) {
  if (plan == nullptr) return nullptr;
  return std::visit([](const auto& typed) { return typed.implementation(); }, plan->plan);
}

void msa_plan_destroy(msa_plan* plan) { delete plan; }

const char* msa_last_error(void) { return last_error.c_str(); }
const char* msa_version(void) { return msa::version(); }

int32_t msa_backend_count(void) {
  int32_t count = 0;
  guarded([&] { count = static_cast<int32_t>(msa::backends().size()); });
  return count;
}

const char* msa_backend_name(int32_t index) {
  const char* name = nullptr;
  guarded([&] {
    const auto rows = msa::backends();
    if (index >= 0 && static_cast<std::size_t>(index) < rows.size()) {
      name = rows[static_cast<std::size_t>(index)].name;
    }
  });
  return name;
}

int32_t msa_backend_available(int32_t index) {
  int32_t available = 0;
  guarded([&] {
    const auto rows = msa::backends();
    if (index >= 0 && static_cast<std::size_t>(index) < rows.size()) {
      available = rows[static_cast<std::size_t>(index)].available ? 1 : 0;
    }
  });
  return available;
}

msa_status msa_set_num_threads(int32_t num_threads) {
  return guarded([&] { msa::set_num_threads(num_threads); });
}

int32_t msa_num_threads(void) {
  int32_t count = 0;
  guarded([&] { count = msa::num_threads(); });
  return count;
}

}  // extern "C"
