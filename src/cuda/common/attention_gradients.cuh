// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of SparseAttentionBackward share: their arguments, statistics of each row, and
// the exact way out for what tensor cores can't do.
//
// With P = exp(S - lse) and delta = sum(dout * out) a row's gradients need no second softmax. That
// fails where a row has a NaN or an infinity, or scores so large that the rounding of lse is no
// rounding of P anymore. Such rows get the statistic NaN, which makes every gradient that they are
// part of NaN, as does 0 * NaN where a masked pair touches one. So: compute; whatever result is not
// finite is computed again by dq_row() or dkv_row(), from what it depends on and nothing else.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>

#include "core/workspace.hpp"
#include "cuda/common/attention.cuh"
#include "cuda/common/query_lists.cuh"

namespace msa::cuda {

/// Of a (query, query head).
struct RowStatistics {
  float lse;    ///< of scores in base 2; NaN: see ExactStatistics; +inf: the row sees nothing
  float delta;  ///< sum over d of dout[d] * out[d]; 0 with an lse that is not finite
};

/// A softmax in double, natural: of rows where RowStatistics have NaN. Its delta is sum(P dP) over
/// the support.
struct ExactStatistics {
  double maximum;
  double reciprocal;
  double delta;

  __device__ __forceinline__ double probability(double s) const {
    return reciprocal == 0.0 ? 0.0 : exp(s - maximum) * reciprocal;
  }
};

/// Rows (token, head) of a tensor. Strides are in bytes.
struct TokenRows {
  std::byte* data;
  std::int64_t token_stride, head_stride;
  Load load;

  __device__ __forceinline__ std::byte* at(std::int64_t token, int head) const {
    return data + token * token_stride + head * head_stride;
  }
};

inline TokenRows make_token_rows(const TensorView& view) {
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  return {.data = static_cast<std::byte*>(view.data),
          .token_stride = view.stride[0] * size,
          .head_stride = view.stride[1] * size,
          .load = load_of(view)};
}

/// SparseAttentionBackward as kernels get it. Keys are packed tokens.
struct AttentionGradients {
  DeviceBatch batch;
  QueryLists lists;
  TokenRows q, k, v, out, dout, dq, dk, dv;
  const void* lse;  ///< f32 or f64
  std::int64_t lse_token_stride, lse_head_stride;
  const std::int32_t* block_ids;  ///< null: dense
  std::int64_t ids_head_stride, ids_token_stride;
  RowStatistics* statistics;  ///< [total_q][num_q_heads]
  ExactStatistics* exact;     ///< [total_q][num_q_heads], only where statistics have NaN
  double scale;
  int num_q_heads;
  int group_size;
  int head_dim;
  int top_k;
  bool wide_lse;  ///< f64

  __device__ __forceinline__ std::int64_t statistic(std::int64_t row, int head) const {
    return row * num_q_heads + head;
  }
};

/// Everything that SparseAttentionBackward keeps in its workspace.
struct GradientWorkspace {
  QueryListBuild build;
  RowStatistics* statistics;
  ExactStatistics* exact;
};

inline GradientWorkspace lay_out_gradients(const SparseAttentionBackward& args,
                                           core::WorkspaceLayout& layout) {
  const std::int64_t rows = args.q.shape[0] * args.problem.num_q_heads;
  GradientWorkspace workspace{};
  workspace.build = lay_out_query_lists(args, layout);
  workspace.statistics = layout.take<RowStatistics>(rows);
  workspace.exact = layout.take<ExactStatistics>(rows);
  return workspace;
}

inline AttentionGradients make_attention_gradients(const SparseAttentionBackward& args,
                                                   const GradientWorkspace& workspace) {
  const Problem& p = args.problem;
  AttentionGradients g{};
  g.batch = workspace.build.batch;
  g.lists = workspace.build.lists();
  g.q = make_token_rows(args.q);
  g.k = make_token_rows(args.k);
  g.v = make_token_rows(args.v);
  g.out = make_token_rows(args.out);
  g.dout = make_token_rows(args.dout);
  g.dq = make_token_rows(args.dq);
  g.dk = make_token_rows(args.dk);
  g.dv = make_token_rows(args.dv);
  g.lse = args.lse.data;
  g.lse_token_stride = args.lse.stride[0];
  g.lse_head_stride = args.lse.stride[1];
  g.wide_lse = args.lse.dtype == DType::f64;
  g.block_ids = workspace.build.block_ids;
  g.ids_head_stride = workspace.build.head_stride;
  g.ids_token_stride = workspace.build.token_stride;
  g.statistics = workspace.statistics;
  g.exact = workspace.exact;
  g.scale = scale_or_default(args.softmax_scale, p.head_dim);
  g.num_q_heads = p.num_q_heads;
  g.group_size = p.group_size();
  g.head_dim = p.head_dim;
  g.top_k = p.top_k;
  return g;
}

/// Reasons that hold for every kernel here; `dtypes` are what it reads.
inline std::optional<std::string> declines_gradients(const SparseAttentionBackward& args,
                                                     std::initializer_list<DType> dtypes) {
  const DType dtype = args.q.dtype;
  bool known = false;
  std::string expected;
  for (const DType taken : dtypes) {
    known = known || taken == dtype;
    expected += core::concat(expected.empty() ? "" : " or ", name_of(taken));
  }
  if (!known) return core::concat("q is ", name_of(dtype), ", not ", expected);
  std::optional<std::string> reason;
  core::for_each_tensor(args, [&](const char* name, const TensorView& view, core::Use) {
    const bool is_rows = view.given() && view.rank == 3 && view.dtype != DType::i32;
    if (is_rows && !reason && view.dtype != dtype) {
      reason = core::concat(name, " is ", name_of(view.dtype), " and q is ", name_of(dtype));
    }
  });
  if (reason) return reason;
  if (args.problem.head_dim > kMostDim) {
    return core::concat("head_dim ", args.problem.head_dim, " is above ", kMostDim);
  }
  return declines_query_lists(args);
}

/// Fills statistics, and exact where they have NaN. Reads lse, out and dout; q, k and v of rows
/// that need more.
void compute_row_statistics(const AttentionGradients& g, DType dtype, cudaStream_t stream);

__device__ __forceinline__ ExactStatistics softmax_of(const AttentionGradients& g, std::int64_t row,
                                                      int head) {
  constexpr double kLn2 = 0.69314718055994530942;
  const RowStatistics regular = g.statistics[g.statistic(row, head)];
  if (regular.lse == regular.lse) {
    const bool empty = regular.lse == INFINITY;
    return {empty ? 0.0 : static_cast<double>(regular.lse) * kLn2, empty ? 0.0 : 1.0,
            static_cast<double>(regular.delta)};
  }
  return g.exact[g.statistic(row, head)];
}

/// The dot product of two rows, by a warp; every lane gets it.
template <class T>
__device__ __forceinline__ double exact_dot(const std::byte* a, const std::byte* b, int dim) {
  double sum = 0.0;
#pragma unroll 1
  for (int d = static_cast<int>(threadIdx.x) % 32; d < dim; d += 32) {
    sum += static_cast<double>(static_cast<float>(reinterpret_cast<const T*>(a)[d])) *
           static_cast<double>(static_cast<float>(reinterpret_cast<const T*>(b)[d]));
  }
  return warp_sum(sum);
}

/// Calls visit(packed key, s, dP) for the keys that a row attends, by a warp.
template <class T, class Visit>
__device__ __forceinline__ void for_each_exact(const AttentionGradients& g, std::int64_t row,
                                               int head, Visit visit) {
  const int kv_head = head / g.group_size;
  const DeviceSequence sequence = sequence_of_query(g.batch, row);
  const std::int64_t visible = num_visible_keys(sequence, row);
  const std::int64_t block_size = g.batch.block_size;
  const std::int64_t num_blocks = (visible + block_size - 1) / block_size;
  const std::int64_t num_slots = g.block_ids == nullptr ? num_blocks : g.top_k;
#pragma unroll 1
  for (std::int64_t slot = 0; slot < num_slots; ++slot) {
    const std::int64_t block =
        g.block_ids == nullptr
            ? slot
            : g.block_ids[kv_head * g.ids_head_stride + row * g.ids_token_stride + slot];
    if (block < 0 || block >= num_blocks) continue;
    const std::int64_t end = min((block + 1) * block_size, visible);
#pragma unroll 1
    for (std::int64_t token = block * block_size; token < end; ++token) {
      const std::int64_t key = sequence.k_begin + token;
      const double s = g.scale * exact_dot<T>(g.q.at(row, head), g.k.at(key, kv_head), g.head_dim);
      const double dp = exact_dot<T>(g.dout.at(row, head), g.v.at(key, kv_head), g.head_dim);
      visit(key, s, dp);
    }
  }
}

/// dq of one (query, query head) in double, by a warp.
template <class T>
__device__ __noinline__ void dq_row(const AttentionGradients& g, std::int64_t row, int head) {
  constexpr int kShare = kMostDim / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const ExactStatistics softmax = softmax_of(g, row, head);
  double sums[kShare] = {};
  for_each_exact<T>(g, row, head, [&](std::int64_t key, double s, double dp) {
    const double ds = g.scale * softmax.probability(s) * (dp - softmax.delta);
    const T* const k = reinterpret_cast<const T*>(g.k.at(key, head / g.group_size));
#pragma unroll
    for (int e = 0; e < kShare; ++e) {
      const int d = lane + 32 * e;
      if (d < g.head_dim) sums[e] += ds * static_cast<double>(static_cast<float>(k[d]));
    }
  });
  T* const dq = reinterpret_cast<T*>(g.dq.at(row, head));
#pragma unroll
  for (int e = 0; e < kShare; ++e) {
    const int d = lane + 32 * e;
    if (d < g.head_dim) dq[d] = static_cast<T>(static_cast<float>(sums[e]));
  }
}

/// dk and dv of token `token` of an existing KV block, for one KV head, in double, by a warp.
template <class T>
__device__ __noinline__ void dkv_row(const AttentionGradients& g, std::int64_t bin,
                                     const KeyBlock& key_block, int token, int kv_head) {
  constexpr int kShare = kMostDim / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t key = key_block.first_key(g.batch.block_size) + token;
  const QueryList list = queries(g.batch, g.lists, kv_head, bin, key_block);
  double dk_sums[kShare] = {};
  double dv_sums[kShare] = {};
#pragma unroll 1
  for (std::int64_t i = 0; i < list.count; ++i) {
    const std::int64_t row = list[i];
    if (key_block.limit(g.batch.block_size, row) <= token) continue;
#pragma unroll 1
    for (int head = kv_head * g.group_size; head < (kv_head + 1) * g.group_size; ++head) {
      const ExactStatistics softmax = softmax_of(g, row, head);
      const T* const q = reinterpret_cast<const T*>(g.q.at(row, head));
      const T* const dout = reinterpret_cast<const T*>(g.dout.at(row, head));
      const double s = g.scale * exact_dot<T>(g.q.at(row, head), g.k.at(key, kv_head), g.head_dim);
      const double dp = exact_dot<T>(g.dout.at(row, head), g.v.at(key, kv_head), g.head_dim);
      const double p = softmax.probability(s);
      const double ds = g.scale * p * (dp - softmax.delta);
#pragma unroll
      for (int e = 0; e < kShare; ++e) {
        const int d = lane + 32 * e;
        if (d >= g.head_dim) continue;
        dk_sums[e] += ds * static_cast<double>(static_cast<float>(q[d]));
        dv_sums[e] += p * static_cast<double>(static_cast<float>(dout[d]));
      }
    }
  }
  T* const dk = reinterpret_cast<T*>(g.dk.at(key, kv_head));
  T* const dv = reinterpret_cast<T*>(g.dv.at(key, kv_head));
#pragma unroll
  for (int e = 0; e < kShare; ++e) {
    const int d = lane + 32 * e;
    if (d >= g.head_dim) continue;
    dk[d] = static_cast<T>(static_cast<float>(dk_sums[e]));
    dv[d] = static_cast<T>(static_cast<float>(dv_sums[e]));
  }
}

}  // namespace msa::cuda
