// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm90/indexer_wide.hpp"
#include "cuda/sm90/select_blocks.cuh"

namespace msa::cuda::sm90 {

std::size_t wide_indexer_workspace_bytes(const Indexer& args) {
  return select_workspace_bytes<kWidePlaces>(args);
}

void run_wide_indexer(const Indexer& args, std::span<std::byte> workspace, Stream stream) {
  run_select<kWidePlaces>(args, workspace, stream);
}

}  // namespace msa::cuda::sm90
