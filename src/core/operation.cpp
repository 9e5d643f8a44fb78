// SPDX-License-Identifier: Apache-2.0
#include "core/operation.hpp"

#include <algorithm>
#include <bit>

#include "core/check.hpp"
#include "core/indexed_attention.hpp"
#include "core/sequences.hpp"

namespace msa::core {
namespace {

constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::f16, DType::bf16, DType::f64};
constexpr std::initializer_list<DType> kFloatsAndFp8 = {DType::f32, DType::f16, DType::bf16,
                                                        DType::f64, DType::e4m3};
constexpr std::initializer_list<DType> kWide = {DType::f32, DType::f64};
constexpr std::initializer_list<DType> kIds = {DType::i32};

/// Far above any model. What kernels compute from products of these, total sizes of workspaces
/// included, stays below 2^63.
constexpr int kMostHeads = 1 << 12;
constexpr int kLargestDim = 1 << 16;
constexpr int kLargestBlock = 1 << 20;
constexpr int kMostSlots = 1 << 20;

void check_at_most(const char* op, const char* name, int value, int most) {
  MSA_CHECK(value <= most, op, ": ", name, " is ", value, ", expected ", most, " at most");
}

void check_problem(const char* op, const Problem& p) {
  check_at_most(op, "num_q_heads", p.num_q_heads, kMostHeads);
  check_at_most(op, "head_dim", p.head_dim, kLargestDim);
  check_at_most(op, "index_dim", p.index_dim, kLargestDim);
  check_at_most(op, "block_size", p.block_size, kLargestBlock);
  check_at_most(op, "top_k", p.top_k, kMostSlots);
  check_at_most(op, "num_init_blocks", p.num_init_blocks, kMostSlots);
  check_at_most(op, "num_local_blocks", p.num_local_blocks, kMostSlots);
  MSA_CHECK(p.num_q_heads > 0 && p.num_kv_heads > 0 && p.num_q_heads % p.num_kv_heads == 0, op,
            ": num_q_heads is ", p.num_q_heads, ", expected a positive multiple of num_kv_heads, ",
            p.num_kv_heads);
  MSA_CHECK(p.head_dim > 0 && p.index_dim > 0, op, ": head_dim is ", p.head_dim,
            " and index_dim is ", p.index_dim, ", expected both positive");
  MSA_CHECK(p.block_size >= 16 && std::has_single_bit(static_cast<unsigned>(p.block_size)), op,
            ": block_size is ", p.block_size, ", expected a power of two >= 16");
  MSA_CHECK(p.num_local_blocks >= 1, op, ": num_local_blocks is ", p.num_local_blocks,
            ", expected >= 1 (a query always attends its own block)");
  MSA_CHECK(p.num_init_blocks >= 0, op, ": num_init_blocks is ", p.num_init_blocks,
            ", expected >= 0");
  MSA_CHECK(p.top_k >= p.num_init_blocks + p.num_local_blocks, op, ": top_k is ", p.top_k,
            ", expected >= num_init_blocks + num_local_blocks = ",
            p.num_init_blocks + p.num_local_blocks);
}

/// Everything on one device, and pages as long as blocks.
template <class Args>
void check_devices(const char* op, const Args& args) {
  const char* first_name = nullptr;
  Device first{};
  for_each_tensor(args, [&](const char* name, const TensorView& view, Use) {
    if (!view.given()) return;
    if (first_name == nullptr) {
      first_name = name;
      first = view.device;
    }
    MSA_CHECK(view.device == first, op, ": ", name, " and ", first_name,
              " are on different devices");
  });
}

void check_batch(const char* op, const Batch& batch, std::int64_t total_q, bool needs_pages) {
  if (batch.page_table.given()) {
    check_tensor(op, "page_table", batch.page_table, kIds,
                 {{"batch_size", kAny}, {"max_pages", kAny}});
    check_tensor(op, "seq_lens_k", batch.seq_lens_k, kIds,
                 {{"batch_size", batch.page_table.shape[0]}});
  }
  MSA_CHECK(!needs_pages || batch.page_table.given(), op,
            ": page_table and seq_lens_k are required: the keys are paged");
  if (batch.seq_lens_k.given()) {
    check_tensor(op, "seq_lens_k", batch.seq_lens_k, kIds, {{"batch_size", kAny}});
    MSA_CHECK(!batch.cu_seqlens_k.given(), op,
              ": both cu_seqlens_k (ragged keys) and seq_lens_k (paged keys) are given");
  }
  if (batch.cu_seqlens_k.given()) {
    check_tensor(op, "cu_seqlens_k", batch.cu_seqlens_k, kIds, {{"batch_size + 1", kAny}});
    MSA_CHECK(batch.cu_seqlens_k.shape[0] >= 1, op,
              ": cu_seqlens_k is empty, expected [0] at least");
  }
  const std::int64_t size = batch_size(batch);
  if (batch.cu_seqlens_q.given()) {
    check_tensor(op, "cu_seqlens_q", batch.cu_seqlens_q, kIds, {{"batch_size + 1", size + 1}});
  } else {
    MSA_CHECK(size == 0 ? total_q == 0 : total_q % size == 0, op, ": total_q is ", total_q,
              ", no multiple of batch_size ", size, "; give cu_seqlens_q for unequal lengths");
  }
  MSA_CHECK(batch.max_seq_len_q >= 0 && batch.max_seq_len_k >= 0, op, ": max_seq_len_q is ",
            batch.max_seq_len_q, " and max_seq_len_k is ", batch.max_seq_len_k,
            ", expected >= 0 (0: unknown)");
}

/// Keys, values or index keys: ragged [total, heads, dim] or paged [pages, heads, block_size, dim].
void check_keys(const char* op, const char* name, const TensorView& keys, const Batch& batch,
                const Problem& p, Dim count, Dim heads, Dim dim,
                std::initializer_list<DType> dtypes = kFloatsAndFp8) {
  if (is_paged(batch)) {
    check_tensor(op, name, keys, dtypes, {count, heads, {"block_size", p.block_size}, dim});
  } else {
    MSA_CHECK(!batch.seq_lens_k.given(), op,
              ": seq_lens_k is given without page_table; ragged keys take cu_seqlens_k");
    check_tensor(op, name, keys, dtypes, {count, heads, dim});
  }
}

/// The maximum over a block is taken before scores are scaled, which a negative scale would turn
/// into a minimum.
void check_index_scale(const char* op, float scale) {
  MSA_CHECK(scale >= 0.0f, op, ": index_scale is ", scale,
            ", expected > 0, or 0 for 1 / sqrt(index_dim)");
}

template <class Args>
void check_score_columns(const char* op, const Args& args) {
  const std::int64_t needed = ceil_div(max_seq_len_k(args), args.problem.block_size);
  MSA_CHECK(args.block_scores.shape[2] >= needed, op, ": block_scores has ",
            args.block_scores.shape[2], " block columns but sequences may have ", needed,
            " blocks; give max_seq_len_k if they are shorter");
}

template <class Args>
void check_attention_inputs(const char* op, const Args& args) {
  const Problem& p = args.problem;
  check_problem(op, p);
  check_tensor(op, "q", args.q, kFloats,
               {{"total_q", kAny}, {"num_q_heads", p.num_q_heads}, {"head_dim", p.head_dim}});
  check_batch(op, args.batch, args.q.shape[0], false);
}

/// The scale of each KV head of an e4m3 tensor.
void check_scale(const char* op, const Problem& p, const char* scale_name, const TensorView& scale,
                 const char* name, const TensorView& view) {
  if (!scale.given()) return;
  MSA_CHECK(view.dtype == DType::e4m3, op, ": ", scale_name, " is given, but ", name, " has dtype ",
            name_of(view.dtype), ", not e4m3");
  check_tensor(op, scale_name, scale, {DType::f32}, {{"num_kv_heads", p.num_kv_heads}});
}

template <class Args>
void check_forward(const char* op, const Args& args) {
  const Problem& p = args.problem;
  check_attention_inputs(op, args);
  const std::int64_t total_q = args.q.shape[0];
  const char* count = is_paged(args.batch) ? "num_pages" : "total_k";
  check_keys(op, "k", args.k, args.batch, p, {count, kAny}, {"num_kv_heads", p.num_kv_heads},
             {"head_dim", p.head_dim});
  check_keys(op, "v", args.v, args.batch, p, {count, args.k.shape[0]},
             {"num_kv_heads", p.num_kv_heads}, {"head_dim", p.head_dim});
  check_scale(op, p, "k_scale", args.k_scale, "k", args.k);
  check_scale(op, p, "v_scale", args.v_scale, "v", args.v);
  check_tensor(op, "out", args.out, kFloats,
               {{"total_q", total_q}, {"num_q_heads", p.num_q_heads}, {"head_dim", p.head_dim}});
  if (args.lse.given()) {
    check_tensor(op, "lse", args.lse, kWide,
                 {{"total_q", total_q}, {"num_q_heads", p.num_q_heads}});
  }
}

void check_block_ids(const char* op, const TensorView& ids, const Problem& p,
                     std::int64_t total_q) {
  check_tensor(op, "block_ids", ids, kIds,
               {{"num_kv_heads", p.num_kv_heads}, {"total_q", total_q}, {"top_k", p.top_k}});
}

void check_ragged(const char* op, const Batch& batch) {
  MSA_CHECK(!batch.page_table.given() && !batch.seq_lens_k.given(), op,
            ": page_table is given, but gradients are defined for ragged keys only");
}

/// The int8 codes of index keys, both tensors or neither.
void check_codes(const char* op, const Problem& p, const char* codes_name, const TensorView& codes,
                 const char* scales_name, const TensorView& scales, const char* keys_name,
                 const TensorView& keys) {
  MSA_CHECK(codes.given() == scales.given(), op, ": ", codes_name, " and ", scales_name,
            " must be given together");
  if (!codes.given()) return;
  MSA_CHECK(keys.given(), op, ": ", codes_name, " is given without ", keys_name);
  const Dim pages{"num_pages", keys.shape[0]};
  const Dim heads{"index key heads", 1};
  const Dim block_size{"block_size", p.block_size};
  check_tensor(op, codes_name, codes, {DType::i8},
               {pages, heads, block_size, {"index_dim", p.index_dim}});
  check_tensor(op, scales_name, scales, {DType::bf16},
               {pages, heads, block_size, {"scale and error", 2}});
}

template <class Args>
void check_index_inputs(const char* op, const Args& args) {
  const Problem& p = args.problem;
  check_problem(op, p);
  check_tensor(op, "index_q", args.index_q, kFloatsAndFp8,
               {{"total_q", kAny}, {"num_kv_heads", p.num_kv_heads}, {"index_dim", p.index_dim}});
  check_batch(op, args.batch, args.index_q.shape[0], false);
  check_keys(op, "index_k", args.index_k, args.batch, p,
             {is_paged(args.batch) ? "num_pages" : "total_k", kAny}, {"index key heads", 1},
             {"index_dim", p.index_dim});
}

}  // namespace

void validate(const IndexerScores& args) {
  const char* op = operation_name(args);
  check_index_inputs(op, args);
  check_index_scale(op, args.index_scale);
  check_tensor(op, "block_scores", args.block_scores, kWide,
               {{"num_kv_heads", args.problem.num_kv_heads},
                {"total_q", args.index_q.shape[0]},
                {"num_blocks", kAny}});
  check_score_columns(op, args);
  check_devices(op, args);
}

void validate(const SelectTopK& args) {
  const char* op = operation_name(args);
  check_problem(op, args.problem);
  check_tensor(
      op, "block_scores", args.block_scores, kWide,
      {{"num_kv_heads", args.problem.num_kv_heads}, {"total_q", kAny}, {"num_blocks", kAny}});
  MSA_CHECK(args.batch.seq_lens_k.given() || args.batch.cu_seqlens_k.given(), op,
            ": seq_lens_k or cu_seqlens_k is required: the local block depends on the key count");
  check_batch(op, args.batch, args.block_scores.shape[1], false);
  check_block_ids(op, args.block_ids, args.problem, args.block_scores.shape[1]);
  check_devices(op, args);
}

void validate(const Indexer& args) {
  const char* op = operation_name(args);
  check_index_inputs(op, args);
  MSA_CHECK(!args.index_k_codes.given() || is_paged(args.batch), op,
            ": index_k_codes is given, but keys without page_table have none");
  check_codes(op, args.problem, "index_k_codes", args.index_k_codes, "index_k_scales",
              args.index_k_scales, "index_k", args.index_k);
  check_block_ids(op, args.block_ids, args.problem, args.index_q.shape[0]);
  check_devices(op, args);
}

void validate(const SparseAttentionForward& args) {
  const char* op = operation_name(args);
  check_forward(op, args);
  check_block_ids(op, args.block_ids, args.problem, args.q.shape[0]);
  check_devices(op, args);
}

void validate(const IndexedAttentionForward& args) {
  const char* op = operation_name(args);
  check_index_inputs(op, args);
  MSA_CHECK(!args.index_k_codes.given() || is_paged(args.batch), op,
            ": index_k_codes is given, but keys without page_table have none");
  check_codes(op, args.problem, "index_k_codes", args.index_k_codes, "index_k_scales",
              args.index_k_scales, "index_k", args.index_k);
  check_forward(op, args);
  MSA_CHECK(args.index_q.shape[0] == args.q.shape[0], op, ": index_q has ", args.index_q.shape[0],
            " query tokens, q has ", args.q.shape[0]);
  MSA_CHECK(args.index_k.shape[0] == args.k.shape[0], op, ": index_k has ", args.index_k.shape[0],
            is_paged(args.batch) ? " pages" : " tokens", ", k has ", args.k.shape[0]);
  check_block_ids(op, args.block_ids, args.problem, args.q.shape[0]);
  check_devices(op, args);
}

void validate(const DenseAttentionForward& args) {
  const char* op = operation_name(args);
  check_forward(op, args);
  check_devices(op, args);
}

void validate(const SparseAttentionBackward& args) {
  const char* op = operation_name(args);
  const Problem& p = args.problem;
  check_ragged(op, args.batch);
  check_attention_inputs(op, args);
  const Dim total_q{"total_q", args.q.shape[0]};
  const Dim q_heads{"num_q_heads", p.num_q_heads};
  const Dim kv_heads{"num_kv_heads", p.num_kv_heads};
  const Dim dim{"head_dim", p.head_dim};
  check_tensor(op, "k", args.k, kFloats, {{"total_k", kAny}, kv_heads, dim});
  const Dim total_k{"total_k", args.k.shape[0]};
  check_tensor(op, "v", args.v, kFloats, {total_k, kv_heads, dim});
  check_tensor(op, "out", args.out, kFloats, {total_q, q_heads, dim});
  check_tensor(op, "lse", args.lse, kWide, {total_q, q_heads});
  check_tensor(op, "dout", args.dout, kFloats, {total_q, q_heads, dim});
  check_tensor(op, "dq", args.dq, kFloats, {total_q, q_heads, dim});
  check_tensor(op, "dk", args.dk, kFloats, {total_k, kv_heads, dim});
  check_tensor(op, "dv", args.dv, kFloats, {total_k, kv_heads, dim});
  if (args.block_ids.given()) check_block_ids(op, args.block_ids, p, args.q.shape[0]);
  check_devices(op, args);
}

void validate(const IndexerKlBackward& args) {
  const char* op = operation_name(args);
  const Problem& p = args.problem;
  check_ragged(op, args.batch);
  check_attention_inputs(op, args);
  const Dim total_q{"total_q", args.q.shape[0]};
  const Dim kv_heads{"num_kv_heads", p.num_kv_heads};
  const Dim index_dim{"index_dim", p.index_dim};
  check_tensor(op, "k", args.k, kFloats, {{"total_k", kAny}, kv_heads, {"head_dim", p.head_dim}});
  const Dim total_k{"total_k", args.k.shape[0]};
  check_tensor(op, "index_q", args.index_q, kFloats, {total_q, kv_heads, index_dim});
  check_tensor(op, "index_k", args.index_k, kFloats, {total_k, {"index key heads", 1}, index_dim});
  check_index_scale(op, args.index_scale);
  MSA_CHECK(args.loss.given() || args.dindex_q.given(), op,
            ": neither loss nor dindex_q is given, so there is nothing to compute");
  MSA_CHECK(args.dindex_q.given() == args.dindex_k.given(), op,
            ": dindex_q and dindex_k must be given together");
  if (args.loss.given()) check_tensor(op, "loss", args.loss, kWide, {{"scalar", 1}});
  if (args.dindex_q.given()) {
    check_tensor(op, "dindex_q", args.dindex_q, kFloats, {total_q, kv_heads, index_dim});
    check_tensor(op, "dindex_k", args.dindex_k, kFloats,
                 {total_k, {"index key heads", 1}, index_dim});
  }
  if (args.lse.given()) {
    check_tensor(op, "lse", args.lse, kWide, {total_q, {"num_q_heads", p.num_q_heads}});
  }
  if (args.block_ids.given()) check_block_ids(op, args.block_ids, p, args.q.shape[0]);
  check_devices(op, args);
}

void validate(const AppendKv& args) {
  const char* op = operation_name(args);
  const Problem& p = args.problem;
  check_problem(op, p);
  MSA_CHECK(args.k.given() || args.v.given() || args.index_k.given(), op,
            ": none of k, v and index_k is given, so there is nothing to append");
  std::int64_t tokens = kAny;
  std::int64_t pages = kAny;
  const auto check_pair = [&](const char* name, const TensorView& rows, const char* pages_name,
                              const TensorView& cache, Dim heads, Dim dim) {
    MSA_CHECK(rows.given() == cache.given(), op, ": ", name, " and ", pages_name,
              " must be given together");
    if (!rows.given()) return;
    check_tensor(op, name, rows, kFloats, {{"total_q", tokens}, heads, dim});
    check_tensor(op, pages_name, cache, kFloats,
                 {{"num_pages", pages}, heads, {"block_size", p.block_size}, dim});
    tokens = rows.shape[0];
    pages = cache.shape[0];
  };
  const Dim kv_heads{"num_kv_heads", p.num_kv_heads};
  check_pair("k", args.k, "k_pages", args.k_pages, kv_heads, {"head_dim", p.head_dim});
  check_pair("v", args.v, "v_pages", args.v_pages, kv_heads, {"head_dim", p.head_dim});
  check_pair("index_k", args.index_k, "index_k_pages", args.index_k_pages, {"index key heads", 1},
             {"index_dim", p.index_dim});
  check_codes(op, p, "index_k_codes_pages", args.index_k_codes_pages, "index_k_scales_pages",
              args.index_k_scales_pages, "index_k_pages", args.index_k_pages);
  check_batch(op, args.batch, tokens, true);
  check_devices(op, args);
}

void validate(const NormRopeAppendKv& args) {
  const char* op = operation_name(args);
  const Problem& p = args.problem;
  check_problem(op, p);
  MSA_CHECK(args.k.given() || args.v.given() || args.index_k.given(), op,
            ": none of k, v and index_k is given, so there is nothing to append");
  const std::int64_t tokens = total_q(args);
  const std::int64_t pages = key_tensor(args).shape[0];
  const std::initializer_list<DType> rows_dtypes = {DType::f32, DType::f16, DType::bf16};
  const std::initializer_list<DType> cache_dtypes = {DType::f32, DType::f16, DType::bf16,
                                                     DType::e4m3};
  const auto check_rows = [&](const char* name, const TensorView& rows, const char* to_name,
                              const TensorView& to, Dim heads, Dim dim) {
    MSA_CHECK(rows.given() == to.given(), op, ": ", name, " and ", to_name,
              " must be given together");
    if (rows.given()) check_tensor(op, name, rows, rows_dtypes, {{"total_q", tokens}, heads, dim});
  };
  const auto check_pages = [&](const char* name, const TensorView& cache, Dim heads, Dim dim) {
    if (!cache.given()) return;
    check_tensor(op, name, cache, cache_dtypes,
                 {{"num_pages", pages}, heads, {"block_size", p.block_size}, dim});
  };
  const auto check_weight = [&](const char* name, const TensorView& weight, const char* rows_name,
                                const TensorView& rows, Dim dim) {
    if (!weight.given()) return;
    MSA_CHECK(rows.given(), op, ": ", name, " is given without ", rows_name);
    check_tensor(op, name, weight, rows_dtypes, {dim});
  };
  const Dim q_heads{"num_q_heads", p.num_q_heads};
  const Dim kv_heads{"num_kv_heads", p.num_kv_heads};
  const Dim one{"index key heads", 1};
  const Dim dim{"head_dim", p.head_dim};
  const Dim index_dim{"index_dim", p.index_dim};
  check_rows("k", args.k, "k_pages", args.k_pages, kv_heads, dim);
  check_rows("v", args.v, "v_pages", args.v_pages, kv_heads, dim);
  check_rows("index_k", args.index_k, "index_k_pages", args.index_k_pages, one, index_dim);
  check_rows("q", args.q, "q_out", args.q_out, q_heads, dim);
  check_rows("index_q", args.index_q, "index_q_out", args.index_q_out, kv_heads, index_dim);
  if (args.q_out.given()) {
    check_tensor(op, "q_out", args.q_out, rows_dtypes, {{"total_q", tokens}, q_heads, dim});
  }
  if (args.index_q_out.given()) {
    check_tensor(op, "index_q_out", args.index_q_out, cache_dtypes,
                 {{"total_q", tokens}, kv_heads, index_dim});
  }
  check_pages("k_pages", args.k_pages, kv_heads, dim);
  check_pages("v_pages", args.v_pages, kv_heads, dim);
  check_pages("index_k_pages", args.index_k_pages, one, index_dim);
  check_weight("q_weight", args.q_weight, "q", args.q, dim);
  check_weight("k_weight", args.k_weight, "k", args.k, dim);
  check_weight("index_q_weight", args.index_q_weight, "index_q", args.index_q, index_dim);
  check_weight("index_k_weight", args.index_k_weight, "index_k", args.index_k, index_dim);
  MSA_CHECK(args.norm_eps >= 0.0f, op, ": norm_eps is ", args.norm_eps, ", expected >= 0");
  if (args.cos_sin.given()) {
    check_tensor(op, "cos_sin", args.cos_sin, rows_dtypes,
                 {{"max_positions", kAny}, {"rotary_dim", kAny}});
    const std::int64_t rotary_dim = args.cos_sin.shape[1];
    const bool heads = args.q.given() || args.k.given();
    const bool index = args.index_q.given() || args.index_k.given();
    const std::int64_t most =
        std::min(heads ? p.head_dim : kLargestDim, index ? p.index_dim : kLargestDim);
    MSA_CHECK(rotary_dim >= 2 && rotary_dim % 2 == 0 && rotary_dim <= most, op,
              ": cos_sin has rotary_dim ", rotary_dim, ", expected an even number from 2 to ",
              most);
  }
  if (args.positions.given()) {
    MSA_CHECK(args.cos_sin.given(), op, ": positions is given without cos_sin");
    check_tensor(op, "positions", args.positions, kIds, {{"total_q", tokens}});
  }
  check_scale(op, p, "k_scale", args.k_scale, "k_pages", args.k_pages);
  check_scale(op, p, "v_scale", args.v_scale, "v_pages", args.v_pages);
  check_codes(op, p, "index_k_codes_pages", args.index_k_codes_pages, "index_k_scales_pages",
              args.index_k_scales_pages, "index_k_pages", args.index_k_pages);
  check_batch(op, args.batch, tokens, true);
  check_devices(op, args);
}

}  // namespace msa::core
