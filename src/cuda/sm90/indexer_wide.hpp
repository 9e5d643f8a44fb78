// SPDX-License-Identifier: Apache-2.0
//
// The indexer for top_k above 16: lists of 64 places, 128 rows a CTA.
#pragma once

#include <cstddef>
#include <span>

#include "msa/ops.hpp"

namespace msa::cuda::sm90 {

inline constexpr int kWidePlaces = 64;

std::size_t wide_indexer_workspace_bytes(const Indexer& args);
void run_wide_indexer(const Indexer& args, std::span<std::byte> workspace, Stream stream);

}  // namespace msa::cuda::sm90
