// SPDX-License-Identifier: Apache-2.0
//
// Tensor maps of queries and keys as the attention kernels load them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cuda/common/tensor_map.hpp"
#include "msa/ops.hpp"

namespace msa::cuda::sm90 {

/// Of an axis of one the stride means nothing, and TMA wants a multiple of 16.
inline std::uint64_t stride_bytes(const TensorView& view, std::size_t axis) {
  if (view.shape[axis] <= 1) return 16;
  return static_cast<std::uint64_t>(view.stride[axis]) * size_of(view.dtype);
}

/// k or v as (dim, token, head, page), ragged keys as one page; boxes of 128 bytes of each token of
/// a block. Without keys a tensor of one token at `other`, which nothing reads.
inline CUtensorMap map_of_keys(const TensorView& view, const Problem& problem, bool paged,
                               const void* other) {
  const bool empty = view.shape[0] == 0;
  const auto dim = static_cast<std::uint64_t>(problem.head_dim);
  const auto heads = static_cast<std::uint64_t>(problem.num_kv_heads);
  const std::uint64_t tokens = empty   ? 1
                               : paged ? static_cast<std::uint64_t>(problem.block_size)
                                       : static_cast<std::uint64_t>(view.shape[0]);
  const std::uint64_t pages = paged && !empty ? static_cast<std::uint64_t>(view.shape[0]) : 1;
  const std::uint64_t page_stride = paged ? stride_bytes(view, 0) : 16;
  return make_tensor_map(
      empty ? other : view.data, view.dtype, std::array{dim, tokens, heads, pages},
      std::array{stride_bytes(view, paged ? 2 : 0), stride_bytes(view, 1), page_stride},
      std::array<std::uint32_t, 4>{static_cast<std::uint32_t>(128 / size_of(view.dtype)),
                                   static_cast<std::uint32_t>(problem.block_size), 1, 1});
}

/// q or a tensor shaped like it (16-bit) as (dim, head, token); boxes of 64 columns, `slot_rows`
/// heads, and the tokens that make 64 rows.
inline CUtensorMap map_of_queries(const TensorView& view, const Problem& problem, int slot_rows) {
  return make_tensor_map(view.data, view.dtype,
                         std::array{static_cast<std::uint64_t>(problem.head_dim),
                                    static_cast<std::uint64_t>(problem.num_q_heads),
                                    static_cast<std::uint64_t>(view.shape[0])},
                         std::array{stride_bytes(view, 1), stride_bytes(view, 0)},
                         std::array<std::uint32_t, 3>{64, static_cast<std::uint32_t>(slot_rows),
                                                      static_cast<std::uint32_t>(64 / slot_rows)});
}

/// The same tensor, boxes of one token's group: 64 columns, heads by eights (or all where there are
/// fewer), panels.
inline CUtensorMap map_of_groups(const TensorView& view, const Problem& problem) {
  const auto dim = static_cast<std::uint64_t>(problem.head_dim);
  const auto heads = static_cast<std::uint64_t>(problem.num_q_heads);
  const auto group = static_cast<std::uint32_t>(problem.group_size());
  const auto panels = static_cast<std::uint32_t>(dim / 64);
  const auto tokens = static_cast<std::uint64_t>(view.shape[0]);
  const std::uint64_t head = stride_bytes(view, 1);
  const std::uint64_t token = stride_bytes(view, 0);
  if (group >= 8) {
    const std::uint64_t dims[] = {64, 8, panels, heads / 8, tokens};
    const std::uint64_t strides[] = {head, 128, 8 * head, token};
    const std::uint32_t box[] = {64, 8, panels, group / 8, 1};
    return make_tensor_map(view.data, view.dtype, dims, strides, box);
  }
  const std::uint64_t dims[] = {64, heads, panels, 1, tokens};
  const std::uint64_t strides[] = {head, 128, 16, token};
  const std::uint32_t box[] = {64, group, 1, 1, 1};
  return make_tensor_map(view.data, view.dtype, dims, strides, box);
}

}  // namespace msa::cuda::sm90
