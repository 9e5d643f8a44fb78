// SPDX-License-Identifier: Apache-2.0
//
// IndexerKlBackward with every kernel as src/cuda/common has it: mma.sync, any GPU from sm_80 on.
#include "cuda/common/indexer_kl.hpp"
#include "cuda/cuda.hpp"

namespace msa::cuda::generic {

const msa::detail::Implementation<IndexerKlBackward> kIndexerKlBackward = {
    .name = "cuda_generic",
    .dtypes = "f16 bf16",
    .declines = declines_indexer_kl,
    .workspace_bytes = [](const IndexerKlBackward& args) -> std::size_t {
      return indexer_kl_workspace_bytes(args, kKlWindowBytes);
    },
    .run =
        [](const IndexerKlBackward& args, std::span<std::byte> workspace, Stream stream) {
          run_indexer_kl(args, kKlWindowBytes, kKlScoreGradients, workspace, stream);
        }};

}  // namespace msa::cuda::generic
