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
/// Which tokens kv_outer_run() computes and writes, on the device: those of tiles whose flag is not
/// 0. Null: all.
struct ColdTiles {
  const std::uint8_t* flags = nullptr;  ///< [num_kv_heads][ceil(total_q / 8)]
  const int* any = nullptr;             ///< with flags; 0: no flag is set
};
void kv_outer_run(const SparseAttentionForward& args, ColdTiles cold,
                  std::span<std::byte> workspace, Stream stream);

}  // namespace msa::cuda::sm90
