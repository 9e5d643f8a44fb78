// SPDX-License-Identifier: Apache-2.0
//
// IndexerKlBackward with a choice of how many queries it works on at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "msa/ops.hpp"

namespace msa::cuda::generic {

/// What the row gives for the pairs (query, KV block) of a window of queries.
inline constexpr std::int64_t kKlWindowBytes = std::int64_t{512} << 20;

std::size_t indexer_kl_workspace_bytes(const IndexerKlBackward& args, std::int64_t window_bytes);
void run_indexer_kl(const IndexerKlBackward& args, std::int64_t window_bytes,
                    std::span<std::byte> workspace, Stream stream);

}  // namespace msa::cuda::generic
