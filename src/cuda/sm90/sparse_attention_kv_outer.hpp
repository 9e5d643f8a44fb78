// SPDX-License-Identifier: Apache-2.0
//
// Sparse attention with the KV block outermost (docs/kernels/sm90_attention_kv_outer.md): each
// block meets all queries that chose it, so that its keys and values are read once per query window
// however little neighbouring queries have in common. The price are partial results, one per
// (query, block), which a second stage merges.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "cuda/cuda.hpp"

namespace msa::cuda::sm90 {

std::optional<std::string> kv_outer_declines(const SparseAttentionForward& args,
                                             const Options& options);
std::size_t kv_outer_workspace_bytes(const SparseAttentionForward& args);
/// `tile_is_cold` [num_kv_heads][ceil(total_q / 8)] on the device: only tokens of tiles that are
/// not 0 are computed and written. Null: all.
void kv_outer_run(const SparseAttentionForward& args, const std::uint8_t* tile_is_cold,
                  std::span<std::byte> workspace, Stream stream);

}  // namespace msa::cuda::sm90
