// SPDX-License-Identifier: Apache-2.0
//
// Host side of the two index operations: what they decline, how their work is cut into CTAs, and
// the tensor maps of queries and keys.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>
#include <string>

#include "core/sequences.hpp"
#include "cuda/common/batch.cuh"
#include "cuda/common/support.hpp"
#include "cuda/common/tensor_map.hpp"

namespace msa::cuda::sm90 {

/// Most rows (tokens x index heads) of a CTA, and the keys that it multiplies them by at a time.
inline constexpr int kIndexRows = 256;
inline constexpr int kIndexTileKeys = 128;
inline constexpr int kIndexCluster = 2;  // CTAs that share their key tiles
inline constexpr int kIndexBoxKeys = kIndexTileKeys / kIndexCluster;  // what each loads at a time
inline constexpr int kIndexDim = 128;  // smaller ones are filled up with zeros
inline constexpr int kIndexHeads = 128;

template <class Args>
std::optional<std::string> declines_index(const Args& args) {
  const Problem& p = args.problem;
  if (auto reason = declines_device(args, 90, true)) return reason;
  const DType dtype = args.index_q.dtype;
  if (dtype != DType::bf16 && dtype != DType::f16 && dtype != DType::e4m3) {
    return core::concat("index_q is ", name_of(dtype), ", not bf16, f16 or e4m3");
  }
  if (args.index_k.dtype != dtype) {
    return core::concat("index_q is ", name_of(dtype), " and index_k is ",
                        name_of(args.index_k.dtype));
  }
  if (p.index_dim > kIndexDim) {
    return core::concat("index_dim is ", p.index_dim, ", above ", kIndexDim);
  }
  if (p.block_size != 64 && p.block_size != 128) {
    return core::concat("block_size is ", p.block_size, ", not 64 or 128");
  }
  if (p.num_kv_heads > kIndexHeads) {
    return core::concat("num_kv_heads is ", p.num_kv_heads, ", above ", kIndexHeads);
  }
  if (core::max_seq_len_k(args) > INT32_MAX) {
    return core::concat("sequences may have ", core::max_seq_len_k(args),
                        " keys, more than 2^31 - 1; give max_seq_len_k");
  }
  if (auto reason = declines_tma("index_q", args.index_q)) return reason;
  return declines_tma("index_k", args.index_k);
}

/// Rows of a token: its index heads, filled up to a power of two.
inline int log2_index_heads(const Problem& p) {
  return std::bit_width(static_cast<unsigned>(p.num_kv_heads - 1));
}

/// How the work is cut: `row_tiles` times `chunks` CTAs; a chunk is `chunk_tiles` key tiles.
struct IndexGrid {
  std::int64_t row_tiles;
  int chunks;
  int chunk_tiles;
  bool share_keys;  ///< clusters of kIndexCluster CTAs
};

/// From shapes alone. Long prompts have enough row tiles for all SMs; otherwise the keys are cut
/// too, which costs `bytes_per_row` (0: nothing) of workspace traffic a row and chunk.
template <class Args>
IndexGrid index_grid(const Args& args, int rows, double bytes_per_row) {
  const std::int64_t tokens = rows >> log2_index_heads(args.problem);
  const std::int64_t total_q = args.index_q.shape[0];
  const std::int64_t batch_size = std::max<std::int64_t>(core::batch_size(args.batch), 1);
  const std::int64_t key_tiles =
      std::max<std::int64_t>(ceil_div(core::max_seq_len_k(args), kIndexTileKeys), 1);
  const int sms = std::max(num_sms(args.index_q.device.index), 1);

  // Costs in units of one key tile of a CTA: 1.1 us on an H100, on which the others were measured.
  constexpr double kStart = 6.0;           // of a CTA: launch, first loads, last stores
  constexpr double kBytesPerUnit = 1.0e6;  // of lists, written and merged
  constexpr double kMergeLaunch = 6.0;
  constexpr int kMostChunks = 64;
  const double longest = static_cast<double>(key_tiles);
  const double row_tiles =
      static_cast<double>(std::max(ceil_div(total_q, tokens), std::min(batch_size, total_q)));
  // Row tiles see from longest - span to longest key tiles.
  const double span =
      std::clamp(static_cast<double>(ceil_div(total_q, batch_size)) / kIndexTileKeys, 1.0, longest);
  const auto cost_of = [&](std::int64_t chunk_tiles) {
    const double chunks = static_cast<double>(ceil_div(key_tiles, chunk_tiles));
    const double chunk = static_cast<double>(chunk_tiles);
    if (chunks == 1) {
      return std::max(longest, row_tiles * (longest - span / 2 + kStart) / sms) + kStart;
    }
    double units = 0;
    for (double seen = 0; seen < longest; seen += chunk) {
      units += row_tiles * std::min((longest - seen) / span, 1.0);
    }
    const double merge = static_cast<double>(total_q * args.problem.num_kv_heads) * chunks *
                         bytes_per_row / kBytesPerUnit;
    return std::ceil(units / sms) * (chunk + kStart) + (bytes_per_row > 0 ? kMergeLaunch : 0) +
           merge;
  };
  std::int64_t best = key_tiles;
  for (std::int64_t chunks = 2; chunks <= std::min<std::int64_t>(key_tiles, kMostChunks);
       ++chunks) {
    const std::int64_t chunk_tiles = ceil_div(key_tiles, chunks);
    if (cost_of(chunk_tiles) < cost_of(best)) best = chunk_tiles;
  }
  // Multicast saves power, which is what limits long prompts; it costs a little at the start.
  const bool share_keys = best == key_tiles && row_tiles >= 8.0 * sms;
  return {.row_tiles = round_up(total_q / tokens + core::batch_size(args.batch), kIndexCluster),
          .chunks = static_cast<int>(ceil_div(key_tiles, best)),
          .chunk_tiles = static_cast<int>(best),
          .share_keys = share_keys};
}

/// Bytes between the elements of an axis; where it has one element only, its stride says nothing
/// and `packed` is taken.
inline std::uint64_t map_stride(const TensorView& view, std::size_t axis, std::uint64_t packed) {
  if (view.shape[axis] <= 1) return (packed + 15) / 16 * 16;
  return static_cast<std::uint64_t>(view.stride[axis]) * size_of(view.dtype);
}

/// (dim, index head, token): a box is the `rows` of a CTA, one panel wide.
inline CUtensorMap index_q_map(const TensorView& q, const Problem& p, int rows) {
  const int log2_heads = log2_index_heads(p);
  const std::uint64_t dims[] = {static_cast<std::uint64_t>(q.shape[2]),
                                static_cast<std::uint64_t>(q.shape[1]),
                                static_cast<std::uint64_t>(q.shape[0])};
  const std::uint64_t head_stride = map_stride(q, 1, dims[0] * size_of(q.dtype));
  const std::uint64_t strides[] = {head_stride, map_stride(q, 0, head_stride * dims[1])};
  const std::uint32_t box[] = {static_cast<std::uint32_t>(128 / size_of(q.dtype)), 1u << log2_heads,
                               static_cast<std::uint32_t>(rows >> log2_heads)};
  return make_tensor_map(q.data, q.dtype, dims, strides, box);
}

/// (dim, token, page): a box is half a key tile, one panel wide. Without keys (total_k or num_pages
/// is 0) nothing is ever loaded, but a map needs an address: that of the queries.
template <class Args>
CUtensorMap index_k_map(const Args& args) {
  const TensorView& k = args.index_k;
  const bool paged = core::is_paged(args.batch);
  const bool none = k.shape[0] == 0;
  const std::size_t token_axis = paged ? 2 : 0;
  const std::uint64_t tokens = none ? 1 : static_cast<std::uint64_t>(k.shape[token_axis]);
  const std::uint64_t pages = none || !paged ? 1 : static_cast<std::uint64_t>(k.shape[0]);
  const std::uint64_t dims[] = {static_cast<std::uint64_t>(args.problem.index_dim), tokens, pages};
  const std::uint64_t token_stride = map_stride(k, token_axis, dims[0] * size_of(k.dtype));
  const std::uint64_t strides[] = {
      token_stride, paged ? map_stride(k, 0, token_stride * tokens) : token_stride * tokens};
  const std::uint32_t box[] = {static_cast<std::uint32_t>(128 / size_of(k.dtype)), kIndexBoxKeys,
                               1};
  return make_tensor_map(none ? args.index_q.data : k.data, k.dtype, dims, strides, box);
}

}  // namespace msa::cuda::sm90
