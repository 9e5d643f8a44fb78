// SPDX-License-Identifier: Apache-2.0
//
// IndexerKlBackward: window by window of queries, statistics of each (query, KV block), their sums
// over blocks, then dS and the loss, then gradients. All sums are in an order that shapes decide.
// See docs/kernels/kl.md.
#include <algorithm>
#include <array>
#include <utility>

#include "core/workspace.hpp"
#include "cuda/common/indexer_kl.cuh"
#include "cuda/common/indexer_kl.hpp"
#include "cuda/common/launch.hpp"
#include "cuda/common/ptx/math.cuh"

namespace msa::cuda {
namespace {

using namespace kl;

constexpr int kMostDimOfKl = 256;
constexpr int kThreads = 128;
constexpr int kLossThreads = 1024;
constexpr std::int64_t kFewestRows = 16;  // of a window
constexpr double kLog2E = 1.4426950408889634;

__device__ __forceinline__ void store_float(std::byte* row, DType dtype, int i, float value) {
  if (dtype == DType::f32) {
    reinterpret_cast<float*>(row)[i] = value;
  } else if (dtype == DType::f16) {
    reinterpret_cast<__half*>(row)[i] = static_cast<__half>(value);
  } else {
    reinterpret_cast<__nv_bfloat16*>(row)[i] = static_cast<__nv_bfloat16>(value);
  }
}

/// A warp's (query, KV head) of the window.
struct Row {
  std::int64_t row;
  std::int64_t visible;  ///< keys
  std::int64_t slots;
  int head;

  /// False: none.
  __device__ __forceinline__ bool find(const Params& g) {
    const std::int64_t number = (std::int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32;
    if (number >= g.num_rows * g.num_kv_heads) return false;
    row = g.first_row + number / g.num_kv_heads;
    head = static_cast<int>(number % g.num_kv_heads);
    visible = num_visible_keys(sequence_of_query(g.batch, row), row);
    slots = g.num_slots;
    if (g.block_ids == nullptr) {
      slots = min(slots, (visible + g.piece_size - 1) / g.piece_size);
    }
    return true;
  }
};

/// Base-2 logarithm of the sum over the pairs that the row attends, right in lane 0.
template <class StatisticsAt>
__device__ __forceinline__ float log_sum(const Params& g, const Row& row,
                                         StatisticsAt statistics_at) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float m = -INFINITY;
  float l = 0.0f;
  const auto add = [&](float other_m, float other_l) {
    const float larger = fmaxf(m, other_m);
    const float base = larger == -INFINITY ? 0.0f : larger;
    l = l * ptx::ex2(m - base) + other_l * ptx::ex2(other_m - base);
    m = larger;
  };
  for (std::int64_t slot = lane; slot < row.slots; slot += 32) {
    if (!attends(g, row.row, row.head, row.visible, slot)) continue;
    const float2 statistics = statistics_at(g.pair(row.row, row.head, slot));
    add(statistics.x, statistics.y);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    add(__shfl_xor_sync(~0u, m, lanes), __shfl_xor_sync(~0u, l, lanes));
  }
  return l == 0.0f ? -INFINITY : m + log2f(l);
}

__global__ void __launch_bounds__(kThreads)
    merge_statistics_kernel(const __grid_constant__ Params g) {
  Row row;
  if (!row.find(g)) return;
  const bool leads = threadIdx.x % 32 == 0;
  const float student =
      log_sum(g, row, [&](std::int64_t pair) { return g.student_statistics[pair]; });
  if (leads) g.student_lse[row.row * g.num_kv_heads + row.head] = student;
  if (g.given_lse != nullptr) return;
  for (int i = 0; i < g.group_size; ++i) {
    const float teacher = log_sum(
        g, row, [&](std::int64_t pair) { return g.teacher_statistics[pair * g.group_size + i]; });
    const std::int64_t at = row.row * g.num_kv_heads + row.head;
    if (leads) g.teacher_lse[at * g.group_size + i] = teacher;
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_gradients_kernel(const __grid_constant__ Params g) {
  Row row;
  if (!row.find(g)) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (g.pair_losses != nullptr) {
    double loss = 0.0;
    for (std::int64_t slot = lane; slot < row.slots; slot += 32) {
      if (attends(g, row.row, row.head, row.visible, slot)) {
        loss += g.pair_losses[g.pair(row.row, row.head, slot)];
      }
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) loss += __shfl_xor_sync(~0u, loss, lanes);
    if (lane == 0) g.losses[row.row * g.num_kv_heads + row.head] = loss;
  }
  if (g.dindex_q.data == nullptr) return;
  std::byte* const to = g.dindex_q.at(row.row, row.head);
  // Four dimensions a lane; several slots' parts are under way at once.
  const bool whole = g.index_dim % 4 == 0;
  for (int d = 4 * lane; d < g.index_dim; d += 4 * 32) {
    const float* const parts = g.dindex_q_parts + g.pair(row.row, row.head, 0) * g.index_dim + d;
    float sum[4] = {};
#pragma unroll 4
    for (std::int64_t slot = 0; slot < row.slots; ++slot) {
      float part[4] = {};
      if (attends(g, row.row, row.head, row.visible, slot)) {
        const float* const from = parts + slot * g.index_dim;
        if (whole) {
          const float4 four = *reinterpret_cast<const float4*>(from);
          part[0] = four.x;
          part[1] = four.y;
          part[2] = four.z;
          part[3] = four.w;
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) part[i] = d + i < g.index_dim ? from[i] : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (d + i < g.index_dim) {
        store_float(to, g.dindex_q.dtype, d + i, sum[i] * g.gradient_scale);
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) sum_dindex_k_kernel(const __grid_constant__ Params g) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t count = g.total_k * g.index_dim;
  if (i >= count) return;
  float sum = 0.0f;
  for (int head = 0; head < g.num_kv_heads; ++head) sum += g.dindex_k_sums[head * count + i];
  store_float(g.dindex_k.at(i / g.index_dim, 0), g.dindex_k.dtype,
              static_cast<int>(i % g.index_dim), sum * g.gradient_scale);
}

/// One CTA.
__global__ void __launch_bounds__(kLossThreads)
    sum_losses_kernel(const __grid_constant__ Params g) {
  __shared__ double sums[kLossThreads];
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0.0;
  for (std::int64_t i = thread; i < g.num_losses; i += kLossThreads) sum += g.losses[i];
  sums[thread] = sum;
  __syncthreads();
  for (int others = kLossThreads / 2; others > 0; others /= 2) {
    if (thread < others) sums[thread] += sums[thread + others];
    __syncthreads();
  }
  if (thread != 0) return;
  const double loss = g.weight * sums[0];
  if (g.wide_loss) {
    *reinterpret_cast<double*>(g.loss) = loss;
  } else {
    *reinterpret_cast<float*>(g.loss) = static_cast<float>(loss);
  }
}

Rows make_rows(const TensorView& view) {
  if (!view.given()) return {};
  const auto size = static_cast<std::int64_t>(size_of(view.dtype));
  return {.data = static_cast<std::byte*>(view.data),
          .token_stride = view.stride[0] * size,
          .head_stride = view.stride[1] * size,
          .dtype = view.dtype,
          .load = load_of(view)};
}

int padded_dim(int dim) { return dim <= 64 ? 64 : dim <= 128 ? 128 : 256; }

struct Plan {
  Params params{};
  QueryListBuild lists{};
};

/// Memory comes from `layout`, which may count only.
Plan lay_out(const IndexerKlBackward& args, std::int64_t window_bytes, KlLosses losses,
             core::WorkspaceLayout& layout) {
  const Problem& p = args.problem;
  const std::int64_t total_q = args.q.shape[0];
  const std::int64_t total_k = args.k.shape[0];
  const bool gradients = args.dindex_q.given();
  Plan plan;
  plan.lists = lay_out_query_lists(args, layout);
  Params& g = plan.params;
  g.batch = plan.lists.batch;
  g.lists = plan.lists.lists();
  g.block_ids = plan.lists.block_ids;
  g.ids_head_stride = plan.lists.head_stride;
  g.ids_token_stride = plan.lists.token_stride;
  g.q = make_rows(args.q);
  g.index_q = make_rows(args.index_q);
  g.k = make_key_rows(args.k, args.batch, p.block_size);
  g.index_k = make_key_rows(args.index_k, args.batch, p.block_size);
  if (args.lse.given()) {
    g.given_lse = static_cast<const float*>(args.lse.data);
    g.lse_token_stride = args.lse.stride[0];
    g.lse_head_stride = args.lse.stride[1];
  }
  g.dindex_q = make_rows(args.dindex_q);
  g.dindex_k = make_rows(args.dindex_k);
  g.loss = static_cast<std::byte*>(args.loss.given() ? args.loss.data : nullptr);
  g.wide_loss = args.loss.dtype == DType::f64;
  g.total_q = total_q;
  g.total_k = total_k;
  g.piece_size = std::min(p.block_size, most_keys(padded_dim(std::max(p.head_dim, p.index_dim))));
  g.pieces_per_block = p.block_size / g.piece_size;
  g.num_kv_heads = p.num_kv_heads;
  g.group_size = p.group_size();
  g.head_dim = p.head_dim;
  g.index_dim = p.index_dim;
  g.top_k = p.top_k;
  const double index_scale = scale_or_default(args.index_scale, p.index_dim);
  g.teacher_scale = static_cast<float>(scale_or_default(args.softmax_scale, p.head_dim) * kLog2E);
  g.student_scale = static_cast<float>(index_scale * kLog2E);
  g.ds_scale = args.q.dtype == DType::f16 ? 0x1p14f : 1.0f;
  g.weight = static_cast<double>(args.loss_coefficient) /
             (static_cast<double>(std::max<std::int64_t>(total_q, 1)) * p.num_kv_heads);
  g.gradient_scale = static_cast<float>(g.weight * index_scale / static_cast<double>(g.ds_scale));

  const std::int64_t blocks =
      args.block_ids.given() ? p.top_k : ceil_div(core::max_seq_len_k(args), p.block_size);
  g.num_slots = blocks * g.pieces_per_block;
  std::int64_t pair_bytes = sizeof(float2) + sizeof(double);
  if (g.given_lse == nullptr) {
    pair_bytes += static_cast<std::int64_t>(sizeof(float2)) * g.group_size;
  }
  if (gradients) pair_bytes += 2 * g.piece_size + std::int64_t{4} * g.index_dim;
  const std::int64_t row_bytes =
      std::max<std::int64_t>(pair_bytes * g.num_slots * g.num_kv_heads, 1);
  g.num_rows = std::min(std::max(window_bytes / row_bytes, kFewestRows), total_q);
  const std::int64_t pairs = g.num_rows * g.num_kv_heads * g.num_slots;

  if (g.given_lse == nullptr) {
    g.teacher_lse = layout.take<float>(total_q * p.num_q_heads);
    g.teacher_statistics = layout.take<float2>(pairs * g.group_size);
  }
  g.student_lse = layout.take<float>(total_q * p.num_kv_heads);
  g.student_statistics = layout.take<float2>(pairs);
  if (losses == KlLosses::of_pairs) {
    g.pair_losses = layout.take<double>(pairs);
    g.num_losses = total_q * p.num_kv_heads;
  } else {
    const dim3 grid = kl::grid_of(g);
    g.num_losses = std::int64_t{grid.x} * grid.y;
  }
  g.losses = layout.take<double>(g.num_losses);
  if (gradients) {
    g.ds = layout.take<std::uint16_t>(pairs * g.piece_size);
    g.dindex_q_parts = layout.take<float>(pairs * g.index_dim);
    g.dindex_k_sums = layout.take<float>(p.num_kv_heads * total_k * g.index_dim);
  }
  return plan;
}

}  // namespace

std::optional<std::string> declines_indexer_kl(const IndexerKlBackward& args, const Options&) {
  if (auto reason = declines_device(args, 80, false)) return reason;
  const DType dtype = args.q.dtype;
  if (dtype != DType::bf16 && dtype != DType::f16) {
    return core::concat("q is ", name_of(dtype), ", not bf16 or f16");
  }
  const auto inputs = std::to_array<std::pair<const char*, const TensorView*>>(
      {{"k", &args.k}, {"index_q", &args.index_q}, {"index_k", &args.index_k}});
  for (const auto& [name, view] : inputs) {
    if (view->dtype != dtype) {
      return core::concat(name, " is ", name_of(view->dtype), " and q is ", name_of(dtype));
    }
  }
  const auto outputs = std::to_array<std::pair<const char*, const TensorView*>>(
      {{"dindex_q", &args.dindex_q}, {"dindex_k", &args.dindex_k}});
  for (const auto& [name, view] : outputs) {
    if (view->given() && view->dtype == DType::f64) return core::concat(name, " is f64");
  }
  if (args.lse.given() && args.lse.dtype != DType::f32) {
    return core::concat("lse is ", name_of(args.lse.dtype), ", not f32");
  }
  const int dim = std::max(args.problem.head_dim, args.problem.index_dim);
  if (dim > kMostDimOfKl) {
    return core::concat("a head has ", dim, " elements, more than ", kMostDimOfKl);
  }
  return declines_query_lists(args);
}

std::size_t indexer_kl_workspace_bytes(const IndexerKlBackward& args, std::int64_t window_bytes,
                                       KlLosses losses) {
  core::WorkspaceLayout layout;
  lay_out(args, window_bytes, losses, layout);
  return layout.bytes();
}

void run_indexer_kl(const IndexerKlBackward& args, std::int64_t window_bytes,
                    const KlScoreGradients& score_gradients, std::span<std::byte> workspace,
                    Stream given_stream) {
  const cudaStream_t stream = stream_of(given_stream);
  core::WorkspaceLayout layout(workspace.data());
  const auto [first, lists] = lay_out(args, window_bytes, score_gradients.losses, layout);
  const DType dtype = args.q.dtype;
  const bool gradients = args.dindex_q.given();
  if (first.total_q > 0) build_query_lists(lists, stream);
  if (gradients && first.total_k > 0) {
    MSA_CUDA_CHECK(cudaMemsetAsync(
        first.dindex_k_sums, 0,
        sizeof(float) *
            static_cast<std::size_t>(first.num_kv_heads * first.total_k * first.index_dim),
        stream));
  }
  if (score_gradients.losses == KlLosses::of_ctas) {
    MSA_CUDA_CHECK(cudaMemsetAsync(
        first.losses, 0, sizeof(double) * static_cast<std::size_t>(first.num_losses), stream));
  }
  Params g = first;
  for (g.first_row = 0; g.first_row < g.total_q; g.first_row += first.num_rows) {
    g.num_rows = std::min(first.num_rows, g.total_q - g.first_row);
    const LaunchConfig warps{
        .grid = dim3(static_cast<unsigned>(ceil_div(g.num_rows * g.num_kv_heads, kThreads / 32))),
        .threads = kThreads};
    launch_kl_statistics(g, dtype, stream);
    launch(merge_statistics_kernel, warps, stream, g);
    score_gradients.launch(score_gradients.context, g, dtype, stream);
    if (gradients) launch_kl_index_gradients(g, dtype, stream);
    launch(merge_gradients_kernel, warps, stream, g);
  }
  if (g.loss != nullptr) launch(sum_losses_kernel, {.threads = kLossThreads}, stream, g);
  if (gradients) {
    launch(sum_dindex_k_kernel,
           {.grid = dim3(static_cast<unsigned>(ceil_div(g.total_k * g.index_dim, kThreads))),
            .threads = kThreads},
           stream, g);
  }
}

}  // namespace msa::cuda
